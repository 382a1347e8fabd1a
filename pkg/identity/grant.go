// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Names of our signers in the CSR API of Kubernetes.
const (
	SignerAgent  = "edge-tunnel.io/agent"
	SignerServer = "edge-tunnel.io/server"
)

// SignerRole is the role of the certificates that the signer of this name issues, empty if it is none of ours.
func SignerRole(signer string) Role {
	switch signer {
	case SignerAgent:
		return RoleAgent
	case SignerServer:
		return RoleServer
	}
	return ""
}

// Reasons of denials, for counters and the conditions of requests.
const (
	DenyBadRequest   = "bad_request"   // cannot be read, or its signature is not by its key
	DenyBadKey       = "bad_key"       // not ECDSA P-256
	DenyWrongUsages  = "wrong_usages"  // not exactly those of the role
	DenyWrongSubject = "wrong_subject" // not CN = name, O = the signer's role
	DenyWrongAccount = "wrong_account" // neither the role's ServiceAccount nor, for agents, a node
	DenyNoNode       = "no_node"       // the account's credential does not say on which node it is used
	DenyWrongNode    = "wrong_node"    // CN is another node than the requester's
	DenyUnknownNode  = "unknown_node"  // there is no such Node, or it was made anew since
	DenyExtraNames   = "extra_names"   // names beside the role's
	DenyNoNames      = "no_names"      // a server's request without a name at which it could be dialed
	DenyReplayed     = "replayed"      // its key has a certificate already
)

// DenyReasons are all of them.
func DenyReasons() []string {
	return []string{DenyBadRequest, DenyBadKey, DenyWrongUsages, DenyWrongSubject, DenyWrongAccount, DenyNoNode, DenyWrongNode, DenyUnknownNode,
		DenyExtraNames, DenyNoNames, DenyReplayed}
}

// Denial says why a request for a certificate is denied, for good.
type Denial struct{ reason, detail string }

// Deny makes a denial; reason is one of the Deny constants.
func Deny(reason, format string, args ...any) *Denial {
	const most = 500 // bytes: what is quoted is a stranger's
	detail := fmt.Sprintf(format, args...)
	return &Denial{reason: reason, detail: strings.ToValidUTF8(detail[:min(len(detail), most)], "")}
}

func deny(reason, format string, args ...any) error { return Deny(reason, format, args...) }

// Reason returns one of the Deny constants.
func (d *Denial) Reason() string { return d.reason }

func (d *Denial) Error() string { return "deny certificate: " + d.reason + ": " + d.detail }

// Detail is one sentence without the reason.
func (d *Denial) Detail() string { return d.detail }

// Requester is who asks for a certificate, as the API server has authenticated it. Nothing in it is a mere claim.
type Requester struct {
	User   string
	Groups []string
	Extra  map[string][]string
}

// Accounts are the ServiceAccounts that may ask, as user names: system:serviceaccount:NAMESPACE:NAME.
type Accounts struct{ Agent, Server string }

// Validate refuses accounts that are none, and one for both: each edge node could then be a server.
func (a Accounts) Validate() error {
	var errs []error
	for _, user := range []string{a.Agent, a.Server} {
		if parts := strings.Split(user, ":"); len(parts) != 4 || !strings.HasPrefix(user, "system:serviceaccount:") || parts[2] == "" || parts[3] == "" {
			errs = append(errs, fmt.Errorf("%q is not system:serviceaccount:NAMESPACE:NAME", user))
		}
	}
	if a.Agent == a.Server {
		errs = append(errs, errors.New("agents and servers must not share a ServiceAccount"))
	}
	return errors.Join(errs...)
}

// Proof is the node that a requester's credential proves, or the pod that does.
type Proof struct {
	Node    string
	NodeUID string // empty if the credential does not say
	// Without Node: the pod whose token it is. Its node is the one that the API server has in the Pod of this name and UID.
	Pod, PodUID string
}

// What the API server puts into the extra fields of a user for the token of a pod: the pod always, its node since 1.30.
const (
	extraNode    = "authentication.kubernetes.io/node-name"
	extraNodeUID = "authentication.kubernetes.io/node-uid"
	extraPod     = "authentication.kubernetes.io/pod-name"
	extraPodUID  = "authentication.kubernetes.io/pod-uid"
)

