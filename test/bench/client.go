// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// clientMain does the tasks that come in on standard input, one after the other.
func clientMain([]string) int {
	tasks, samples := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var t task
		switch err := tasks.Decode(&t); {
		case errors.Is(err, io.EOF):
			return 0
		case err != nil:
			return failRole(err)
		}
		s, err := t.do()
		if err != nil {
			s = sample{Error: err.Error()}
		}
		if err := samples.Encode(s); err != nil {
			return failRole(err)
		}
	}
}

const (
	taskLimit = time.Minute           // a task that takes longer has failed
	settle    = 50 * time.Millisecond // between opening connections and the bulk on them
)

func (t task) do() (sample, error) {
	switch t.Work.Kind {
	case connects:
		return t.connect()
	case pings:
		return t.ping()
	case down, up:
		return t.bulk()
	case downFor, upFor:
		return t.flow()
	case stalled:
		return t.besideStalled()
	case keysDown, keysUp:
		return t.keys()
	case visits:
		return t.visit()
	}
	return sample{}, fmt.Errorf("no such work: %q", t.Work.Kind)
}

// share is what connection i of the task has to do.
func (t task) share(total int64, i int) int64 {
	n := int64(t.Work.Conns)
	return total/n + b2i(int64(i) < total%n)
}

func b2i(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

func (t task) dial() (*net.TCPConn, error) {
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	c, err := dialer.Dial("tcp", t.Addr)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), c.SetDeadline(time.Now().Add(taskLimit))
}

// atOnce runs f once for each connection and returns how long all of them took, and the first error.
func (t task) atOnce(f func(i int) error) (time.Duration, error) {
	errs := make([]error, t.Work.Conns)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range t.Work.Conns {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	took := time.Since(begin)
	for _, err := range errs {
		if err != nil {
			return took, err
		}
	}
	return took, nil
}

// timed is what connections and messages took, of each connection.
type timed [][]time.Duration

func (d timed) sample(took time.Duration) sample {
	var all []time.Duration
	for _, list := range d {
		all = append(all, list...)
	}
	return sample{Seconds: took.Seconds(), Ops: len(all), P50: micros(percentile(all, 50)), P99: micros(percentile(all, 99))}
}

func (t task) connect() (sample, error) {
	times := make(timed, t.Work.Conns)
	took, err := t.atOnce(func(i int) error {
		for range t.share(int64(t.Work.Count), i) {
			begin := time.Now()
			if err := t.connectOnce(); err != nil {
				return err
			}
			times[i] = append(times[i], time.Since(begin))
		}
		return nil
	})
	return times.sample(took), err
}

func (t task) connectOnce() error {
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	ask := request(wantAnswer, messageLen)
	return exchange(c, ask, make([]byte, messageLen))
}

// exchange sends a message and waits for the same.
func exchange(c *net.TCPConn, ask, answer []byte) error {
	if _, err := c.Write(ask); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	if !bytes.Equal(ask, answer) {
		return errors.New("the answer is not what was sent")
	}
	return nil
}

// dialAll opens the task's connections and sends a request on each that has one.
func (t task) dialAll(ask func(i int) []byte) (conns []*net.TCPConn, err error) {
	for i := range t.Work.Conns {
		c, err := t.dial()
		if err != nil {
			return conns, err
		}
		conns = append(conns, c)
		if _, err := c.Write(ask(i)); err != nil {
			return conns, err
		}
	}
	return conns, nil
}

func closeAll(conns []*net.TCPConn) {
	for _, c := range conns {
		c.Close()
	}
}

func (t task) ping() (sample, error) {
	conns, err := t.dialAll(func(int) []byte { return request(wantEcho, 0) })
	defer closeAll(conns)
	if err != nil {
		return sample{}, err
	}
	message, answer := make([]byte, messageLen), make([]byte, messageLen)
	for _, c := range conns { // the whole path is there before the clock starts
		if err := exchange(c, message, answer); err != nil {
			return sample{}, err
		}
	}
	times := make(timed, t.Work.Conns)
	took, err := t.atOnce(func(i int) error {
		message, answer := make([]byte, messageLen), make([]byte, messageLen)
		for n := range t.share(int64(t.Work.Count), i) {
			binary.BigEndian.PutUint64(message, uint64(n))
			begin := time.Now()
			if err := exchange(conns[i], message, answer); err != nil {
				return err
			}
			times[i] = append(times[i], time.Since(begin))
		}
		return nil
	})
	return times.sample(took), err
}

// bulk moves bytes one way. The clock runs until the last one has arrived, as the receiver says.
func (t task) bulk() (sample, error) {
	total := int64(t.Work.Count) << 20
	conns, err := t.dialAll(func(int) []byte { return nil })
	defer closeAll(conns)
	if err != nil {
		return sample{}, err
	}
	move := fetch
	if t.Work.Kind == up {
		move = deliver
	}
	time.Sleep(settle) // every path has its far connections by then
	moved := make([]int64, t.Work.Conns)
	took, err := t.atOnce(func(i int) (err error) {
		want := t.share(total, i)
		moved[i], err = move(conns[i], want)
		if err == nil && moved[i] != want {
			err = fmt.Errorf("%d bytes arrived of %d", moved[i], want)
		}
		return err
	})
	s := sample{Seconds: took.Seconds()}
	for _, n := range moved {
		s.Bytes += n
	}
	return s, err
}

// fetch has the service send n bytes and expects nothing after them.
func fetch(c *net.TCPConn, n int64) (int64, error) {
	if _, err := c.Write(request(wantBytes, n)); err != nil {
		return 0, err
	}
	got, err := receive(c, n+1)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return got, err
}

// deliver sends n bytes and asks how many have arrived.
func deliver(c *net.TCPConn, n int64) (int64, error) {
	if _, err := c.Write(request(wantSink, n)); err != nil {
		return 0, err
	}
	if _, err := send(c, n); err != nil {
		return 0, err
	}
	got := make([]byte, 8)
	_, err := io.ReadFull(c, got)
	return int64(binary.BigEndian.Uint64(got)), err
}
