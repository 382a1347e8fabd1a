// SPDX-License-Identifier: Apache-2.0

// Package identity decides who is at the other end of a TLS connection, and who we are.
//
// # Who is who
//
// A certificate names one agent or one server. The common name is the node's or the server's name (an RFC 1123
// subdomain, at most 253 bytes), the organization is its [Role], the extended key usages are what that role needs (agents:
// clientAuth; servers: serverAuth and clientAuth, as they also dial each other), and the IP names are its addresses. Keys are
// ECDSA P-256; certificate authorities may use any kind of key.
//
// # Store
//
// A [Store] holds what one process presents (certificate and key) and what it believes (CA bundle, deny file, clock).
// [Open] loads all of it or fails. [Store.Run] looks at the files every few seconds until its context ends; [Store.Reload]
// looks now. There are three file sets, the CA bundle, the leaf (certificate with key) and the deny file. Each is replaced as a
// whole or not at all: a set that cannot be loaded keeps its last good state and is reported, and does not hold up the
// others, because an entry in the deny file must take effect even while a renewed key is half-written.
//
// The TLS configurations from [Store.ServerTLS] and [Store.ClientTLS] look at the present state in each handshake, so they
// may be kept. [Store.Changed] tells when to judge live connections again, with [Store.Peer]. Nothing needs to be closed: the only
// goroutine is the caller's, in Run.
//
// With [Options.Late] a Store begins without certificate and CA bundle, which come while it runs: as files, or through [Store.Present].
//
// # Verification
//
// One function judges certificates, for both ends, in the handshake and later. It runs in tls.Config.VerifyConnection
// instead of inside crypto/tls, for two reasons: each refusal is a [*Refusal] with a Reason that can be counted, and a live
// session is judged later by exactly the same rules. Neither end resumes sessions: a resumed one would outlive a revocation.
//
// # Deny file
//
// One entry a line: the name of an agent or server, or "serial:" and a certificate's serial number in hexadecimal (colons
// allowed, as openssl prints them). A '#' starts a comment. A name denies every certificate with that name, also one issued
// later; a serial number denies one certificate. A file with a line that is neither is refused as a whole, with the numbers
// of the bad lines, and the last good list stays in force: half of a list is more dangerous than an old one. Replace the
// file with a rename, so that nobody reads it half-written.
//
// # The small CA
//
// [CA] issues certificates in a directory, for use without a PKI. See [InitCA]. To replace a CA, make a new one in another
// directory, put both CA certificates into everyone's bundle, issue new leaves, then take the old one out of the bundles:
// sessions that still depend on it end at that moment.
//
// # Signing for Kubernetes
//
// There a request comes through the CSR API, and the API server says who asked. [ParseCSR] reads what is asked for, [Accounts.Prove] says for
// which node the requester can have a certificate, [CheckUsages] and [CSR.Check] compare the two: no more is granted than the node's
// name and, to servers, names at which they are dialed. What is wrong is a [*Denial] with a Reason. [Authority] is a CA that is kept by the
// caller, in one place, and replaces itself with overlap. Nothing here talks to anybody: package kube does.
package identity
