// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// A Kernel is this process's hold on the programs and maps. See the package's comment for its life.
type Kernel struct {
	opts  Options
	log   *slog.Logger
	pins  pins
	lock  *os.File
	spec  *ebpf.CollectionSpec
	netns atomic.Uint64 // cookie of the host's namespace; 0 if nobody has learnt it yet

	// Set by Open and constant: the records of sockets, and the verdicts. Neither waits for mu, which a long list of targets holds
	// for a while.
	sockets, counters *ebpf.Map
	// The pinned map of records that Attach will replace, or nil: until then the former programs guard the redirect ports, and have to
	// know the listeners. formerMap stays open until Close, because somebody may be using it when former is reset.
	former    atomic.Pointer[ebpf.Map]
	formerMap *ebpf.Map

	marking sync.RWMutex // held while a socket is marked: dials may go on when Close has begun
	gone    bool         // needs marking

	mu       sync.Mutex // guards everything below, and the maps' contents
	maps     map[string]*ebpf.Map
	programs map[string]*ebpf.Program
	unpinned map[string]bool      // maps that are new and not in force before Attach
	links    map[string]link.Link // by hook; empty before Attach
	first    bool                 // nothing was attached at Open, nor has Attach succeeded: what it does can be taken back, whole
	learn    bool                 // the kernel cannot tell the cookie of the host's namespace: Attach finds out
	config   kernelConfig
	inForce  bool // config is in the map; before Attach the map has a predecessor's, which its programs follow
	targets  map[netip.Addr]Target
	filter   filter // empty if it is not known what the maps hold
	ports    map[uint16]struct{}
	optOuts  map[uint64]struct{}
	closed   bool

	canary canary
}

// Open takes hold of the kernel's state: it waits until no other process has it, loads the programs, and opens the pinned maps or makes
// new ones. Nothing gets attached, and nothing that is attached changes. Errors carry a hint.
func Open(ctx context.Context, opts Options) (_ *Kernel, err error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	opts = opts.withDefaults()
	k := &Kernel{
		opts:     opts,
		log:      opts.Log,
		pins:     pins{opts.BPFFS},
		unpinned: map[string]bool{},
		links:    map[string]link.Link{},
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.Close())
		}
	}()

	if err := k.pins.check(); err != nil {
		return nil, err
	}
	k.lock, err = k.pins.lock(ctx, func() {
		k.log.Info("Waiting for another tunnel-server to give up the pinned programs", "path", k.pins.root())
		opts.OnWait(k.pins.root())
	})
	if err != nil {
		return nil, err
	}
	if err := k.pins.make(); err != nil {
		return nil, err
	}
	if err := k.pins.clearStaging(); err != nil {
		return nil, err
	}
	k.first = k.pins.noLinks()
	if err := k.load(); err != nil {
		return nil, err
	}
	if err := k.readContents(); err != nil {
		return nil, err
	}
	if err := k.initConfig(); err != nil {
		return nil, err
	}
	return k, nil
}

// Close lets go of the kernel's state for the next process. Nothing is detached or unpinned; if nothing was pinned, because
// Attach was never called or failed at the first start, no folder stays either.
func (k *Kernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil
	}
	k.closed = true
	k.marking.Lock()
	k.gone = true
	k.marking.Unlock()
	var all []error
	for _, l := range k.links {
		all = append(all, l.Close())
	}
	for _, p := range k.programs {
		all = append(all, p.Close())
	}
	for _, m := range k.maps {
		all = append(all, m.Close())
	}
	if k.formerMap != nil {
		all = append(all, k.formerMap.Close())
	}
	if k.lock != nil {
		all = append(all, k.pins.tidy(), k.lock.Close())
	}
	return errors.Join(all...)
}
