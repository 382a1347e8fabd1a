// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"
)

// The probe sends so many messages on each of its connections, and makes so many new ones beside.
const (
	probeConns    = 8
	probeEvery    = 20 * time.Millisecond
	probeNewEvery = 50 * time.Millisecond
)

// lag is what a probe saw since it was last asked. A message that was due while an earlier one was still under way counts from
// when it was due.
type lag struct {
	Messages  int     `json:"messages"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
	Max       float64 `json:"max_ms"`
	Connects  int     `json:"connects"`
	ConnectPs float64 `json:"connect_p99_ms"`
	Error     string  `json:"error,omitempty"`
}

// prober keeps what the connections of a probe measure.
type prober struct {
	mu                 sync.Mutex
	messages, connects []time.Duration
	err                error
}

// proberMain watches a path: messages there and back on open connections, and new connections. Each line of standard input asks for
// what was seen since the one before.
func proberMain(args []string) int {
	p := &prober{}
	t := task{Work: work{Conns: probeConns}, Addr: args[0]}
	conns, err := t.dialAll(func(int) []byte { return request(wantEcho, 0) })
	if err != nil {
		return failRole(err)
	}
	for i, c := range conns {
		_ = c.SetDeadline(time.Time{})
		message, answer := make([]byte, messageLen), make([]byte, messageLen)
		go p.repeat(&p.messages, probeEvery, time.Duration(i)*probeEvery/probeConns, func() error { return exchange(c, message, answer) })
	}
	go p.repeat(&p.connects, probeNewEvery, 0, t.connectOnce)
	answers := json.NewEncoder(os.Stdout)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if err := answers.Encode(p.take()); err != nil {
			return failRole(err)
		}
	}
	return 0
}

// repeat does something at fixed times until it fails.
func (p *prober) repeat(into *[]time.Duration, every, offset time.Duration, do func() error) {
	for due := time.Now().Add(offset); ; due = due.Add(every) {
		time.Sleep(time.Until(due))
		err := do()
		p.mu.Lock()
		if err != nil {
			p.err = err
			p.mu.Unlock()
			return
		}
		*into = append(*into, time.Since(due))
		p.mu.Unlock()
	}
}

func (p *prober) take() lag {
	p.mu.Lock()
	defer p.mu.Unlock()
	ms := func(list []time.Duration, percent int) float64 { return micros(percentile(list, percent)) / 1e3 }
	l := lag{
		Messages: len(p.messages), P50: ms(p.messages, 50), P99: ms(p.messages, 99), Max: ms(p.messages, 100),
		Connects: len(p.connects), ConnectPs: ms(p.connects, 99),
	}
	if p.err != nil {
		l.Error = p.err.Error()
	}
	p.messages, p.connects = nil, nil
	return l
}

// visit connects to every node of a row of simulated ones and wants to be told its name.
func (t task) visit() (sample, error) {
	times := make(timed, t.Work.Conns)
	took, err := t.atOnce(func(i int) error {
		for n := i; n < t.Work.Count; n += t.Work.Conns {
			begin := time.Now()
			if err := visitOnce(n); err != nil {
				return err
			}
			times[i] = append(times[i], time.Since(begin))
		}
		return nil
	})
	return times.sample(took), err
}

func visitOnce(n int) error {
	t := task{Addr: simulatedAddr(n).String() + ":" + strconv.Itoa(tunneledPort)}
	c, err := t.dial()
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(make([]byte, messageLen)); err != nil {
		return err
	}
	answer := make([]byte, messageLen)
	if _, err := io.ReadFull(c, answer); err != nil {
		return fmt.Errorf("%s: %w", simulatedName(n), err)
	}
	if name := string(bytes.TrimRight(answer, "\x00")); name != simulatedName(n) {
		return fmt.Errorf("asked for %s, got to %s", simulatedName(n), name)
	}
	return nil
}
