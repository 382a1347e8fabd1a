// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math"
	"net"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// LoginError is a server's refusal.
type LoginError struct {
	Status     wire.LoginStatus
	ServerID   string
	Servers    int // live ones, as the server said; 0: not known
	RetryAfter time.Duration
	Message    string
}

// Error is the text for people.
func (e *LoginError) Error() string {
	text := fmt.Sprintf("server %s refused the login: %s", e.ServerID, e.Status)
	if e.Message != "" {
		text += " (" + e.Message + ")"
	}
	return text
}

// Reason is the status as a label.
func (e *LoginError) Reason() string { return e.Status.String() }

// connectAny connects by the first way of a slot that leads in, and for a slot that looks for a further server, to one.
func (a *Agent) connectAny(ctx context.Context, sl *slot, replaces *agentTunnel, wake <-chan struct{}) (*agentTunnel, error) {
	servers := a.waysOf(sl)
	if len(servers) == 0 { // none is known yet, and the agent stops
		return nil, errNoWay
	}
	var (
		failed waysError
		next   = sl.first
		again  error // a server was found that another slot has
	)
	defer func() { sl.first = next % len(servers) }()
	for i, server := range servers {
		limit := a.time.dial
		if i < len(servers)-1 {
			limit = a.time.way
		}
		a.mu.Lock()
		sl.server = server
		a.mu.Unlock()
		t, err := a.connect(ctx, sl, limit, replaces, wake)
		if err == nil || len(servers) == 1 {
			return t, err
		}
		switch reasonOf(err, "") {
		case wire.LoginDuplicateIdentity.String(): // the same everywhere
			return nil, err
		case wire.LoginAlreadyConnected.String():
			if a.distinct() > 0 { // the next time begins behind it: the one that is found again has a handshake to pay for
				next, again = sl.first+i+1, err
			}
		}
		failed = append(failed, fmt.Errorf("%s: %w", server, err))
		select {
		case <-wake:
			return nil, failed
		case <-ctx.Done():
			return nil, failed
		default:
		}
	}
	if again != nil {
		return nil, again
	}
	return nil, failed
}

// waysError is why none of several ways led in.
type waysError []error

