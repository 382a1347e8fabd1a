// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"io"
	"sync"
	"time"
)

// stallCheck is how long a Write may block before the side that is not being read meanwhile is asked whether it still
// lives, and again each time.
const stallCheck = 2 * time.Second

// flow is one direction of a relay. It runs on one goroutine.
type flow struct {
	session          *session
	relayer          *Relayer
	src, dst         Conn
	srcSide, dstSide side
	written          int64 // bytes that dst took

	stall   *time.Timer // runs while dst.Write does; nil if src is no Watcher
	mu      sync.Mutex
	writing bool // guarded by mu
}

// pooledReader is a Conn that takes a buffer only once there is something to put into it.
type pooledReader interface {
	readPooled(r *Relayer) (*buffer, int, error)
}

func (f *flow) run() {
	watched, _ := f.src.(Watcher)
	if watched != nil {
		f.stall = time.AfterFunc(time.Hour, func() { f.check(watched) })
		f.stall.Stop()
	}
	if !f.copy() {
		return
	}
	if err := f.dst.CloseWrite(); err != nil {
		f.session.fail(f.dstSide.reason(err), err)
		return
	}
	if f.session.finish() || watched == nil {
		return
	}
	// The other direction goes on, and writes to src but rarely, or never: only this tells it that src is gone.
	if err := watched.WaitFailed(); err != nil {
		f.session.fail(f.srcSide.reason(err), err)
	}
}

// copy moves bytes until src ends with FIN, which it reports as true, or the session has failed.
func (f *flow) copy() (eof bool) {
	for {
		buf, n, err := f.read()
		if n > 0 {
			werr := f.write(buf[:n])
			if werr != nil {
				f.relayer.put(buf)
				f.session.fail(f.dstSide.reason(werr), werr)
				return false
			}
		}
		if buf != nil {
			f.relayer.put(buf)
		}
		if err == io.EOF {
			return true
		}
		if err != nil {
			f.session.fail(f.srcSide.reason(err), err)
			return false
		}
	}
}

// read returns the next bytes of src in a buffer of the relayer's, or no buffer and an error.
func (f *flow) read() (*buffer, int, error) {
	switch src := f.src.(type) {
	case pooledReader:
		return src.readPooled(f.relayer)
	case ReadWaiter:
		if err := src.WaitRead(); err != nil {
			return nil, 0, err
		}
	}
	buf := f.relayer.get()
	n, err := f.src.Read(buf[:])
	return buf, n, err
}

// write hands p to dst and counts what was taken.
func (f *flow) write(p []byte) error {
	if f.stall != nil {
		f.setWriting(true)
		defer f.setWriting(false)
	}
	n, err := f.dst.Write(p)
	f.written += int64(n)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}

func (f *flow) setWriting(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writing = on
	if on {
		f.stall.Reset(stallCheck)
	} else {
		f.stall.Stop()
	}
}

// check runs on the stall timer. Nobody reads src while dst is slow; without this a client that resets would hold its
// stream for as long as the far end does not read.
func (f *flow) check(src Watcher) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.writing {
		return // the write ended as the timer fired; src may belong to nobody by now
	}
	if err := src.Failed(); err != nil {
		f.session.fail(f.srcSide.reason(err), err)
		return
	}
	f.stall.Reset(stallCheck)
}
