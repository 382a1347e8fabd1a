// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube/servercfg"
)

// loopback knows for which ports loopback is dialed: those that the ConfigMap says, which a kubelet has put into a folder, or else those of
// the flags. The other keys are the servers' business, and so is what is wrong with them.
//
// The one small file is read every few seconds. Watching the folder would show a kubelet's change no sooner than it comes, which takes up to
// a minute, and would still need this for when it is another folder, or none.
type loopback struct {
	flags []uint16
	dir   string // empty: only flags
	every time.Duration
	log   *slog.Logger

	inForce atomic.Pointer[[]uint16] // sorted

	mu     sync.Mutex // guards what follows
	text   string     // that config was made of
	exists bool
	absent bool // by the latest look, which another one has to confirm
	config servercfg.Config
	err    error
	since  time.Time // of err
}

const maxConfigMap = 1 << 20 // bytes, says Kubernetes

// newLoopback looks once, so that no connection is judged before the ports are known.
func newLoopback(flags []uint16, dir string, log *slog.Logger) *loopback {
	l := &loopback{flags: flags, dir: dir, every: 2 * time.Second, log: log}
	l.inForce.Store(&flags)
	if dir != "" {
		l.look()
	}
	return l
}

// has reports whether loopback is dialed for a port now.
func (l *loopback) has(port uint16) bool { return slices.Contains(*l.inForce.Load(), port) }

func (l *loopback) ports() []uint16 { return *l.inForce.Load() }

// run looks until ctx ends.
func (l *loopback) run(ctx context.Context) {
	if l.dir == "" {
		return
	}
	tick := time.NewTicker(l.every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		l.look()
	}
}

// read returns what the key says, or fs.ErrNotExist if the folder is there and the key is not.
func (l *loopback) read() (string, error) {
	f, err := os.Open(filepath.Join(l.dir, servercfg.KeyLocalhost))
	if err != nil {
		if _, missing := os.Stat(l.dir); missing != nil {
			return "", fmt.Errorf("read ConfigMap: %w", errors.New(missing.Error())) // not as an absent key
		}
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxConfigMap+1))
	if err == nil && len(text) > maxConfigMap {
		err = fmt.Errorf("read ConfigMap: more than %d bytes", maxConfigMap)
	}
	return string(text), err
}

// look puts into force what the ConfigMap says, if that is new.
func (l *loopback) look() {
	text, err := l.read()
	exists := err == nil
	l.mu.Lock()
	defer l.mu.Unlock()
	absent := l.absent
	l.absent = errors.Is(err, fs.ErrNotExist)
	if l.absent {
		if l.exists && !absent {
			return // it may be on its way, to replace it
		}
		err = nil
	}
	if err != nil {
		if l.err == nil {
			l.since = time.Now()
			l.log.Warn("the ConfigMap cannot be read, the ports of before stay", "dir", l.dir, "err", err)
		}
		l.err = err
		return
	}
	if l.err != nil {
		l.log.Info("the ConfigMap can be read again", "dir", l.dir)
	}
	l.err, l.since = nil, time.Time{}
	if exists == l.exists && text == l.text {
		return
	}
	var data map[string]string
	if exists {
		data = map[string]string{servercfg.KeyLocalhost: text}
	}
	l.exists, l.text, l.config = exists, text, servercfg.Parse(data, nil)
	for _, p := range l.config.Problems {
		l.log.Warn("an entry of the ConfigMap does not count", "dir", l.dir, "key", p.Key, "entry", p.Entry, "what", p.Text)
	}
	if l.config.More > 0 {
		l.log.Warn("more entries of the ConfigMap do not count", "dir", l.dir, "number", l.config.More)
	}
	if !l.config.Usable() {
		l.log.Error("nothing in the ConfigMap is understood, the ports of before stay", "dir", l.dir)
		return
	}
	ports := l.config.Localhost
	if len(ports) == 0 {
		ports = l.flags
	}
	l.inForce.Store(&ports)
	l.log.Info("loopback is dialed for the ports of the ConfigMap", "dir", l.dir, "says", exists, "ports", ports)
}

func (l *loopback) view() *admin.LocalhostConfig {
	if l.dir == "" {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	v := &admin.LocalhostConfig{Dir: l.dir, Exists: l.exists, Kept: !l.config.Usable(), Since: l.since}
	if l.err != nil {
		v.Error = l.err.Error()
	}
	for _, p := range l.config.Problems {
		v.Problems = append(v.Problems, p.String())
	}
	if l.config.More > 0 {
		v.Problems = append(v.Problems, fmt.Sprintf("and %d more", l.config.More))
	}
	return v
}

// metrics name each entry that is wrong. There are few: the parser bounds them.
func (l *loopback) metrics() []admin.Metric {
	if l.dir == "" {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	stale, kept := 0.0, 0
	if l.err != nil {
		stale = time.Since(l.since).Seconds()
	}
	if !l.config.Usable() {
		kept = 1
	}
	bad := admin.Metric{Name: "edge_tunnel_agent_config_bad_entries", Kind: admin.KindGauge, Labels: []string{"key", "entry"},
		Help: "Entries of the ConfigMap that do not count."}
	seen := make(map[[2]string]bool)
	for _, p := range l.config.Problems {
		if labels := [2]string{p.Key, p.Entry}; !seen[labels] {
			seen[labels] = true
			bad.Samples = append(bad.Samples, admin.Sample{Labels: labels[:], Value: 1})
		}
	}
	return []admin.Metric{
		admin.Gauge("edge_tunnel_agent_config_stale_seconds", "Time since when the ConfigMap cannot be read; 0 while it can.", stale),
		admin.Gauge("edge_tunnel_agent_config_kept", "1 while nothing in the ConfigMap is understood, so that the ports of before stay in force.", kept),
		bad,
	}
}
