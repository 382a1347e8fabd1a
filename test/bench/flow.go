// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// flowLimit leaves time for emptying the path: with losses that can be ten times what filling it took.
const flowLimit = 3 * time.Minute

// flow moves bytes one way for as long as the task says, and counts those that arrive in that time: neither a long way
// nor large buffers at its beginning help. Then it waits until the path is empty again.
func (t task) flow() (sample, error) {
	conns, err := t.dialAll(func(int) []byte { return nil })
	defer closeAll(conns)
	if err != nil {
		return sample{}, err
	}
	for _, c := range conns {
		if err := c.SetDeadline(time.Now().Add(flowLimit)); err != nil {
			return sample{}, err
		}
	}
	time.Sleep(settle)
	move := fetchFor
	if t.Work.Kind == upFor || t.Work.Kind == keysUp {
		move = deliverFor
	}
	moved := make([]int64, t.Work.Conns)
	_, err = t.atOnce(func(i int) (err error) {
		moved[i], err = move(conns[i], int64(t.Work.Count))
		return err
	})
	s := sample{Seconds: float64(t.Work.Count) / 1000}
	for _, n := range moved {
		s.Bytes += n
	}
	return s, err
}

// stalledReaders is how many do not read what they asked for, and stalledLead for how long before the flow begins.
const (
	stalledReaders = 8
	stalledLead    = 2 * time.Second
)

// besideStalled is a flow beside connections of the same path that nobody reads.
func (t task) besideStalled() (sample, error) {
	others := t
	others.Work.Conns = stalledReaders
	conns, err := others.dialAll(func(int) []byte { return request(wantFlow, flowLimit.Milliseconds()) })
	defer closeAll(conns)
	for _, c := range conns {
		err = errors.Join(err, c.SetLinger(0)) // the service is told to stop
	}
	if err != nil {
		return sample{}, err
	}
	time.Sleep(stalledLead)
	return t.flow()
}

func fetchFor(c *net.TCPConn, millis int64) (int64, error) {
	if _, err := c.Write(request(wantFlow, millis)); err != nil {
		return 0, err
	}
	return receiveFor(c, millis)
}

func deliverFor(c *net.TCPConn, millis int64) (int64, error) {
	if _, err := c.Write(request(wantFlowSink, millis)); err != nil {
		return 0, err
	}
	if err := sendFor(c, millis); err != nil {
		return 0, err
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	answer := make([]byte, 8)
	_, err := io.ReadFull(c, answer)
	return int64(binary.BigEndian.Uint64(answer)), err
}

// keyEvery is how often a key is pressed, whether or not the last one has come back: somebody who types does not wait.
const keyEvery = 20 * time.Millisecond

// keys presses keys on a connection of the path, and at the same time on one beside it, while a flow of the same path
// is going on; the first third of the flow's time is left to filling the queues.
func (t task) keys() (sample, error) {
	own, err := openKeys(t.Addr)
	if err != nil {
		return sample{}, err
	}
	defer own.Close()
	beside, err := openKeys(t.Beside)
	if err != nil {
		return sample{}, err
	}
	defer beside.Close()

	var s sample
	var flowErr, ownErr, besideErr error
	var ownTimes, besideTimes []time.Duration
	lead := time.Duration(t.Work.Count/3) * time.Millisecond
	count := int((time.Duration(t.Work.Count)*time.Millisecond - lead) / keyEvery)
	var wg sync.WaitGroup
	wg.Go(func() { s, flowErr = t.flow() })
	time.Sleep(settle + lead)
	wg.Go(func() { ownTimes, ownErr = press(own, count) })
	wg.Go(func() { besideTimes, besideErr = press(beside, count) })
	wg.Wait()
	s.Ops = len(ownTimes)
	s.P50, s.P99 = micros(percentile(ownTimes, 50)), micros(percentile(ownTimes, 99))
	s.BesideP50, s.BesideP99 = micros(percentile(besideTimes, 50)), micros(percentile(besideTimes, 99))
	return s, errors.Join(flowErr, ownErr, besideErr)
}

// openKeys has the whole path there before the clock starts.
func openKeys(addr string) (*net.TCPConn, error) {
	c, err := task{Addr: addr}.dial()
	if err != nil {
		return nil, err
	}
	if _, err = c.Write(request(wantKeys, 0)); err == nil {
		_, err = press(c, 1)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// press sends single bytes at a steady pace and returns how long each took to come back.
func press(c *net.TCPConn, count int) ([]time.Duration, error) {
	pressed := make(chan time.Time, count)
	sent := make(chan error, 1)
	go func() {
		defer close(pressed)
		for i := range count {
			if i > 0 {
				time.Sleep(keyEvery)
			}
			pressed <- time.Now()
			if _, err := c.Write([]byte{'k'}); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	var times []time.Duration
	var err error
	key := make([]byte, 1)
	for at := range pressed {
		if err == nil {
			_, err = io.ReadFull(c, key)
			times = append(times, time.Since(at))
		}
	}
	return times, errors.Join(err, <-sent)
}
