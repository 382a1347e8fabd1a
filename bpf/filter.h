/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What nearly all connections of a node pay: one bit says that an address is no target. A bit that is set says that it may be one; the daemon
 * sets it before the target is in its map. filterBit() of pkg/redirect/filter.go is the same hash; to change it raises LAYOUT.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

/* The last bytes of an address differ most, and are the upper bits here: a product alone would not spread them. */
static __always_inline __u64 mix(__u64 x)
{
	return (x ^ x >> 32) * 0x9e3779b97f4a7c15; /* 2^64 / golden ratio */
}

static __always_inline int may_be_target(const __u8 *addr)
{
	const __u64 *half = (const __u64 *)addr;
	__u64 hash = mix(mix(mix(half[0]) ^ half[1])) >> (64 - filter_bits);
	__u64 *word;
	__u32 at;

	at = hash / 64;
	word = bpf_map_lookup_elem(&target_filter, &at);
	return !word || *word >> hash % 64 & 1;
}
