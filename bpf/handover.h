/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The record's way from the client's socket to the accepted one.
 *
 *   client, SYN-ACK has arrived, its ACK has not left ──► in_flight[flow] := origin
 *   server, ACK has arrived, accept() has not returned ──► child's storage := in_flight[flow], entry gone
 *
 * The kernel calls sock_ops at both moments. Entries are never deleted when a client's socket closes: its ACK may still be
 * handled on another CPU, and its child would have lost its destination.
 *
 * A connection is handed over once. With SYN cookies, the kernel makes a connection anew that was reset if one of its packets comes
 * late. Nobody is at its other end, and it is accepted without a destination.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "addr.h"
#include "maps.h"

/* local_port is in host order, remote_port in network order. */
static __always_inline void read_local(struct bpf_sock_ops *ctx, __u8 *addr, __u16 *port)
{
	if (ctx->family == AF_INET)
		set_addr4(addr, ctx->local_ip4);
	else
		READ_IP6(addr, ctx->local_ip6);
	*port = ctx->local_port;
}

static __always_inline void read_remote(struct bpf_sock_ops *ctx, __u8 *addr, __u16 *port)
{
	if (ctx->family == AF_INET)
		set_addr4(addr, ctx->remote_ip4);
	else
		READ_IP6(addr, ctx->remote_ip6);
	*port = bpf_ntohl(ctx->remote_port);
}

/* A sixteenth of the map: so many cgroups would have to conspire to push out another's entries. */
#define MAX_PENDING 1024

static __always_inline struct pending *pending_of(const struct origin *origin)
{
	struct cgroup_key key = { .cgroup = origin->cgroup };

	return bpf_map_lookup_elem(&pending, &key);
}

/* Counts a hand-over of a pod, and tells whether there are too many of them. The count is kept until its cgroup is forgotten: leftovers
 * add up over the months, and cost nothing but the place beside somebody who does the same in a second. */
static __always_inline int is_crowd(const struct origin *origin)
{
	struct cgroup_key key = { .cgroup = origin->cgroup };
	struct pending none = {}, *now = pending_of(origin);

	if (!now) {
		bpf_map_update_elem(&pending, &key, &none, BPF_NOEXIST);
		now = pending_of(origin);
		if (!now)
			return 1;
	}
	__sync_fetch_and_add(&now->hand_overs, 1);
	return now->hand_overs > MAX_PENDING;
}

static __always_inline void taken_over(const struct origin *origin)
{
	struct pending *now = pending_of(origin);

	if (now)
		__sync_fetch_and_add(&now->hand_overs, -1);
}

static __always_inline void on_client_established(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk; /* once: the verifier takes a second read for another pointer */
	struct sock_record *rec;
	struct flow flow = {};
	long err;

	if (!sk)
		return;
	rec = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!rec || rec->kind != SOCK_ARMED)
		return;

	read_local(ctx, flow.client_addr, &flow.client_port);
	read_remote(ctx, flow.server_addr, &flow.server_port);
	flow.seq = ctx->snd_una;
	/* Storage outlives a failed connect(), and the hook may have been away for the next one. */
	if (flow.server_port != rec->redirect_port || !same_addr(flow.server_addr, rec->redirect_addr))
		return;

	rec->kind = SOCK_HANDED_OVER;
	if (is_loopback(flow.server_addr))
		err = bpf_map_update_elem(&in_flight_host, &flow, &rec->origin, BPF_ANY);
	else if (is_crowd(&rec->origin))
		err = bpf_map_update_elem(&in_flight_crowd, &flow, &rec->origin, BPF_ANY);
	else
		err = bpf_map_update_elem(&in_flight_pods, &flow, &rec->origin, BPF_ANY);
	if (err)
		COUNT(hand_over_failed);
	else if (is_loopback(flow.server_addr))
		COUNT(handed_over_host);
	else
		COUNT(handed_over_pod);
}

enum { TAKEN, NOT_THERE, FAILED };

/* Moves an entry from its map into the record of an accepted socket. */
static __always_inline int take(void *map, const struct flow *flow, struct bpf_sock *sk)
{
	struct origin *found = bpf_map_lookup_elem(map, flow);
	struct sock_record *rec;

	if (!found)
		return NOT_THERE;
	rec = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!rec)
		return FAILED;
	rec->origin = *found;
	/* An entry that was evicted while it was copied may have held another connection's destination by then. Deleting tells. */
	if (bpf_map_delete_elem(map, flow))
		return FAILED;
	rec->kind = SOCK_ACCEPTED;
	return TAKEN;
}
static __always_inline void on_server_established(struct bpf_sock_ops *ctx)
{
	struct config *cfg = live_config();
	struct sock_record *rec;
	struct flow flow = {};
	struct bpf_sock *sk;
	int host, how;

	if (!cfg || !is_redirect_port(cfg, ctx->local_port))
		return;
	/* A pod may use the same ports for something of its own. */
	if (have_sock_ops_netns && bpf_get_netns_cookie(ctx) != cfg->host_netns)
		return;
	sk = ctx->sk;
	if (!sk)
		return;

	read_remote(ctx, flow.client_addr, &flow.client_port);
	read_local(ctx, flow.server_addr, &flow.server_port);
	flow.seq = ctx->rcv_nxt;
	host = is_loopback(flow.server_addr);
	if (host) {
		how = take(&in_flight_host, &flow, sk);
	} else {
		how = take(&in_flight_pods, &flow, sk);
		if (how == NOT_THERE)
			how = take(&in_flight_crowd, &flow, sk);
	}
	if (how == FAILED) {
		COUNT(accept_failed);
		return;
	}
	rec = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (how == NOT_THERE) {
		/* While the hook moves it runs twice, and the first run was successful. */
		if (!rec || rec->kind != SOCK_ACCEPTED)
			COUNT(accepted_unknown);
		return;
	}
	if (host) {
		COUNT(accepted_host);
	} else {
		COUNT(accepted_pod);
		if (rec)
			taken_over(&rec->origin);
	}
}
