// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net/netip"
	"time"
)

// Durations are numbers of seconds (…_seconds), sizes numbers of bytes (…_bytes), times RFC 3339. Addresses of either
// family are text; IPv4 is never written as IPv6. A field that does not apply is left out.

// Roles of a daemon.
const (
	RoleServer     = "server"
	RoleAgent      = "agent"
	RoleController = "controller"
)

// Status is a daemon in one page.
type Status struct {
	Role        string      `json:"role"` // one of the Role constants
	Name        string      `json:"name"` // from its certificate: the server's or the node's name; a controller's own in the election
	Version     string      `json:"version"`
	PID         int         `json:"pid"`
	Started     time.Time   `json:"started"`
	Ready       bool        `json:"ready"`
	Conditions  []Condition `json:"conditions"` // what readiness is made of
	Draining    bool        `json:"draining"`
	Tunnels     int         `json:"tunnels"`     // that are up now
	Connections int         `json:"connections"` // that are open now

	Certificate Certificate `json:"certificate,omitzero"` // not for RoleController

	Server *ServerStatus `json:"server,omitempty"` // for RoleServer
	Agent  *AgentStatus  `json:"agent,omitempty"`  // for RoleAgent

	Controller *ControllerStatus `json:"controller,omitempty"` // for RoleController
}

// Condition is one thing that must be true for a daemon to be ready.
type Condition struct {
	Name   string `json:"name"` // lower_snake_case or lower-kebab-case, stable
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"` // a sentence, when it is not OK
}

// Certificate is what a daemon presents to others, and how its files are doing.
type Certificate struct {
	Name     string    `json:"name"`
	Serial   string    `json:"serial"` // hexadecimal
	NotAfter time.Time `json:"not_after"`
	Error    string    `json:"error,omitempty"` // why its files could not be loaded again; the last good ones are in use

	Renewal *Renewal `json:"renewal,omitempty"` // if it comes from Kubernetes
}

// Renewal is how a certificate from Kubernetes is renewed.
type Renewal struct {
	Due   time.Time `json:"due,omitzero"`         // when a new one is asked for
	Error string    `json:"error,omitempty"`      // why there is none, or no newer one
	Disk  string    `json:"disk_error,omitempty"` // why the one in use could not be kept on disk
}

// ServerStatus is what only a server has.
type ServerStatus struct {
	Listen        string       `json:"listen"`          // where tunnels come in
	Intercept     string       `json:"intercept"`       // "all" or "host"
	NodeAddrs     []netip.Addr `json:"node_addrs"`      // where pods reach the redirect listeners
	RedirectPorts []uint16     `json:"redirect_ports"`  // of the redirect listeners
	TunneledPorts []uint16     `json:"tunneled_ports"`  // that are intercepted on targets
	Peers         []string     `json:"peers,omitempty"` // servers that it can forward to now
	Targets       TargetCounts `json:"targets"`
	Cluster       *Cluster     `json:"cluster,omitempty"`      // where targets come from; nil: from the certificates of agents
	PortsConfig   *PortsConfig `json:"ports_config,omitempty"` // where further tunneled ports come from; nil: from the flags alone
	Hooks         []Hook       `json:"hooks"`
	Missing       []string     `json:"missing,omitempty"` // kernel features that it does without, a sentence each
	Pins          string       `json:"pins"`              // folder of the pinned maps and links
}

// Cluster is how fresh the knowledge of a Kubernetes cluster is.
type Cluster struct {
	Complete bool      `json:"complete"` // its Nodes have been listed, whole, since the start
	Nodes    int       `json:"nodes"`    // of every kind
	Tunneled int       `json:"tunneled"` // edge nodes whose addresses are claimed
	Error    string    `json:"error,omitempty"`
	Since    time.Time `json:"since,omitzero"` // since when what is in force may be out of date
}

// PortsConfig says how the ConfigMap with tunneled ports is doing.
type PortsConfig struct {
	ConfigMap string    `json:"configmap"`
	Complete  bool      `json:"complete"` // it is known what it says, or that there is none
	Exists    bool      `json:"exists"`
	Kept      bool      `json:"kept"` // nothing in it is understood: the ports of before stay in force
	Problems  []string  `json:"problems,omitempty"`
	Error     string    `json:"error,omitempty"`
	Since     time.Time `json:"since,omitzero"` // since when what is in force may be out of date
}

