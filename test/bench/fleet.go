// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Simulated nodes are numbered from 0; their addresses follow each other and are nobody's.
var simulatedBase = netip.MustParseAddr("10.128.0.1")

func simulatedName(i int) string { return fmt.Sprintf("sim-%05d", i) }

func simulatedAddr(i int) netip.Addr {
	b := simulatedBase.As4()
	n := i + int(b[3]) + int(b[2])<<8 + int(b[1])<<16
	return netip.AddrFrom4([4]byte{b[0], byte(n >> 16), byte(n >> 8), byte(n)})
}

// fleet is what one process is told to be: that many agents, each with a certificate, a login and an address of its own. Certificates
// are made in memory with the key of the small CA.
type fleet struct {
	Server string `json:"server"`
	Dir    string `json:"dir"` // of the CA
	First  int    `json:"first"`
	Count  int    `json:"count"`
}

// order is what a fleet is told to do, as a line of JSON, and muster what it answers.
type order struct {
	Do    string    `json:"do"`    // start; cut: all connections break; await: until all are logged in
	Since time.Time `json:"since"` // of await: logins from then on count
}

type muster struct {
	At       time.Time `json:"at"` // when it was begun
	Seconds  []float64 `json:"seconds"`
	Dials    uint64    `json:"dials"`    // since the start
	Failures uint64    `json:"failures"` // of these; not those that found a server the agent has a tunnel to
	Error    string    `json:"error"`
}

// awaitLimit is how long a fleet waits for its agents.
const awaitLimit = 3 * time.Minute

// fleetMain runs agents until its input ends. They are pkg/tunnel's, with the settings of tunnel-agent; only what is behind them is
// missing: they answer with their names.
func fleetMain(args []string) int {
	var f fleet
	if err := json.Unmarshal([]byte(args[0]), &f); err != nil {
		return failRole(err)
	}
	agents, err := f.recruit()
	if err := errors.Join(err, yield()); err != nil {
		return failRole(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	orders, answers := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var o order
		switch err := orders.Decode(&o); {
		case errors.Is(err, io.EOF):
			return 0
		case err != nil:
			return failRole(err)
		}
		m := muster{At: time.Now()}
		switch o.Do {
		case "start":
			for _, a := range agents {
				wg.Go(func() { _ = a.agent.Run(ctx) })
			}
		case "cut":
			for _, a := range agents {
				a.cut()
			}
		case "await":
			m.await(agents, o.Since)
		}
		if err := answers.Encode(m); err != nil {
			return failRole(err)
		}
	}
}

// yield gives all threads of this process the lowest priority: elsewhere the agents do not share the server's cores. Threads made later
// have that of the one that makes them.
func yield() error {
	tasks, err := os.ReadDir("/proc/self/task")
	for _, task := range tasks {
		id, convErr := strconv.Atoi(task.Name())
		err = errors.Join(err, convErr, unix.Setpriority(unix.PRIO_PROCESS, id, 19))
	}
	return err
}

// await waits until every agent has a tunnel that is newer than since, and notes how long each took.
func (m *muster) await(agents []*simulated, since time.Time) {
	missing := agents
	for end := time.Now().Add(awaitLimit); len(missing) > 0; {
		var still []*simulated
		var last error
		for _, a := range missing {
			took, err := a.back(since)
			if took > 0 {
				m.Seconds = append(m.Seconds, took.Seconds())
				continue
			}
			still = append(still, a)
			if err != nil {
				last = err
			}
		}
		if missing = still; time.Now().After(end) {
			m.Error = fmt.Sprintf("%d of %d agents are not back after %v; the last error of one: %v", len(missing), len(agents), awaitLimit, last)
			break
		}
		time.Sleep(50 * time.Millisecond) // logins have their own time, so this does not show
	}
	for _, a := range agents {
		s := a.agent.Stats()
		m.Dials += s.Dials
		m.Failures += s.Failures
	}
}

// simulated is one agent.
type simulated struct {
	name  string
	addr  netip.Addr
	agent *tunnel.Agent

	mu    sync.Mutex
	conns []net.Conn // the latest ones
}

// recruit makes the agents, each with a certificate.
func (f fleet) recruit() ([]*simulated, error) {
	ca, err := tls.LoadX509KeyPair(filepath.Join(f.Dir, "ca.crt"), filepath.Join(f.Dir, "ca.key"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Leaf)
	agents := make([]*simulated, f.Count)
	var group errgroup.Group
	group.SetLimit(8)
	for i := range agents {
		group.Go(func() error {
			a := &simulated{name: simulatedName(f.First + i), addr: simulatedAddr(f.First + i)}
			cert, err := a.certificate(ca)
			if err != nil {
				return err
			}
			cfg := &tls.Config{
				MinVersion: tls.VersionTLS13, NextProtos: []string{wire.ALPNAgent}, RootCAs: roots, Certificates: []tls.Certificate{cert},
			}
			a.agent, err = tunnel.NewAgent(tunnel.AgentConfig{
				Servers: []string{f.Server}, TLS: func(string) *tls.Config { return cfg }, Dial: a.dial, Handle: a.handle, Software: "bench",
			})
			agents[i] = a
			return err
		})
	}
	return agents, group.Wait()
}

func (a *simulated) certificate(ca tls.Certificate) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: a.name, Organization: []string{string(identity.RoleAgent)}},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{a.addr.AsSlice()}, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca.Leaf, key.Public(), ca.PrivateKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err = x509.ParseCertificate(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
}

func (a *simulated) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var dialer net.Dialer
	dialer.SetMultipathTCP(false)
	c, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	// One for the tunnel, and some for the search for further servers.
	a.conns = append(a.conns[max(0, len(a.conns)-7):], c)
	return c, nil
}

// cut breaks the connections, as a router that lost its table does.
func (a *simulated) cut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
	a.conns = nil
}

// back says how long after since the agent has logged in; 0 and the latest error if it has not.
func (a *simulated) back(since time.Time) (time.Duration, error) {
	var last error
	for _, t := range a.agent.Tunnels() {
		if t.ServerID != "" && t.Since.After(since) {
			return t.Since.Sub(since), nil
		}
		if t.LastError != nil {
			last = t.LastError
		}
	}
	return 0, last
}

// handle answers the message of a visitor with the name. A stream for another node's address is reset, so that the visitor notices.
func (a *simulated) handle(_ context.Context, s *tunnel.Stream, h wire.Header) {
	message := make([]byte, messageLen)
	if h.Dst.Addr() != a.addr || wire.WriteReply(s, wire.Reply{Status: wire.StatusOK}) != nil {
		_ = s.Reset()
		return
	}
	if _, err := io.ReadFull(s, message); err != nil {
		return
	}
	clear(message)
	copy(message, a.name)
	_, _ = s.Write(message)
	_, _ = s.Read(message) // the visitor closes first
}
