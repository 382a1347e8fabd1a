// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"io"
	"sync/atomic"
)

// flow is one direction of a relay. It runs on one goroutine.
type flow struct {
	session          *session
	relayer          *Relayer
	src, dst         Conn
	srcSide, dstSide side
	written          int64 // bytes that dst took
	failure          error // of dst

	writes atomic.Uint64 // begun and ended; odd while one runs
	seen   uint64        // writes at the last stall check, whose alone it is
}

// pooledReader is a Conn that takes a buffer only once there is something to put into it.
type pooledReader interface {
	readPooled(r *Relayer) (*buffer, int, error)
}

func (f *flow) run() {
	err := f.copy()
	switch {
	case f.failure != nil:
		f.session.fail(f.dstSide.reason(f.failure), f.failure)
		return
	case err != nil:
		f.session.fail(f.srcSide.reason(err), err)
		return
	}
	if err := f.dst.CloseWrite(); err != nil {
		f.session.fail(f.dstSide.reason(err), err)
		return
	}
	watched, _ := f.src.(Watcher)
	if f.session.finish() || watched == nil {
		return
	}
	// The other direction goes on, and writes to src but rarely, or never: only this tells it that src is gone.
	if err := watched.WaitFailed(); err != nil {
		f.session.fail(f.srcSide.reason(err), err)
	}
}

// copy moves bytes until src ends with FIN, which is no error. An error of dst is in f.failure.
func (f *flow) copy() error {
	switch src := f.src.(type) {
	case pooledReader:
		for {
			buf, n, err := src.readPooled(f.relayer)
			if err == nil {
				_, err = f.Write(buf[:n])
				f.relayer.put(buf)
			}
			if err != nil {
				return unlessEOF(err)
			}
		}
	case io.WriterTo:
		_, err := src.WriteTo(f)
		return err
	}
	buf := f.relayer.get()
	defer f.relayer.put(buf)
	for {
		n, err := f.src.Read(buf[:])
		if n > 0 {
			if _, err := f.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return unlessEOF(err)
		}
	}
}

func unlessEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// Write hands p to dst and counts what was taken.
func (f *flow) Write(p []byte) (int, error) {
	f.writes.Add(1)
	f.session.stall.arm()
	n, err := f.dst.Write(p)
	f.writes.Add(1)
	f.written += int64(n)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	f.failure = err
	return n, err
}

// stalled reports whether one Write has lasted since the last call, and whether there was none meanwhile.
func (f *flow) stalled() (stalled, idle bool) {
	n := f.writes.Load()
	same := n == f.seen
	f.seen = n
	return same && n%2 == 1, same && n%2 == 0
}
