// SPDX-License-Identifier: Apache-2.0

package route

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// Bounds of a Known. They also bound its file: the largest set that they allow is about 47 MB.
const (
	MaxNodes     = 1 << 17 // nodes
	MaxAddrs     = 1 << 18 // addresses of all nodes
	MaxNodeAddrs = 64      // addresses of one node
	maxNodeName  = 253     // bytes
)

const (
	// A change waits this long for others before the file is written: a storm of 10,000 logins costs a write a second,
	// not 10,000 of them. What a power cut may lose is as old, and comes back when the node logs in.
	saveDelay    = time.Second
	retryMin     = time.Second // after a write that failed; doubled each time
	retryMax     = time.Minute
	problemBytes = 200
)

// Known is the set of claims of every node that was ever seen, one per node: the latest. It keeps them in memory, and also in
// a file if it has a folder. Methods may be called from any goroutine.
type Known struct {
	file *claimsFile // nil: memory only
	log  *slog.Logger
	wake chan struct{} // there is something to save

	saving sync.Mutex // held while the file is written; taken before mu

	mu       sync.Mutex
	nodes    map[string][]netip.Addr // values are replaced, never changed
	addrs    int                     // of all nodes
	version  uint64                  // grows with each change
	saved    uint64                  // version that the file has
	saves    uint64
	failures uint64
	err      error // of the latest write, or of reading at the start
}

// KnownStatus is the state of a [Known].
type KnownStatus struct {
	Nodes, Addrs int
	Unsaved      bool   // the file is older than memory
	Saves        uint64 // writes of the file
	SaveFailures uint64
	// Err is what is wrong with the file: it was corrupt at the start, or the latest write failed. A later write that
	// succeeds clears it.
	Err error
}

// OpenKnown reads the claims stored in dir, which it makes if needed (mode 0700). An empty dir means memory only. Two
// processes must not use one dir at a time: take the lock that keeps a second server away first.
//
// A corrupt file is not an error: it is renamed to targets.json.corrupt-TIME, logged, reported in [Known.Status], and the set
// starts empty, because a server without memory serves more than one that does not start. A file that cannot be read at all
// is an error: nobody knows what is in it, so it must not be replaced. A nil logger discards.
func OpenKnown(dir string, log *slog.Logger) (*Known, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	k := &Known{log: log, wake: make(chan struct{}, 1), nodes: make(map[string][]netip.Addr)}
	if dir == "" {
		return k, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state folder: %w", err)
	}
	k.file = &claimsFile{dir: dir}
	claims, err := k.file.read()
	var corrupt *CorruptError
	switch {
	case errors.As(err, &corrupt):
		k.err = err
		log.Error("stored targets are unreadable and were set aside", "file", k.file.path(), "kept_as", corrupt.KeptAs, "err", err)
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("read stored targets: %w", err)
	}
	for _, c := range claims {
		k.nodes[c.Node] = c.Addrs
		k.addrs += len(c.Addrs)
	}
	return k, nil
}

