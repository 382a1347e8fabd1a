// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
)

// The relays that edge-tunnel is compared with do what it cannot do without, and nothing else: mutual TLS 1.3 with the same
// certificates between the two ends, bytes both ways, each direction closed on its own. No limits, no records, no policy.

// duplex is a connection whose directions end one by one.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// relayBuffer is what io.Copy uses.
const relayBuffer = 32 << 10

type relay struct{ buffers sync.Pool }

func newRelay() *relay {
	return &relay{sync.Pool{New: func() any { return new([relayBuffer]byte) }}}
}

// join copies both ways and closes both ends.
func (r *relay) join(a, b duplex) {
	defer a.Close()
	defer b.Close()
	var wg sync.WaitGroup
	wg.Go(func() { r.copy(a, b) })
	r.copy(b, a)
	wg.Wait()
}

func (r *relay) copy(to, from duplex) {
	buf := r.buffers.Get().(*[relayBuffer]byte)
	defer r.buffers.Put(buf)
	for {
		n, err := from.Read(buf[:])
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				from.Close()
				return
			}
		}
		if err != nil {
			_ = to.CloseWrite()
			return
		}
	}
}

// certificates are those of the run, see newSite: every relay has its own and asks for the other's.
func certificates(dir, name, peer string) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"))
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, errors.New("no certificate in ca.crt")
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert}, RootCAs: pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		ServerName: peer, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
	}, nil
}

// tlsNearMain LISTEN FAR DIR: one TLS connection to the far end for each client.
func tlsNearMain(args []string) int {
	config, err := certificates(args[2], nearName, farName)
	if err != nil {
		return failRole(err)
	}
	ln, err := listen(args[0])
	if err != nil {
		return failRole(err)
	}
	ready()
	return relayAll(ln, func() (duplex, error) { return tls.Dial("tcp", args[1], config) })
}

// tlsFarMain LISTEN SERVICE DIR: its end. tls.Listener is not used, its handshake would hold up other clients.
func tlsFarMain(args []string) int {
	config, err := certificates(args[2], farName, "")
	if err != nil {
		return failRole(err)
	}
	ln, err := listen(args[0])
	if err != nil {
		return failRole(err)
	}
	r := newRelay()
	ready()
	return failRole(acceptAll(ln, func(c *net.TCPConn) {
		near := tls.Server(c, config)
		if err := near.Handshake(); err != nil {
			c.Close()
			return
		}
		service, err := dialTCP(args[1])
		if err != nil {
			near.Close()
			return
		}
		r.join(near, service)
	}))
}

// relayAll joins every connection to a listener with what open opens.
func relayAll(ln *net.TCPListener, open func() (duplex, error)) int {
	r := newRelay()
	return failRole(acceptAll(ln, func(c *net.TCPConn) {
		far, err := open()
		if err != nil {
			_ = c.SetLinger(0)
			c.Close()
			return
		}
		r.join(c, far)
	}))
}

func dialTCP(addr string) (*net.TCPConn, error) {
	tcp, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, err
	}
	return net.DialTCP("tcp", nil, tcp)
}
