// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
)

// Metrics are read, and connections accepted, while a long list of targets is written and the map replaced; neither waits. The race
// detector judges.
func TestReadersBesideGrowth(t *testing.T) {
	l := newLab(t)
	k, _ := l.ready(func(o *Options) { o.Capacity = 8 })
	stop := make(chan struct{})
	var readers sync.WaitGroup
	readers.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := k.Stats(); err != nil {
					t.Error(err)
				}
			}
		}
	})
	list := []Target{{edge4, "edge-1", Online}}
	for i := range 200 {
		list = append(list, Target{netip.AddrFrom4([4]byte{10, 99, 1, byte(i)}), fmt.Sprint("edge-", i), Offline})
		must(t, k.SetTargets(list))
		if i%20 == 0 {
			if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
				t.Errorf("the server saw %q (%v)", got, err)
			}
		}
	}
	close(stop)
	readers.Wait()
}