// Prove says for which node who may have a certificate of this role. Agents outside pods ask with their kubelet's credential; servers
// cannot, or each edge node could be one.
func (a Accounts) Prove(role Role, who Requester) (Proof, error) {
	account := map[Role]string{RoleAgent: a.Agent, RoleServer: a.Server}[role]
	node, isNode := strings.CutPrefix(who.User, "system:node:")
	switch {
	case account != "" && who.User == account:
		return proveByToken(who)
	case role == RoleAgent && isNode && slices.Contains(who.Groups, "system:nodes"):
		if err := CheckName(node); err != nil {
			return Proof{}, deny(DenyWrongAccount, "user %q: %v", who.User, err)
		}
		return Proof{Node: node}, nil
	}
	return Proof{}, deny(DenyWrongAccount, "user %q may not have certificates of %q", who.User, role)
}

func proveByToken(who Requester) (Proof, error) {
	if len(who.Extra[extraNode]) > 0 {
		node, ok := only(who.Extra[extraNode])
		if err := CheckName(node); !ok || err != nil {
			return Proof{}, deny(DenyNoNode, "the token of %s names no single node (%q)", who.User, who.Extra[extraNode])
		}
		uid, _ := only(who.Extra[extraNodeUID])
		return Proof{Node: node, NodeUID: uid}, nil
	}
	pod, ok := only(who.Extra[extraPod])
	uid, known := only(who.Extra[extraPodUID])
	if !ok || !known {
		return Proof{}, deny(DenyNoNode, "the token of %s is bound to no pod", who.User)
	}
	return Proof{Pod: pod, PodUID: uid}, nil
}

// only is the value of a list that has one, which is not empty.
func only(values []string) (string, bool) {
	if len(values) != 1 || values[0] == "" {
		return "", false
	}
	return values[0], true
}

// CheckUsages wants exactly the usages of the role, in the words of the CSR API.
func CheckUsages(role Role, usages []string) error {
	want := []string{"client auth", "digital signature"}
	if role == RoleServer {
		want = append(want, "server auth")
	}
	got := slices.Clone(usages)
	slices.Sort(got)
	if got = slices.Compact(got); !slices.Equal(got, want) {
		return deny(DenyWrongUsages, "usages %q, must be %q", got, want)
	}
	return nil
}

// Check is nil if the request asks for no more than a certificate of this role for this node, and, if it is a server's, for some of
// these hosts. Hosts that cannot be in a certificate mean nothing.
func (c CSR) Check(role Role, node string, hosts []string) error {
	switch {
	case c.Role != role:
		return deny(DenyWrongSubject, "its organization is %q, this signer issues %q", c.Role, role)
	case c.Name != node:
		return deny(DenyWrongNode, "it is for %q, the requester is on node %q", c.Name, node)
	case role == RoleAgent && len(c.DNSNames)+len(c.Addrs) > 0:
		return deny(DenyExtraNames, "an agent's certificate has no DNS and IP names: %v", c.hosts())
	case role == RoleServer && len(c.DNSNames)+len(c.Addrs) == 0:
		return deny(DenyNoNames, "nobody could dial a server without DNS and IP names")
	}
	var extra []host
	may := Hosts(hosts)
	for _, h := range c.hosts() {
		if !slices.Contains(may, h.String()) {
			extra = append(extra, h)
		}
	}
	if len(extra) > 0 {
		return deny(DenyExtraNames, "not names of this server: %v", extra)
	}
	return nil
}

func (c CSR) hosts() (all []host) {
	for _, dns := range c.DNSNames {
		all = append(all, host{dns: dns})
	}
	for _, a := range c.Addrs {
		all = append(all, host{addr: a})
	}
	return all
}

// Hosts brings names and addresses at which a server is dialed into the form that certificates have: sorted, without duplicates, at most
// as many as fit, and without those that nobody else could dial or that no certificate can say.
func Hosts(texts []string) []string {
	var all []string
	for _, text := range texts {
		h, err := parseHost(text)
		if err != nil || h.dns == "" && !h.addr.IsGlobalUnicast() {
			continue
		}
		all = append(all, h.String())
	}
	slices.Sort(all)
	all = slices.Compact(all)
	return all[:min(len(all), maxHosts)]
}

func (h host) String() string {
	if h.dns != "" {
		return h.dns
	}
	return h.addr.String()
}
