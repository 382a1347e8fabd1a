/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The kernel half of edge-tunnel: connections to tunneled ports of known edge addresses are redirected to the tunnel-server on
 * this node, which learns where they wanted to go; everything else is left alone.
 *
 * No CO-RE: only contexts of the stable interface are used, so the programs load on kernels that carry no type information.
 */
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

#include "addr.h"
#include "bind.h"
#include "connect.h"
#include "handover.h"
#include "maps.h"
#include "peername.h"

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return on_connect(ctx, AF_INET);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return on_connect(ctx, AF_INET6);
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	return on_getpeername(ctx, AF_INET);
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	return on_getpeername(ctx, AF_INET6);
}

SEC("cgroup/bind4")
int bind4(struct bpf_sock_addr *ctx)
{
	return on_bind(ctx);
}

SEC("cgroup/bind6")
int bind6(struct bpf_sock_addr *ctx)
{
	return on_bind(ctx);
}

SEC("sockops")
int sock_ops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		on_client_established(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_server_established(ctx);
		break;
	}
	return 1; /* and no touch of ctx->reply, which may be another program's answer */
}

char __license[] SEC("license") = "Dual BSD/GPL";
