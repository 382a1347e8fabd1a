/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What lies in the maps. An operator reads it with bpftool, without a decoder: addresses are 16 bytes (IPv4 as
 * ::ffff:a.b.c.d), ports are in host order, text ends with NUL, padding has a name. The Go structs are generated from these.
 *
 * A change here that keeps every size but moves a field has to raise LAYOUT: a daemon then knows that it cannot reuse the
 * maps that an older one left behind.
 */
#pragma once

#include <linux/types.h>

#define LAYOUT 1

/* Eight, because all redirected connections of a client address share one destination address: with one port that client
 * would run out of source ports at 28,000 connections to all edges together. */
#define REDIRECT_PORTS 8

/* Aligned so that two loads compare it; a plain array so that it prints as one. */
#define ADDRESS(name) __u8 name[16] __attribute__((aligned(8)))

struct port_key {
	__u16 port;
};

/* A set; the value is for the reader of a dump. */
struct port_value {
	__u8 tunneled;
};

enum target_state {
	TARGET_UNKNOWN = 0,
	TARGET_ONLINE = 1,
	TARGET_OFFLINE = 2,   /* known, but no tunnel: refused */
	TARGET_AMBIGUOUS = 3, /* claimed by two nodes: refused */
};

struct target_key {
	ADDRESS(addr);
};

/* No more than connect() needs: the smaller the entries, the fewer cache misses. */
struct target {
	enum target_state state;
};

/* Whose address it is, for the daemon's successor and for the reader of a dump. */
struct target_node {
	char node[256];
};

/* The live settings, the one entry of their map. An address of zeros is absent. */
struct config {
	struct bpf_spin_lock lock; /* for the addresses: sixteen bytes do not change at once */
	__u16 layout;
	__u16 redirect_port; /* the first of REDIRECT_PORTS */
	__u64 host_netns;    /* cookie of the daemon's network namespace; 0: nothing is intercepted */
	ADDRESS(host4);      /* where the host's own connections are redirected to */
	ADDRESS(host6);
	ADDRESS(pod4); /* where those of other network namespaces are */
	ADDRESS(pod6);
	__u8 host_only; /* leave other network namespaces alone */
	__u8 opt_outs;  /* the map of opted-out cgroups is not empty */
	__u8 moving;    /* see keep_while_moving() */
	__u8 reserved[5];
};

struct cgroup_key {
	__u64 cgroup;
};

struct cgroup_value {
	__u8 opted_out;
};

/* Where a connection wanted to go, and who asked: collected in connect(), the last place that knows the process. */
struct origin {
	ADDRESS(addr);
	__u16 port;
	__u8 canary; /* the daemon's own test of the path: its number */
	__u8 reserved;
	__u32 pid;
	__u32 uid;
	__u32 gid;
	__u64 cgroup;
	__u64 netns; /* cookie */
	char comm[16];
};

/*
 *            connect(): hit              established
 *   (none) ─────────────────► ARMED ─────────────────► HANDED_OVER      a client's socket
 *                               │ connect() again           │
 *                               └────────► IDLE ◄───────────┘
 *   (none) ── established, entry found ──► ACCEPTED                     the accepted socket
 *   (none) ── written by the daemon ──► BYPASS, LISTENER, CANARY        the daemon's own sockets
 *
 * Records begin with the kind, and its numbers do not change, not with the layout either: a newer daemon marks its listeners for
 * the programs of an older one, until it has replaced them.
 *
 * One shot: a record that was handed over, or whose socket connects again, never hands over again.
 */
enum sock_kind {
	SOCK_IDLE = 0,
	SOCK_ARMED = 1,
	SOCK_HANDED_OVER = 2,
	SOCK_ACCEPTED = 3,
	SOCK_BYPASS = 4,
	SOCK_LISTENER = 5,
	SOCK_CANARY = 6,
};

/* The state of one socket, kept by the kernel with the socket and freed with it. */
struct sock_record {
	enum sock_kind kind;
	__u16 redirect_port;
	__u16 reserved;
	ADDRESS(redirect_addr);
	struct origin origin;
};

/* What both ends of a redirected connection know. The sequence number tells a connection from an earlier one that had the
 * same addresses and ports; without it resets with reused ports were accepted with another connection's destination. */
struct flow {
	ADDRESS(client_addr);
	ADDRESS(server_addr);
	__u16 client_port;
	__u16 server_port;
	__u32 seq; /* the client's initial sequence number + 1 */
};

/* How many hand-overs of a cgroup's processes nobody has taken. */
struct pending {
	__s64 hand_overs;
};

/* One number for each verdict, for each CPU. A TCP connect() ends in exactly one of the first group. */
struct counters {
	/* connect() */
	__u64 missed;
	__u64 redirected_host4;
	__u64 redirected_host6;
	__u64 redirected_pod4;
	__u64 redirected_pod6;
	__u64 offline;   /* where it cannot be refused (before 5.18) it is redirected, too, and the daemon resets it */
	__u64 ambiguous; /* likewise */
	__u64 no_family;
	__u64 storage_failed;
	__u64 bypassed;
	__u64 opted_out;
	__u64 device_bound;
	__u64 pod_skipped;
	__u64 inactive;
	/* hand-over from the client's socket to the accepted one */
	__u64 handed_over_host;
	__u64 handed_over_pod;
	__u64 hand_over_failed;
	__u64 accepted_host;
	__u64 accepted_pod;
	__u64 accepted_unknown; /* somebody connected to a redirect listener, or the addresses changed on the way (SNAT), or see handover.h */
	__u64 accept_failed;
	/* the rest */
	__u64 peer_names;
	__u64 bind_refused;
};
