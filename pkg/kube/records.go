// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// KeyRecords is the key of the records in their ConfigMap.
	KeyRecords = "tunnel-nodes"

	// RecordsManager is the field manager by which the records are written. While another one has the key, they are not.
	RecordsManager = "edge-tunnel-controller"

	maxConfigMap  = 1 << 20               // bytes of all values, as the API server counts
	nearConfigMap = maxConfigMap * 8 / 10 // when that is said

	// A change is written at once, unless there were many before it: each is the whole text, to etcd and to everybody who watches.
	recordsBurst = 5
	recordsEvery = 2 * time.Second
	recordsLook  = time.Minute // and then it is looked whether the text is still there
)

// recordNode is what records need of a Node.
type recordNode struct {
	name  string
	addrs []netip.Addr
}

// renderRecords makes the text of at most room bytes: a line for each address, IP<TAB>NAME, sorted. Every node gets a line before any gets a
// second one. Out are the nodes that lack one for want of room.
func renderRecords(nodes []recordNode, room int) (text string, lines int, out []string) {
	slices.SortFunc(nodes, func(a, b recordNode) int { return strings.Compare(a.name, b.name) })
	var all []string
	size := 0
	fits := func(line string) bool {
		if size+len(line) > room {
			return false
		}
		size += len(line)
		all = append(all, line)
		return true
	}
	for _, further := range []bool{false, true} {
		for _, n := range nodes {
			var own []string
			for _, addr := range n.addrs {
				if addr = addr.Unmap(); recordable(addr) {
					own = append(own, addr.String()+"\t"+n.name+"\n")
				}
			}
			slices.Sort(own)
			own = slices.Compact(own)
			first := own[:min(len(own), 1)]
			if own = own[len(first):]; !further {
				own = first
			}
			for _, line := range own {
				if !fits(line) {
					out = append(out, n.name)
				}
			}
		}
	}
	slices.Sort(all)
	slices.Sort(out)
	return strings.Join(all, ""), len(all), slices.Compact(out)
}

// recordable says whether a name may lead to an address: not to the one who asks.
func recordable(addr netip.Addr) bool {
	return addr.IsValid() && addr.Zone() == "" && !addr.IsUnspecified() && !addr.IsLoopback() && !addr.IsMulticast() && !addr.IsLinkLocalUnicast()
}

// RecordsStats is a snapshot.
type RecordsStats struct {
	Records  int    // lines
	Bytes    int    // of the ConfigMap, all values
	Limit    int    // of Bytes
	LeftOut  int    // nodes that lack a line for want of room
	Writes   uint64 // that went well
	Failures uint64
	Error    string // why the records are not what they should be; empty if they are
}

// records keeps the names of all Nodes in a ConfigMap, for CoreDNS. It is made by who installs us, empty: the right to make ConfigMaps cannot
// be limited to one name.
type records struct {
	client          kubernetes.Interface
	namespace, name string
	events          *events
	log             *slog.Logger
	wake            chan struct{}
	retry           time.Duration // doubles up to recordsLook

	mu    sync.Mutex
	stats RecordsStats
	level int // how full it is: 1 nearly, 2 too full
}

func newRecords(client kubernetes.Interface, namespace, name string, e *events, log *slog.Logger) *records {
	return &records{
		client: client, namespace: namespace, name: name, events: e, log: log, retry: time.Second,
		wake: make(chan struct{}, 1), stats: RecordsStats{Limit: maxConfigMap},
	}
}

func (r *records) changed() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *records) snapshot() RecordsStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

// run writes until ctx ends. Nodes are those that should have names, or why that is not known.
func (r *records) run(ctx context.Context, nodes func() ([]recordNode, error)) {
	r.mu.Lock()
	r.stats.Error = "the nodes have not been listed yet"
	r.mu.Unlock()
	select { // that will be told
	case <-ctx.Done():
		return
	case <-r.wake:
	}
	limit := rate.NewLimiter(rate.Every(recordsEvery), recordsBurst)
	retry := r.retry
	for limit.Wait(ctx) == nil {
		select { // what is waited for is in what comes now
		case <-r.wake:
		default:
		}
		err := r.turn(ctx, nodes)
		if ctx.Err() != nil {
			return
		}
		r.note(err)
		pause := recordsLook
		if err != nil {
			pause = retry
			retry = min(2*retry, recordsLook)
		} else {
			retry = r.retry
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		case <-r.wake:
			if !sleep(ctx, settleTime) {
				return
			}
		}
	}
}

func (r *records) note(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.stats.Error
	if r.stats.Error = ""; err == nil {
		return
	}
	r.stats.Error = err.Error()
	if r.stats.Failures++; was != r.stats.Error {
		r.log.Error("names of nodes may be out of date", "configmap", r.namespace+"/"+r.name, "err", err)
	}
}

// turn writes what should be there if it is not.
func (r *records) turn(ctx context.Context, nodes func() ([]recordNode, error)) error {
	list, err := nodes()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	maps := r.client.CoreV1().ConfigMaps(r.namespace)
	there, err := maps.Get(ctx, r.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("ConfigMap %s/%s is missing: kubectl -n %[1]s create configmap %[2]s makes an empty one, which is filled", r.namespace, r.name)
	}
	if err != nil {
		return fmt.Errorf("read names of nodes: %w", err)
	}
	others := 0
	for key, value := range there.Data {
		if key != KeyRecords {
			others += len(value)
		}
	}
	for _, value := range there.BinaryData {
		others += len(value)
	}
	text, lines, out := renderRecords(list, maxConfigMap-others)
	r.full(others+len(text), out, there)
	if there.Data[KeyRecords] != text {
		want := applycorev1.ConfigMap(r.name, r.namespace).WithData(map[string]string{KeyRecords: text})
		_, err := maps.Apply(ctx, want, metav1.ApplyOptions{FieldManager: RecordsManager})
		if apierrors.IsConflict(err) {
			return fmt.Errorf("another writes the names of nodes into ConfigMap %s/%s, stop it and remove the key %s: %w", r.namespace, r.name, KeyRecords, err)
		}
		if err != nil {
			return fmt.Errorf("write names of nodes: %w", err)
		}
		r.log.Debug("names of nodes written", "configmap", r.namespace+"/"+r.name, "records", lines, "bytes", len(text))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if there.Data[KeyRecords] != text {
		r.stats.Writes++
	}
	r.stats.Records, r.stats.Bytes, r.stats.LeftOut = lines, others+len(text), len(out)
	return nil
}

// full says how full the ConfigMap is when that becomes serious.
func (r *records) full(size int, out []string, c *corev1.ConfigMap) {
	level := 0
	switch {
	case len(out) > 0:
		level = 2
	case size >= nearConfigMap:
		level = 1
	}
	r.mu.Lock()
	was := r.level
	r.level = level
	r.mu.Unlock()
	if level <= was {
		return
	}
	message := fmt.Sprintf("the names of nodes take %d KiB of the %d that a ConfigMap can have", size>>10, maxConfigMap>>10)
	reason := "RecordsNearlyFull"
	if level == 2 {
		reason = "RecordsFull"
		message += fmt.Sprintf("; %d nodes lack a name or an address for want of room, %s first", len(out), out[0])
	}
	r.log.Warn("the ConfigMap with the names of nodes fills up", "configmap", r.namespace+"/"+r.name, "detail", message)
	r.events.emit(corev1.ObjectReference{
		APIVersion: "v1", Kind: "ConfigMap", Namespace: r.namespace, Name: r.name, UID: c.UID,
	}, corev1.EventTypeWarning, reason, message)
}