// Error has all of them in one line.
func (e waysError) Error() string {
	texts := make([]string, len(e))
	for i, err := range e {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

// Unwrap returns them.
func (e waysError) Unwrap() []error { return e }

// connect dials a slot's server, for no longer than limit, and logs in. It starts nothing that outlives it. A wake ends it early: the network is
// another one now, and a dial begun before would wait for answers to the old address.
func (a *Agent) connect(ctx context.Context, sl *slot, limit time.Duration, replaces *agentTunnel, wake <-chan struct{}) (*agentTunnel, error) {
	ctx, cancel := context.WithTimeout(ctx, a.time.dial+a.time.login)
	defer cancel()
	woken := make(chan struct{})
	defer func() { cancel(); <-woken }()
	go func() {
		defer close(woken)
		select {
		case <-wake:
			cancel()
		case <-ctx.Done():
		}
	}()
	a.dials.Add(1)
	conn, err := a.dial(ctx, sl.server, limit)
	if err != nil {
		return nil, err
	}
	t, err := a.login(ctx, sl, conn)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	if other := a.twin(t, replaces); other != nil {
		// The server took us for new, so it may have forgotten the other tunnel.
		other.sess.link.probe(a.time.probe)
		t.sess.kill(errReplaced)
		return nil, &LoginError{Status: wire.LoginAlreadyConnected, ServerID: t.serverID, Servers: t.servers}
	}
	return t, nil
}

func (a *Agent) dial(ctx context.Context, server string, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return a.cfg.Dial(ctx, "tcp", server)
}

// login does handshake and login on a new connection.
func (a *Agent) login(ctx context.Context, sl *slot, conn net.Conn) (*agentTunnel, error) {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(a.time.login))
	t := &agentTunnel{slot: sl, server: sl.server, drain: make(chan struct{}), stray: make(chan struct{})}
	r := newRaw(conn)
	tc := tls.Client(r, a.clientTLS(sl.server, &t.notAfter))
	if err := tc.Handshake(); err != nil {
		return nil, contextError(ctx, fmt.Errorf("TLS handshake: %w", err))
	}
	t.state = tc.ConnectionState()
	if t.state.NegotiatedProtocol != a.protocol() || len(t.state.PeerCertificates) == 0 {
		return nil, &Error{reason: "no_protocol", text: "server does not speak " + a.protocol()}
	}
	if end := t.state.PeerCertificates[0].NotAfter; t.notAfter.IsZero() || end.Before(t.notAfter) {
		t.notAfter = end
	}
	err := wire.WriteLogin(tc, wire.Login{
		MinVersion: wire.MinVersion, MaxVersion: wire.Version, Instance: a.cfg.Instance, Index: sl.index, Software: a.cfg.Software,
	})
	if err != nil {
		return nil, contextError(ctx, fmt.Errorf("send login: %w", err))
	}
	reply, err := wire.ReadLoginReply(tc)
	if err != nil {
		// In TLS 1.3 this is also where a client learns that its certificate is not welcome.
		if isAlert(err) {
			return nil, &Error{reason: "refused_by_server", text: "server refused our certificate", cause: err}
		}
		return nil, contextError(ctx, fmt.Errorf("read login reply: %w", err))
	}
	if reply.Status != wire.LoginOK {
		return nil, &LoginError{reply.Status, reply.ServerID, int(reply.Servers), reply.RetryAfter, reply.Message}
	}
	if reply.Version < wire.MinVersion || reply.Version > wire.Version {
		return nil, &Error{reason: "version_unsupported", text: "server chose a version that was not offered"}
	}
	if name := t.state.PeerCertificates[0].Subject.CommonName; a.peer && name != reply.ServerID {
		return nil, &Error{reason: "bad_name", text: fmt.Sprintf("server %s says that it is %s", name, reply.ServerID)}
	}
	if !stop() {
		return nil, ctx.Err()
	}
	_ = conn.SetDeadline(time.Time{})
	setDefault(&reply.KeepAlive, wire.KeepAlive)
	set := settings{keepAlive: max(reply.KeepAlive, 10*time.Millisecond), maxStreams: a.cfg.MaxStreams, maxWindow: a.cfg.MaxWindow, budget: a.cfg.Budget, allWindows: math.MaxInt}
	t.serverID, t.servers = reply.ServerID, int(reply.Servers)
	t.sess = newSession(tc, r, a.peer, set, &a.total, a.cfg.Log.With("server", sl.server, "remote", conn.RemoteAddr().String()))
	return t, nil
}

func (a *Agent) protocol() string {
	if a.peer {
		return wire.ALPNPeer
	}
	return wire.ALPNAgent
}

// contextError prefers the end of ctx as the explanation: it closes the connection, which is all that err tells.
func contextError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// clientTLS is the configuration for one dial. The end of the certificate that is presented goes to notAfter.
func (a *Agent) clientTLS(server string, notAfter *time.Time) *tls.Config {
	cfg := tightened(a.cfg.TLS(server))
	if cfg.ServerName == "" {
		cfg.ServerName, _, _ = net.SplitHostPort(server)
	}
	choose := cfg.GetClientCertificate
	if choose == nil {
		certs := cfg.Certificates
		choose = func(req *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			for i := range certs {
				if req.SupportsCertificate(&certs[i]) == nil {
					return &certs[i], nil
				}
			}
			return new(tls.Certificate), nil
		}
	}
	cfg.GetClientCertificate = func(req *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, err := choose(req)
		if err != nil || len(cert.Certificate) == 0 {
			return cert, err
		}
		leaf := cert.Leaf
		if leaf == nil {
			if leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
				return nil, err
			}
		}
		*notAfter = leaf.NotAfter
		return cert, nil
	}
	return cfg
}

// twin returns a live tunnel of another slot to the same server. One that drains is none: its successor has the same name.
func (a *Agent) twin(t, replaces *agentTunnel) *agentTunnel {
	a.mu.Lock()
	defer a.mu.Unlock()
	for other := range a.tunnels {
		if other != replaces && other.slot != t.slot && !other.retired && !other.draining() && other.serverID == t.serverID && other.sess.link.alive() {
			return other
		}
	}
	return nil
}
