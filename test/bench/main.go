// SPDX-License-Identifier: Apache-2.0

// Command bench measures what edge-tunnel costs ("make bench") and writes docs/PERFORMANCE.md. Speed is told as a ratio to
// something measured in the same run, because the machine is never quiet and never the reader's.
//
// The suite "datapath" runs four paths side by side, each with its near and its far end in processes of their own:
//
//	direct       client ─────────────────────────────────────────────► service
//	tls          client ─► relay ── TLS connection for each one ──► relay ─► service
//	yamux        client ─► relay ── yamux defaults over one TLS ──► relay ─► service
//	edge-tunnel  client ─► kernel hook, tunnel-server ── tunnel ──► tunnel-agent ─► service
//	             └────────── node "cloud" ─────────┘  veth, bridge  └──── node "edge" ────┘
//
// The suite "hook" lets the kernel's own statistics tell what the eBPF programs cost, less what an empty program at the same
// hook costs in the same run.
//
// The suite "hop" compares two edge nodes: one whose agent has a tunnel to the client's own server, and one that is reached by another
// server.
//
// The suite "longlink" puts an emulated link between the two nodes and measures what a long way and losses leave of the speed, and
// how long a keystroke takes beside a busy transfer.
// The suite "agents" puts 10,000 simulated agents on one server: what they cost at rest, and what happens when all of them come
// back at once.
//
// Read it in this order:
//
//	main.go        flags, the way out
//	suite.go       what a run is, what is written about it
//	datapath.go    the paths' processes and the order of measuring
//	work.go        what is measured on each path
//	client.go, service.go, relay.go, mux.go    the processes, all of them this program again
//	hook.go        the hook suite; hookprobe.go is its process
//	hop.go         the suite of the hop between servers
//	longlink.go    the suite of long links; flow.go is its part of the client
//	agents.go      the suite of many agents; crowd.go makes and watches them, fleet.go and probe.go are its processes
//	page.go        docs/PERFORMANCE.md; bars.go has the goals
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// roles are the processes of a run.
func roles() netlab.Helpers {
	return netlab.Helpers{
		"client":     clientMain,
		"service":    serviceMain,
		"tls-near":   tlsNearMain,
		"tls-far":    tlsFarMain,
		"yamux-near": muxNearMain,
		"yamux-far":  muxFarMain,
		"hookprobe":  hookProbeMain,
		"fleet":      fleetMain,
		"prober":     proberMain,
	}
}

func main() {
	roles().Run()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Stdout, os.Stderr, os.Args[1:])
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case interrupted:
		fmt.Fprintln(os.Stderr, "interrupted: everything was removed, nothing was written")
		os.Exit(130)
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// options is the parsed command line.
type options struct {
	bin     string   // folder of the built programs
	out     string   // folder of the page; empty: print only
	suites  []string // names
	quick   bool
	rounds  int
	profile string // folder for CPU profiles instead of measurements
	only    filter
	progress
}

// filter leaves out works, paths and long links, for whoever works on one of them. What it leaves is printed and never written.
type filter struct{ works, paths, link string }

func (f filter) work(w work) bool {
	return f.works == "" || strings.Contains(","+f.works+",", ","+string(w.Kind)+",")
}
func (f filter) longlink(l longlink) bool { return f.link == "" || f.link == l.String() }
func (f filter) path(p string) bool {
	return f.paths == "" || strings.Contains(","+f.paths+",", ","+p+",")
}

// progress is where a run says what it is doing.
type progress struct{ w io.Writer }

func (p progress) say(format string, args ...any) { fmt.Fprintf(p.w, format+"\n", args...) }

func run(ctx context.Context, out, errOut io.Writer, args []string) error {
	o := options{progress: progress{errOut}}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(errOut)
	flags.StringVar(&o.bin, "bin", "bin", "folder of the built programs")
	flags.StringVar(&o.out, "out", "", `folder of PERFORMANCE.md and performance.json (default "docs", or with -quick none: printed only)`)
	flags.BoolVar(&o.quick, "quick", false, "few repetitions: shows that everything works, the numbers mean little")
	flags.IntVar(&o.rounds, "rounds", 0, "rounds over all paths (default 7, with -quick 1)")
	flags.StringVar(&o.profile, "profile", "", "write CPU profiles of tunnel-server and tunnel-agent for each work into this folder; measure nothing. With -suite agents: the server's, of each storm and rest, beside measuring")
	flags.StringVar(&o.only.works, "work", "", "only these works: of the data path connect, ping, down, up; of long links "+strings.Join(longKinds(), ", ")+"; nothing is written")
	flags.StringVar(&o.only.paths, "path", "", "only these paths: direct, tls, yamux, edge-tunnel; nothing is written")
	flags.StringVar(&o.only.link, "link", "", "only the long link of this name, as in the tables; nothing is written")
	suites := flags.String("suite", strings.Join(suiteNames(), ","), "suites to run")
	if err := flags.Parse(args); err != nil {
		return err
	}
	o.suites = strings.Split(*suites, ",")
	for _, name := range o.suites {
		if !slices.Contains(suiteNames(), name) {
			return fmt.Errorf("there is no suite %q; there are: %s", name, strings.Join(suiteNames(), ", "))
		}
	}
	if o.rounds == 0 {
		o.rounds = 7
		if o.quick {
			o.rounds = 1
		}
	}
	switch whole := o.only == (filter{}); {
	case !whole && o.out != "":
		return errors.New("-out needs all works and paths")
	case whole && o.out == "" && !o.quick && o.profile == "":
		o.out = "docs"
	}
	if o.rounds < 1 || flags.NArg() > 0 {
		return errors.New("-rounds has to be positive, and there are no arguments")
	}
	if os.Geteuid() != 0 {
		return errors.New("the benchmarks make network namespaces and load BPF: run them as root")
	}
	if o.profile != "" && !slices.Equal(o.suites, []string{"agents"}) {
		return profileAll(ctx, o)
	}
	return measure(ctx, out, o)
}
