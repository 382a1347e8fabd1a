/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * What nearly all connections of a node pay: one bit says that an address is in no network of targets, a network being what differs in the last
 * byte only; and if it is in one, one more that it is no target. A bit that is set says that it may be one; the daemon sets it before the target
 * is in its map. filterBits() of pkg/redirect/filter.go has the same hash; to change it raises LAYOUT.
 */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

#define LAST_BYTE (0xffULL << 56) /* of an address, in its second half: little-endian */
#define NETWORK_BITS 17           /* logarithm of the number of bits in target_networks */

/* The last bytes of an address differ most, and are the upper bits here: a product alone would not spread them. */
static __always_inline __u64 mix(__u64 x)
{
	return (x ^ x >> 32) * 0x9e3779b97f4a7c15; /* 2^64 / golden ratio */
}

static __always_inline __u64 hash_halves(__u64 first, __u64 second, __u8 bits)
{
	return mix(mix(mix(first) ^ second)) >> (64 - bits);
}

static __always_inline int has_bit(void *filter, __u64 bit)
{
	__u32 at = bit / 64;
	__u64 *word = bpf_map_lookup_elem(filter, &at);

	return !word || *word >> bit % 64 & 1;
}

static __always_inline int may_be_target(const __u8 *addr)
{
	const __u64 *half = (const __u64 *)addr;

	return has_bit(&target_networks, hash_halves(half[0], half[1] & ~LAST_BYTE, NETWORK_BITS)) &&
	       has_bit(&target_filter, hash_halves(half[0], half[1], filter_bits));
}
