/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* getpeername() of a redirected socket shows the original destination: programs compare and log it. */
#pragma once

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

#include "addr.h"
#include "maps.h"
#include "verdict.h"

static __always_inline int on_getpeername(struct bpf_sock_addr *ctx, int family)
{
	struct endpoint peer = {};
	struct sock_record *rec;

	if (ctx->protocol != IPPROTO_TCP)
		return PROCEED;
	rec = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (!rec || (rec->kind != SOCK_ARMED && rec->kind != SOCK_HANDED_OVER))
		return PROCEED;

	/* The record outlives its connection: it speaks of the present one only if the peer is the one that was written. */
	read_user(ctx, family, &peer);
	if (peer.port != rec->redirect_port || !same_addr(peer.addr, rec->redirect_addr))
		return PROCEED;
	write_user(ctx, family, rec->origin.addr, rec->origin.port);
	COUNT(peer_names);
	return PROCEED;
}