// Learn replaces the node's claim with c and reports whether that changed anything. A claim that is refused, with a
// [*ClaimError], leaves the earlier one in place.
func (k *Known) Learn(c Claim) (changed bool, err error) {
	c, err = normalize(c)
	if err != nil {
		return false, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	old, known := k.nodes[c.Node]
	if known && slices.Equal(old, c.Addrs) {
		return false, nil
	}
	if !known && len(k.nodes) >= MaxNodes {
		return false, &ClaimError{c.Node, "too_many_nodes", fmt.Sprintf("%d nodes are known already", MaxNodes)}
	}
	if k.addrs-len(old)+len(c.Addrs) > MaxAddrs {
		return false, &ClaimError{c.Node, "too_many_addresses", fmt.Sprintf("all known nodes together would have more than %d", MaxAddrs)}
	}
	k.nodes[c.Node] = c.Addrs
	k.addrs += len(c.Addrs) - len(old)
	k.changed()
	return true, nil
}

// Forget drops the node's claim and reports whether there was one.
func (k *Known) Forget(node string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	old, known := k.nodes[node]
	if !known {
		return false
	}
	delete(k.nodes, node)
	k.addrs -= len(old)
	k.changed()
	return true
}

// changed notes that memory is ahead of the file; k.mu is held.
func (k *Known) changed() {
	k.version++
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Claims returns all claims, sorted by node. Their addresses are sorted and must not be changed.
func (k *Known) Claims() []Claim {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.claims()
}

// Names returns the names of all nodes, in no order.
func (k *Known) Names() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	names := make([]string, 0, len(k.nodes))
	for node := range k.nodes {
		names = append(names, node)
	}
	return names
}

func (k *Known) claims() []Claim {
	claims := make([]Claim, 0, len(k.nodes))
	for node, addrs := range k.nodes {
		claims = append(claims, Claim{node, addrs})
	}
	slices.SortFunc(claims, func(a, b Claim) int { return cmp.Compare(a.Node, b.Node) })
	return claims
}

// Status returns the present state.
func (k *Known) Status() KnownStatus {
	k.mu.Lock()
	defer k.mu.Unlock()
	return KnownStatus{
		Nodes: len(k.nodes), Addrs: k.addrs,
		Unsaved: k.file != nil && k.version != k.saved,
		Saves:   k.saves, SaveFailures: k.failures, Err: k.err,
	}
}

// Run writes changes to the file until ctx ends, then writes once more and returns that write's error. A write that fails is
// logged, shown in Status, and tried again with growing pauses; memory goes on without it.
func (k *Known) Run(ctx context.Context) error {
	retry := retryMin
	for {
		select {
		case <-ctx.Done():
			return k.Flush()
		case <-k.wake:
		}
		if !pause(ctx, saveDelay) {
			return k.Flush()
		}
		for k.Flush() != nil {
			if !pause(ctx, retry) {
				return k.Flush()
			}
			retry = min(2*retry, retryMax)
		}
		retry = retryMin
	}
}

// Flush writes the file now, if it is older than memory. When it returns nil, everything learned and forgotten before the call
// is on the disk.
func (k *Known) Flush() error {
	if k.file == nil {
		return nil
	}
	k.saving.Lock()
	defer k.saving.Unlock()

	k.mu.Lock()
	version, stale := k.version, k.version != k.saved
	var claims []Claim
	if stale {
		claims = k.claims()
	}
	k.mu.Unlock()
	if !stale {
		return nil
	}
	err := k.file.write(claims) // without k.mu: logins must not wait for a disk

	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil {
		k.failures++
		k.err = fmt.Errorf("save known targets: %w", err)
		k.log.Error("cannot save known targets; a reboot now would lose changes", "file", k.file.path(), "err", err)
		return k.err
	}
	k.saves++
	k.saved, k.err = version, nil
	return nil
}

// pause waits for d and reports whether ctx is still alive.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// ClaimError says why a claim cannot be kept.
type ClaimError struct {
	Node   string
	reason string
	detail string
}

func (e *ClaimError) Error() string {
	return fmt.Sprintf("claim of node %.*q refused: %s", problemBytes, e.Node, e.detail)
}

// Reason is bad_node_name, bad_address, too_many_addresses or too_many_nodes.
func (e *ClaimError) Reason() string { return e.reason }

// normalize returns the claim with unmapped, sorted, distinct addresses of its own. It looks at form only: what may be a
// target is decided when a table is built, by rules that can change.
func normalize(c Claim) (Claim, error) {
	if !validNode(c.Node) {
		return c, &ClaimError{c.Node, "bad_node_name", "a node's name has 1 to 253 of a-z, 0-9, '-' and '.'"}
	}
	addrs := make([]netip.Addr, 0, min(len(c.Addrs), MaxNodeAddrs))
	for _, a := range c.Addrs {
		if !a.IsValid() || a.Zone() != "" {
			return c, &ClaimError{c.Node, "bad_address", fmt.Sprintf("%q is not an address without zone", a)}
		}
		addrs = append(addrs, a.Unmap())
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	addrs = slices.Compact(addrs)
	if len(addrs) > MaxNodeAddrs {
		return c, &ClaimError{c.Node, "too_many_addresses", fmt.Sprintf("%d addresses, more than %d", len(addrs), MaxNodeAddrs)}
	}
	return Claim{c.Node, addrs}, nil
}

func validNode(name string) bool {
	if name == "" || len(name) > maxNodeName {
		return false
	}
	for i := range len(name) {
		switch b := name[i]; {
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9', b == '-', b == '.':
		default:
			return false
		}
	}
	return true
}
