// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"io"

	"github.com/hashicorp/yamux"
)

// stream is a yamux stream as its users expect it: Close ends its own direction only.
type stream struct{ *yamux.Stream }

func (s stream) CloseWrite() error { return s.Stream.Close() }

func muxConfig() *yamux.Config {
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	return config
}

// muxNearMain LISTEN TUNNEL DIR: waits for the far end's one TLS connection and opens a stream for each client.
func muxNearMain(args []string) int {
	config, err := certificates(args[2], nearName, "")
	if err != nil {
		return failRole(err)
	}
	clients, err := listen(args[0])
	if err != nil {
		return failRole(err)
	}
	tunnels, err := listen(args[1])
	if err != nil {
		return failRole(err)
	}
	ready()
	c, err := tunnels.AcceptTCP()
	if err != nil {
		return failRole(err)
	}
	session, err := yamux.Client(tls.Server(c, config), muxConfig())
	if err != nil {
		return failRole(err)
	}
	return relayAll(clients, func() (duplex, error) {
		s, err := session.OpenStream()
		return stream{s}, err
	})
}

// muxFarMain TUNNEL SERVICE DIR: dials, as agents do, and joins each stream with the service.
func muxFarMain(args []string) int {
	config, err := certificates(args[2], farName, nearName)
	if err != nil {
		return failRole(err)
	}
	conn, err := tls.Dial("tcp", args[0], config)
	if err != nil {
		return failRole(err)
	}
	session, err := yamux.Server(conn, muxConfig())
	if err != nil {
		return failRole(err)
	}
	r := newRelay()
	ready()
	for {
		s, err := session.AcceptStream()
		if err != nil {
			return failRole(err)
		}
		go func() {
			service, err := dialTCP(args[1])
			if err != nil {
				s.Close()
				return
			}
			r.join(service, stream{s})
		}()
	}
}