// TargetCounts counts targets by state.
type TargetCounts struct {
	Online    int `json:"online"`
	Offline   int `json:"offline"`
	Ambiguous int `json:"ambiguous"`
	Refused   int `json:"refused"`
}

// Hook is a place in the kernel where a program of ours is attached.
type Hook struct {
	Name     string   `json:"name"` // such as "connect4"
	Attached bool     `json:"attached"`
	Program  uint32   `json:"program_id,omitempty"`
	Link     uint32   `json:"link_id,omitempty"`
	Others   []string `json:"others,omitempty"` // programs of others at the same place, in the order in which they run
}

// AgentStatus is what only an agent has.
type AgentStatus struct {
	Servers        []string     `json:"servers"`          // where they are dialed
	Lookup         *Lookup      `json:"lookup,omitempty"` // that found them; nil: they are given
	Addrs          []netip.Addr `json:"addrs"`            // its own, where it dials any port
	LocalhostPorts []uint16     `json:"localhost_proxy_ports"`
	Allow          []string     `json:"allow"`

	LocalhostConfig *LocalhostConfig `json:"localhost_config,omitempty"` // what the ports follow; nil: they are those of the flags
}

// Lookup says how an agent finds servers in Kubernetes.
type Lookup struct {
	Service  string    `json:"service"`            // NAMESPACE/NAME
	Stored   bool      `json:"stored"`             // what is known was kept from before the start, and not heard of since
	Problems []string  `json:"problems,omitempty"` // with what was found
	Error    string    `json:"error,omitempty"`    // why nothing newer is found
	Since    time.Time `json:"since,omitzero"`     // of Error
	Disk     string    `json:"disk_error,omitempty"`
}

// LocalhostConfig says how the ConfigMap that an agent has as a folder is doing.
type LocalhostConfig struct {
	Dir      string    `json:"dir"`
	Exists   bool      `json:"exists"` // it has the key
	Kept     bool      `json:"kept"`   // nothing in it is understood: the ports of before stay in force
	Problems []string  `json:"problems,omitempty"`
	Error    string    `json:"error,omitempty"` // why it cannot be read: the same
	Since    time.Time `json:"since,omitzero"`  // of Error
}

// ControllerStatus is what only a controller has.
type ControllerStatus struct {
	Leading bool   `json:"leading"`
	Leader  string `json:"leader,omitempty"` // the name of who leads, as far as is known
	Waiting int    `json:"requests_waiting"` // for a certificate, while it leads
	CAs     []CA   `json:"cas,omitempty"`    // that agents and servers believe, while it leads

	Records *Records `json:"records,omitempty"` // for CoreDNS, while it leads
}

// Records says how the names of nodes for CoreDNS are doing.
type Records struct {
	ConfigMap string `json:"configmap"`
	Records   int    `json:"records"` // lines
	SizeBytes int    `json:"size_bytes"`
	MaxBytes  int    `json:"max_bytes"`
	LeftOut   int    `json:"nodes_left_out"` // they lack a line for want of room
	Error     string `json:"error,omitempty"`
}

// CA is a certificate authority that agents and servers believe.
type CA struct {
	Subject     string    `json:"subject"`
	Fingerprint string    `json:"fingerprint"` // SHA-256, hexadecimal
	NotAfter    time.Time `json:"not_after"`
	Signs       bool      `json:"signs"`
}

// States of a [Target].
const (
	TargetOnline    = "online"    // a tunnel of its node is up
	TargetOffline   = "offline"   // none is: connects are refused with EHOSTUNREACH
	TargetAmbiguous = "ambiguous" // claimed by several nodes: connects are refused with EHOSTUNREACH
	TargetRefused   = "refused"   // claimed, but not intercepted, for the reason given
)

