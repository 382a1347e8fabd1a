/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Every address is sixteen bytes, an IPv4 address is ::ffff:a.b.c.d: one piece of code serves both families and the
 * v4-mapped addresses that arrive at IPv6 sockets. Only this file and the programs' entries know which context field holds what.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "types.h"

#define AF_INET 2
#define AF_INET6 10

struct endpoint {
	ADDRESS(addr);
	__u16 port;
};

static __always_inline __u32 word(const __u8 *addr, int i)
{
	return ((const __u32 *)addr)[i];
}

static __always_inline void set_addr(__u8 *addr, __u32 a, __u32 b, __u32 c, __u32 d)
{
	__u32 *words = (__u32 *)addr;

	words[0] = a;
	words[1] = b;
	words[2] = c;
	words[3] = d;
}

static __always_inline void set_addr4(__u8 *addr, __u32 ip4)
{
	set_addr(addr, 0, 0, bpf_htonl(0xffff), ip4);
}

static __always_inline void copy_addr(__u8 *to, const __u8 *from)
{
	((__u64 *)to)[0] = ((const __u64 *)from)[0];
	((__u64 *)to)[1] = ((const __u64 *)from)[1];
}

static __always_inline int same_addr(const __u8 *a, const __u8 *b)
{
	return ((const __u64 *)a)[0] == ((const __u64 *)b)[0] && ((const __u64 *)a)[1] == ((const __u64 *)b)[1];
}

static __always_inline int is_absent(const __u8 *addr)
{
	return !(((const __u64 *)addr)[0] | ((const __u64 *)addr)[1]);
}

static __always_inline int is_ipv4(const __u8 *addr)
{
	return ((const __u64 *)addr)[0] == 0 && word(addr, 2) == bpf_htonl(0xffff);
}

static __always_inline int is_loopback(const __u8 *addr)
{
	if (is_ipv4(addr))
		return addr[12] == 127;
	return ((const __u64 *)addr)[0] == 0 && ((const __u64 *)addr)[1] == bpf_cpu_to_be64(1);
}

/* The contexts refuse loads of eight bytes from their address arrays, and clang 14 likes to merge two of four: volatile keeps
 * them apart. */
#define READ_IP6(to, field)                                                             \
	do {                                                                            \
		const volatile __u32 *field_ = (field);                                 \
		set_addr(to, field_[0], field_[1], field_[2], field_[3]);               \
	} while (0)

/* user_ip and user_port are the address argument of the system call. */
static __always_inline void read_user(struct bpf_sock_addr *ctx, int family, struct endpoint *e)
{
	if (family == AF_INET)
		set_addr4(e->addr, ctx->user_ip4);
	else
		READ_IP6(e->addr, ctx->user_ip6);
	e->port = bpf_ntohs(ctx->user_port);
}

static __always_inline void write_user(struct bpf_sock_addr *ctx, int family, const __u8 *addr, __u16 port)
{
	if (family == AF_INET) {
		ctx->user_ip4 = word(addr, 3);
	} else {
		volatile __u32 *ip6 = ctx->user_ip6;

		ip6[0] = word(addr, 0);
		ip6[1] = word(addr, 1);
		ip6[2] = word(addr, 2);
		ip6[3] = word(addr, 3);
	}
	ctx->user_port = bpf_htons(port);
}
