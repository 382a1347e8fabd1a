// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

var _ guardKernel = (*redirect.Kernel)(nil)

// hooksFake is a kernel as the guard sees it.
type hooksFake struct {
	health, attach   error
	programs         []redirect.HookProgram
	moves            bool // Attach puts ours last
	canary           redirect.CanaryResult
	attached, chirps int
	counters         redirect.Counters
	unreadable       error
}

func (f *hooksFake) Health() error                                { return f.health }
func (f *hooksFake) Stats() (redirect.Counters, error)            { return f.counters, f.unreadable }
func (f *hooksFake) Canary(context.Context) redirect.CanaryResult { f.chirps++; return f.canary }

func (f *hooksFake) Programs() ([]redirect.HookProgram, error) {
	return f.programs, f.unreadable
}

func (f *hooksFake) Attach() error {
	f.attached++
	if f.attach == nil {
		f.health = nil
	}
	if f.moves {
		f.programs = oursOn("connect4", "connect6")
	}
	return f.attach
}

func oursOn(hooks ...string) []redirect.HookProgram {
	var list []redirect.HookProgram
	for _, h := range hooks {
		list = append(list, redirect.HookProgram{Hook: h, Ours: true})
	}
	return list
}

func TestOurTurnIsLast(t *testing.T) {
	other := func(hook string) redirect.HookProgram { return redirect.HookProgram{Hook: hook} }
	ours := func(hook string) redirect.HookProgram { return redirect.HookProgram{Hook: hook, Ours: true} }
	for _, c := range []struct {
		what     string
		programs []redirect.HookProgram
		want     bool
	}{
		{"nothing is known", nil, true},
		{"alone", oursOn("connect4", "connect6"), true},
		{"others before", []redirect.HookProgram{other("connect4"), ours("connect4"), other("connect6"), other("connect6"), ours("connect6")}, true},
		{"another after on connect4", []redirect.HookProgram{ours("connect4"), other("connect4"), ours("connect6")}, false},
		{"another after on connect6", []redirect.HookProgram{ours("connect4"), other("connect6"), ours("connect6"), other("connect6")}, false},
		{"others elsewhere do not matter", []redirect.HookProgram{ours("connect4"), ours("connect6"), ours("bind4"), other("bind4"), other("sock_ops")}, true},
	} {
		if got := ourTurnIsLast(c.programs); got != c.want {
			t.Errorf("%s: %t", c.what, got)
		}
	}
}

func TestGuardIsContent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &hooksFake{programs: oursOn("connect4", "connect6")}
		g := &guard{kernel: f, log: silent}
		if err := g.state().canary(); err == nil || err.Error() != "not tested yet" {
			t.Errorf("before the first look: %v", err)
		}
		g.look(t.Context(), true)
		ctx, cancel := context.WithTimeout(t.Context(), 6*guardInterval+time.Second)
		defer cancel()
		must(t, g.run(ctx))
		s := g.state()
		if s.hooks != nil || s.canary() != nil || s.pods != nil || s.reattached != 0 || f.attached != 0 || len(s.programs) != 2 {
			t.Errorf("%+v after %d attachments", s, f.attached)
		}
		if f.chirps != 3 { // the first look, and each third one after it
			t.Errorf("%d canaries in six looks", f.chirps)
		}
	})
}

func TestGuardRepairs(t *testing.T) {
	f := &hooksFake{health: errors.New("connect4: detached"), programs: oursOn("connect4", "connect6")}
	g := &guard{kernel: f, log: silent}
	g.look(t.Context(), false)
	if s := g.state(); s.hooks != nil || s.reattached != 1 || f.chirps != 1 {
		t.Errorf("%+v, %d canaries: a repair is to be proven", s, f.chirps)
	}

	f.health, f.attach = errors.New("connect4: detached"), errors.New("no such cgroup")
	g.look(t.Context(), false)
	g.look(t.Context(), false)
	if s := g.state(); s.hooks == nil || !strings.Contains(s.hooks.Error(), "no such cgroup") || s.reattached != 1 || f.attached != 3 {
		t.Errorf("%+v after %d attachments: it is to be tried again and again, and not counted", s, f.attached)
	}
	f.attach = nil
	g.look(t.Context(), false)
	if s := g.state(); s.hooks != nil || s.reattached != 2 {
		t.Errorf("%+v", s)
	}
}

func TestGuardMovesBehindOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := []redirect.HookProgram{{Hook: "connect4", Ours: true}, {Hook: "connect4"}}
		f := &hooksFake{programs: before, moves: true}
		g := &guard{kernel: f, log: silent}
		g.look(t.Context(), false)
		if s := g.state(); f.attached != 1 || s.reattached != 1 || !ourTurnIsLast(s.programs) {
			t.Errorf("%+v after %d attachments", s, f.attached)
		}
		// Somebody else wants to be last, too: no fight.
		f.programs = before
		g.look(t.Context(), false)
		if f.attached != 1 {
			t.Error("attached again at once")
		}
		time.Sleep(reorderPause + time.Second)
		g.look(t.Context(), false)
		if f.attached != 2 {
			t.Error("not attached again after a pause")
		}
	})
}

// What is attached again and does not work may be in want of listeners: until a canary arrives, and not otherwise.
func TestGuardReopensListeners(t *testing.T) {
	f := &hooksFake{canary: redirect.CanaryResult{IPv4: errors.New("did not arrive")}}
	reopened, mended := 0, 2
	g := &guard{kernel: f, log: silent, reopen: func(context.Context) {
		if reopened++; reopened == mended {
			f.canary = redirect.CanaryResult{}
		}
	}}
	g.look(t.Context(), true)
	if reopened != 0 {
		t.Error("opened anew though nothing was attached again")
	}
	f.health = errors.New("connect4: the link is on another cgroup")
	g.look(t.Context(), false)
	if err := g.state().canary(); reopened != 1 || err == nil {
		t.Errorf("opened anew %d times, canary: %v", reopened, err)
	}
	g.look(t.Context(), false)
	if err := g.state().canary(); reopened != 2 || err != nil {
		t.Errorf("opened anew %d times, canary: %v", reopened, err)
	}
	f.canary = redirect.CanaryResult{IPv4: errors.New("did not arrive")}
	g.look(t.Context(), true)
	if reopened != 2 {
		t.Error("opened anew after the repair was proven")
	}
}

func TestGuardCanary(t *testing.T) {
	f := &hooksFake{canary: redirect.CanaryResult{IPv6: errors.New("did not arrive")}}
	g := &guard{kernel: f, log: silent}
	g.look(t.Context(), true)
	if err := g.state().canary(); err == nil || err.Error() != "did not arrive" {
		t.Errorf("%v", err)
	}
	f.canary = redirect.CanaryResult{}
	g.look(t.Context(), false) // after a failure, each look tests
	if err := g.state().canary(); err != nil || f.chirps != 2 {
		t.Errorf("%v after %d canaries", err, f.chirps)
	}
	g.look(t.Context(), false)
	if f.chirps != 2 {
		t.Error("a canary without need")
	}

	f.canary = redirect.CanaryResult{IPv4: context.Canceled}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	g.look(ctx, true)
	if err := g.state().canary(); err != nil {
		t.Errorf("a canary that was cancelled counts: %v", err)
	}
}

func TestGuardWatchesPods(t *testing.T) {
	f := &hooksFake{}
	g := &guard{kernel: f, log: silent}
	g.look(t.Context(), false)
	f.counters.RedirectedPod4 = podSilence
	g.look(t.Context(), false)
	if err := g.state().pods; err == nil {
		t.Error("nothing noticed")
	}
	f.unreadable = errors.New("no")
	g.look(t.Context(), false)
	if err := g.state().pods; err == nil {
		t.Error("what cannot be read is not well")
	}
	f.unreadable, f.counters.AcceptedPod = nil, 1
	g.look(t.Context(), false)
	if err := g.state().pods; err != nil {
		t.Error(err)
	}
}

type ephemeral struct {
	ports []uint16
	err   error
}

func (e ephemeral) EphemeralPorts() ([]uint16, error) { return e.ports, e.err }

func TestWarnsOfEphemeralPorts(t *testing.T) {
	for want, kernel := range map[string]ephemeral{
		"":                           {},
		"reserved_ports=10271-10277": {ports: []uint16{10271, 10277}},
		"closed":                     {err: errors.New("closed")},
	} {
		var text strings.Builder
		warnOfEphemeralPorts(kernel, slog.New(slog.NewTextHandler(&text, nil)))
		if got := text.String(); !strings.Contains(got, want) || (got == "") != (want == "") {
			t.Errorf("%+v: %s", kernel, got)
		}
	}
}