// Target is an address that somebody claimed, and what became of it.
type Target struct {
	Addr   netip.Addr `json:"addr"`
	Node   string     `json:"node"`             // the claims' names with commas when there are several
	State  string     `json:"state"`            // one of the Target constants
	Reason string     `json:"reason,omitempty"` // snake_case, for TargetAmbiguous and TargetRefused
}

// Where a list of targets was read.
const (
	SourceDaemon = "daemon"
	SourceKernel = "kernel" // the pinned maps: what is in force while the daemon is away
)

// TargetList is the answer of GET /v1/targets.
type TargetList struct {
	Source  string   `json:"source"` // one of the Source constants
	Targets []Target `json:"targets"`
}

// States of a [Tunnel].
const (
	TunnelUp         = "up"
	TunnelConnecting = "connecting"
	TunnelWaiting    = "waiting" // until the next attempt
)

// Tunnel is one mutual-TLS connection between an agent and a server, or an agent's attempt at one.
type Tunnel struct {
	Node          string    `json:"node"`             // empty for a peer
	Peer          bool      `json:"peer,omitempty"`   // it goes from this server to another one
	Server        string    `json:"server,omitempty"` // its id, or the address that is dialed as long as that is unknown
	State         string    `json:"state"`            // one of the Tunnel constants
	LocalAddr     string    `json:"local_addr,omitempty"`
	RemoteAddr    string    `json:"remote_addr,omitempty"`
	Instance      string    `json:"instance,omitempty"` // of the agent, hexadecimal; a new one at each start
	Software      string    `json:"software,omitempty"` // of the other end
	Since         time.Time `json:"since,omitzero"`     // when it reached this state
	NotAfter      time.Time `json:"not_after,omitzero"` // of the other end's certificate: the tunnel ends then
	RTTSeconds    float64   `json:"rtt_seconds,omitempty"`
	Streams       int       `json:"streams"` // open now
	StreamsTotal  uint64    `json:"streams_total"`
	SentBytes     uint64    `json:"sent_bytes"` // from the daemon that answers
	ReceivedBytes uint64    `json:"received_bytes"`
	Attempts      uint64    `json:"attempts,omitempty"`         // since it was last up
	RetrySeconds  float64   `json:"retry_in_seconds,omitempty"` // for TunnelWaiting
	Error         string    `json:"error,omitempty"`            // of the last attempt
}

// TunnelList is the answer of GET /v1/tunnels.
type TunnelList struct {
	Tunnels []Tunnel `json:"tunnels"`
}

// Connection is one intercepted (server) or delivered (agent) connection that is open now.
type Connection struct {
	Trace           string    `json:"trace"` // hexadecimal; the same at both ends and in both access records
	Node            string    `json:"node"`
	Source          string    `json:"source"`      // ADDR:PORT of the client
	Destination     string    `json:"destination"` // ADDR:PORT that the client wanted
	Started         time.Time `json:"started"`
	DurationSeconds float64   `json:"duration_seconds"`
	SentBytes       int64     `json:"sent_bytes"`       // from the client
	ReceivedBytes   int64     `json:"received_bytes"`   // to the client
	PID             uint32    `json:"pid,omitempty"`    // of the client; servers only, as are the next three
	UID             *uint32   `json:"uid,omitempty"`    // a pointer, as 0 is root and not "unknown"
	Comm            string    `json:"comm,omitempty"`   // its name, as ps shows it
	Cgroup          uint64    `json:"cgroup,omitempty"` // id in cgroup2
	Dialed          string    `json:"dialed,omitempty"` // ADDR:PORT that the agent dialed; agents only
}

// ConnectionList is the answer of GET /v1/connections.
type ConnectionList struct {
	Connections []Connection `json:"connections"`
}

// Forgotten is the answer of POST /v1/forget.
type Forgotten struct {
	Node    string `json:"node"`
	Targets int    `json:"targets"` // how many addresses are no longer intercepted
}

// State is everything at once, for GET /state. Agents have no targets.
type State struct {
	Status      Status       `json:"status"`
	Targets     []Target     `json:"targets,omitempty"`
	Tunnels     []Tunnel     `json:"tunnels"`
	Connections []Connection `json:"connections"`
}
