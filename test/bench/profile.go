// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// profileSeconds is how long each work runs under the profiler.
const profileSeconds = 4

// profileAll does each work on edge-tunnel's path, over and over, while the daemons on it are profiled. With the suite "hop" that is the
// path with a hop.
//
//	go tool pprof -top bin/tunnel-server DIR/down-1.server.pprof
func profileAll(ctx context.Context, o options) (err error) {
	t := &stage{progress: o.progress}
	defer t.clear(&err)
	if err := os.MkdirAll(o.profile, 0o755); err != nil {
		return err
	}
	start := func() (*site, error) { return newSite(ctx, t, o.bin, nil, "--pprof") }
	if slices.Equal(o.suites, []string{"hop"}) {
		start = func() (*site, error) { return newHopSite(ctx, t, o.bin, "--pprof") }
	}
	s, err := start()
	if err != nil {
		return err
	}
	for _, w := range works(o.quick) {
		if !o.only.work(w) {
			continue
		}
		if err := s.profile(ctx, w, o.profile); err != nil {
			return fmt.Errorf("profile %s: %w", w, err)
		}
		o.say("profiled %s", w)
	}
	return nil
}

// profiled is a daemon that can be.
type profiled struct {
	name string
	node *netlab.Node
	port int // of its admin address
}

func (s *site) profile(ctx context.Context, w work, dir string) error {
	tunnel := s.paths[len(s.paths)-1]
	errs := make([]error, len(s.profiled))
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i, end := range s.profiled {
		wg.Go(func() {
			content, err := get(ctx, end.node, adminURL(end.port, fmt.Sprintf("debug/pprof/profile?seconds=%d", profileSeconds)))
			if err == nil {
				name := strings.ReplaceAll(w.String(), " ", "-") + "." + end.name + ".pprof"
				err = os.WriteFile(filepath.Join(dir, name), content, 0o644)
			}
			errs[i] = err
		})
	}
	go func() { wg.Wait(); close(done) }()
	var err error
	for err == nil {
		select {
		case <-done:
			return errors.Join(errs...)
		default:
			_, err = s.client.do(task{Work: w, Addr: tunnel.addr})
		}
	}
	<-done
	return errors.Join(append(errs, err)...)
}
