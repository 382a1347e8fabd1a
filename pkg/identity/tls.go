// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/tls"
	"errors"
	"maps"
	"slices"
)

// ServerTLS returns the configuration for accepting connections: TLS 1.3, a client certificate of the role that protocols
// gives for the agreed ALPN protocol. HandshakeContext fails with a *Refusal if the client is not to be believed; clients that
// offer other protocols only are refused by crypto/tls itself. The client learns no reason beyond the alert, and in TLS 1.3 it
// learns it with its first read, after its own handshake has succeeded.
func (s *Store) ServerTLS(protocols map[string]Role) *tls.Config {
	protocols = maps.Clone(protocols)
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		MaxVersion:             tls.VersionTLS13,
		Time:                   s.now,
		NextProtos:             slices.Sorted(maps.Keys(protocols)),
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.Leaf() },
		// Requested only: crypto/tls would refuse a missing or bad certificate with an error without a reason.
		// VerifyConnection runs in every handshake and does require one.
		ClientAuth: tls.RequestClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			want, ok := protocols[cs.NegotiatedProtocol]
			if !ok {
				// A client that offers no protocol at all gets this far.
				return &Refusal{reason: ReasonBadProtocol, detail: "the client offers no application protocol"}
			}
			return s.verifyRole(cs, want)
		},
	}
}

// Leaf returns the present certificate, or an error while there is none.
func (s *Store) Leaf() (*tls.Certificate, error) {
	if leaf := s.state.Load().leaf; leaf != nil {
		return leaf, nil
	}
	return nil, errNoLeaf
}

// ClientTLS returns the configuration for dialing a server: TLS 1.3, one ALPN protocol, a certificate of RoleServer that names
// host (a DNS name or an IP address, without port). HandshakeContext fails with a *Refusal if the server is not to be believed.
func (s *Store) ClientTLS(host, protocol string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		MaxVersion:             tls.VersionTLS13,
		Time:                   s.now,
		NextProtos:             []string{protocol},
		SessionTicketsDisabled: true,
		ServerName:             host,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if leaf := s.state.Load().leaf; leaf != nil {
				return leaf, nil
			}
			return nil, errNoLeaf
		},
		// Not less verification but ours in place of the built-in one, which would use the bundle of the moment in which this
		// configuration was made, and whose errors have no reason. VerifyConnection runs in every handshake.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.NegotiatedProtocol != protocol {
				return &Refusal{reason: ReasonBadProtocol, detail: "the server did not agree on an application protocol"}
			}
			if err := s.verifyRole(cs, RoleServer); err != nil {
				return err
			}
			leaf := cs.PeerCertificates[0]
			if err := leaf.VerifyHostname(host); err != nil {
				return refuse(leaf, ReasonWrongHost, "%.300v", err)
			}
			return nil
		},
	}
}

// errNoLeaf can only happen with Options.Late.
var errNoLeaf = errors.New("there is no certificate yet to present")

func (s *Store) verifyRole(cs tls.ConnectionState, want Role) error {
	p, err := s.Peer(cs)
	if err != nil {
		return err
	}
	if p.Role != want {
		return refuse(cs.PeerCertificates[0], ReasonWrongRole, "its role is %q, protocol %q asks for %q", p.Role, cs.NegotiatedProtocol, want)
	}
	return nil
}
