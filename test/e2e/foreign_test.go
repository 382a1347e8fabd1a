// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// Programs that nobody here wrote run in the lab's own folder, which all nodes share: package foreign prepares them there.

// command prepares one on the node.
func (h *host) command(ctx context.Context, args ...string) *netlab.Cmd {
	cmd := h.Command(ctx, args[0], args[1:]...)
	cmd.Dir = h.w.lab.Dir()
	return cmd
}

// output runs one on the node until it ends, and returns all that it wrote. The error has it too.
func (h *host) output(args ...string) (string, error) { return h.outputWithin(time.Minute, args...) }

func (h *host) outputWithin(limit time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(h.t.Context(), limit)
	defer cancel()
	out, err := h.command(ctx, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s on %s: %w: %s", strings.Join(args, " "), h.Name, err, out)
	}
	return string(out), err
}

// mustOutput is output in a test that cannot go on without.
func (h *host) mustOutput(args ...string) string {
	h.t.Helper()
	out, err := h.output(args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// startForeign starts a daemon on the node and waits until it accepts connections at its port of the address.
func (h *host) startForeign(at netip.AddrPort, args []string, err error) *netlab.Process {
	h.t.Helper()
	var p *netlab.Process
	if err == nil {
		p, err = h.StartCmd(h.command(context.Background(), args...))
	}
	if err != nil {
		h.t.Fatalf("start %s on %s: %v", args[0], h.Name, err)
	}
	eventually(h.t, patience, func() error {
		select {
		case <-p.Exited():
			h.t.Fatalf("%s on %s ended:\n%s", args[0], h.Name, p.Log())
		default:
		}
		var conn net.Conn
		conn, err := h.Dial(h.t.Context(), "tcp", at.String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
	return p
}
