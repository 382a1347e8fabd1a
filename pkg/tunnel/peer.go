// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// peerHeader is how long a peer may take for the header of a stream, and between two lists of names.
const peerHeader = 10 * time.Second

func (s *Server) counters(peer bool) *counters {
	if peer {
		return &s.peer
	}
	return &s.total
}

// servePeer serves the streams of another server until its connection is dead and all of them have ended.
func (s *Server) servePeer(ctx context.Context, t *serverTunnel) {
	var wg sync.WaitGroup
	t.sess.run(func() {
		for {
			st, err := t.sess.accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer st.Close()
				s.servePeerStream(ctx, t, st)
			})
		}
	})
	wg.Wait()
}

func (s *Server) servePeerStream(ctx context.Context, t *serverTunnel, st *Stream) {
	_ = st.SetReadDeadline(time.Now().Add(peerHeader))
	h, err := wire.ReadHeader(st)
	var bad *wire.Error
	switch {
	case errors.As(err, &bad):
		_ = wire.WriteReply(st, wire.Reply{Status: wire.StatusBadRequest, Message: bad.Error()})
	case err != nil:
		_ = st.Reset()
	case h.Kind == wire.KindQuery:
		if s.answer(st) != nil {
			_ = st.Reset()
		}
	case h.Kind != wire.KindConnect || h.Node == "":
		_ = wire.WriteReply(st, wire.Reply{Status: wire.StatusBadRequest, Message: "no node is named"})
	default:
		_ = st.SetReadDeadline(time.Time{})
		s.cfg.Forward(ctx, t.id.Name, st, h)
	}
}

// answer answers lists of names until the peer has no more.
func (s *Server) answer(st *Stream) error {
	for {
		_ = st.SetDeadline(time.Now().Add(peerHeader))
		asked, err := wire.ReadNames(st)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		s.questions.Add(1)
		var owned wire.Names
		for _, node := range asked {
			if t := s.reg.pick(node); t != nil && t.sess.link.alive() && !s.drained.Load() {
				owned = append(owned, node)
			}
		}
		if err := wire.WriteNames(st, owned); err != nil {
			return err
		}
	}
}
