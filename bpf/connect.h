/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* connect(), and everything that ends there: sendmsg(MSG_FASTOPEN), io_uring, the subflows of MPTCP. */
#pragma once

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

#include "addr.h"
#include "filter.h"
#include "maps.h"
#include "verdict.h"

/* Depth down to which an opted-out cgroup is found; a kubelet's containers are at seven. */
#define CGROUP_DEPTH 16

/*
 * The hook has to be last on its cgroup, and moves there by being attached a second time before its first link goes.
 * Between the two it runs twice for one connect(), and finds its own work the second time. Only then is a record
 * allowed to stay armed for a connect() to the redirect address itself.
 */
static __always_inline int keep_while_moving(const struct config *cfg, const struct sock_record *rec, const struct endpoint *dst)
{
	return cfg->moving && rec->kind == SOCK_ARMED && rec->redirect_port == dst->port &&
	       same_addr(rec->redirect_addr, dst->addr);
}

/* Opted out is the cgroup itself or any above it. */
static __always_inline int is_opted_out(void)
{
#pragma unroll
	for (int level = 0; level < CGROUP_DEPTH; level++) {
		struct cgroup_key key = { .cgroup = bpf_get_current_ancestor_cgroup_id(level) };

		if (!key.cgroup)
			return 0;
		if (bpf_map_lookup_elem(&opt_outs, &key))
			return 1;
	}
	return 0;
}

/*
 * The redirect address for a socket of a family and its destination, or nothing (zeros). The destination's own family is
 * preferred. An IPv6 socket can also speak IPv4, unless it is bound to an address; a V6ONLY one the kernel refuses itself, after us,
 * with ENETUNREACH.
 */
static __always_inline void pick_redirect(struct bpf_sock_addr *ctx, int family, struct config *cfg, int host, const __u8 *dst,
					  __u8 *redirect)
{
	const volatile __u32 *bound = ctx->sk->src_ip6;
	struct endpoint v4, v6;

	bpf_spin_lock(&cfg->lock);
	copy_addr(v4.addr, host ? cfg->host4 : cfg->pod4);
	copy_addr(v6.addr, host ? cfg->host6 : cfg->pod6);
	bpf_spin_unlock(&cfg->lock);

	if (family == AF_INET || is_ipv4(dst))
		copy_addr(redirect, v4.addr);
	else if (!is_absent(v6.addr) || (bound[0] | bound[1] | bound[2] | bound[3]))
		copy_addr(redirect, v6.addr);
	else
		copy_addr(redirect, v4.addr);
}

static __always_inline __u16 pick_port(__u16 first, const struct endpoint *dst)
{
	__u32 hash = dst->port;

#pragma unroll
	for (int i = 0; i < 4; i++)
		hash = (hash ^ word(dst->addr, i)) * 0x9e3779b1; /* 2^32 / golden ratio */
	return first + ((hash >> 16) & (REDIRECT_PORTS - 1));
}

static __always_inline void fill_origin(struct origin *origin, const struct endpoint *dst, __u64 netns, __u8 canary)
{
	__u64 ids = bpf_get_current_uid_gid();

	copy_addr(origin->addr, dst->addr);
	origin->port = dst->port;
	origin->canary = canary;
	origin->reserved = 0;
	origin->pid = bpf_get_current_pid_tgid() >> 32;
	origin->uid = ids;
	origin->gid = ids >> 32;
	origin->cgroup = bpf_get_current_cgroup_id();
	origin->netns = netns;
	bpf_get_current_comm(origin->comm, sizeof(origin->comm));
}

static __always_inline int on_connect(struct bpf_sock_addr *ctx, int family)
{
	struct endpoint dst = {}, redirect = {};
	struct sock_record *rec;
	struct target *target;
	struct config *cfg;
	__u8 canary = 0;
	__u64 netns;
	int tunneled, host;

	if (ctx->protocol != IPPROTO_TCP)
		return PROCEED;
	read_user(ctx, family, &dst);
	cfg = live_config();
	if (!cfg)
		return PROCEED;

	/* What most connections of a node pay is the one load of the filter. They may leave an armed record behind them: it is handed over
	 * by a connection to its redirect address only, and those pass here. */
	struct port_key port = { .port = dst.port };
	tunneled = may_be_target(dst.addr) && bpf_map_lookup_elem(&ports, &port);
	if (!tunneled && !is_redirect_port(cfg, dst.port)) {
		COUNT(missed);
		return PROCEED;
	}

	rec = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (rec) {
		if (rec->kind == SOCK_BYPASS) {
			/* A daemon whose kernel cannot tell it (before 5.14) learns its own cookie here. */
			rec->origin.netns = bpf_get_netns_cookie(ctx);
			COUNT(bypassed);
			return PROCEED;
		}
		if (rec->kind == SOCK_CANARY)
			canary = rec->origin.canary;
		/* The record of an earlier connect() must not be handed over by this one, whichever way it goes. */
		if (!keep_while_moving(cfg, rec, &dst))
			rec->kind = SOCK_IDLE;
	}
	if (!tunneled) {
		COUNT(missed);
		return PROCEED;
	}

	struct target_key key;
	copy_addr(key.addr, dst.addr);
	target = bpf_map_lookup_elem(&targets, &key);
	if (!target && !canary) {
		COUNT(missed);
		return PROCEED;
	}

	if (!cfg->host_netns) {
		COUNT(inactive);
		return PROCEED;
	}
	netns = bpf_get_netns_cookie(ctx);
	host = netns == cfg->host_netns;
	if (!host && cfg->host_only) {
		COUNT(pod_skipped);
		return PROCEED;
	}
	/* A socket bound to a device reaches nothing on loopback: it would hang. */
	if (host && ctx->sk->bound_dev_if) {
		COUNT(device_bound);
		return PROCEED;
	}
	if (cfg->opt_outs && is_opted_out()) {
		COUNT(opted_out);
		return PROCEED;
	}

	/* From here on nothing goes direct: behind a private address that is used twice could be a stranger's machine. */
	if (target && target->state != TARGET_ONLINE) {
		if (target->state == TARGET_AMBIGUOUS)
			COUNT(ambiguous);
		else
			COUNT(offline);
		/* Without bpf_set_retval() the caller would see EPERM and look for a firewall. The daemon has no tunnel either,
		 * and resets the connection: a better message. */
		if (have_set_retval)
			return refuse(EHOSTUNREACH);
	}

	pick_redirect(ctx, family, cfg, host, dst.addr, redirect.addr);
	if (is_absent(redirect.addr)) {
		COUNT(no_family);
		return refuse(EHOSTUNREACH);
	}
	redirect.port = pick_port(cfg->redirect_port, &dst);

	rec = bpf_sk_storage_get(&sockets, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!rec) {
		COUNT(storage_failed);
		return refuse(ENOMEM);
	}
	copy_addr(rec->redirect_addr, redirect.addr);
	rec->redirect_port = redirect.port;
	fill_origin(&rec->origin, &dst, netns, canary);
	rec->kind = SOCK_ARMED;
	write_user(ctx, family, redirect.addr, redirect.port);

	if (host) {
		if (is_ipv4(redirect.addr))
			COUNT(redirected_host4);
		else
			COUNT(redirected_host6);
	} else {
		if (is_ipv4(redirect.addr))
			COUNT(redirected_pod4);
		else
			COUNT(redirected_pod6);
	}
	return PROCEED;
}
