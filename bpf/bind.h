/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * bind(): the redirect ports of the host's namespace belong to the daemon. While it is away, nobody else can take one and, with it,
 * the traffic of every redirected connection. The daemon marks its sockets before it binds them.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"
#include "verdict.h"

static __always_inline int on_bind(struct bpf_sock_addr *ctx)
{
	struct sock_record *rec;
	struct config *cfg;

	if (ctx->protocol != IPPROTO_TCP)
		return PROCEED;
	cfg = live_config();
	if (!cfg || !is_redirect_port(cfg, bpf_ntohs(ctx->user_port)))
		return PROCEED;
	if (bpf_get_netns_cookie(ctx) != cfg->host_netns)
		return PROCEED;
	rec = bpf_sk_storage_get(&sockets, ctx->sk, 0, 0);
	if (rec && rec->kind == SOCK_LISTENER)
		return PROCEED;
	COUNT(bind_refused);
	return refuse(EACCES);
}
