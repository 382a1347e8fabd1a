/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "types.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct port_key);
	__type(value, struct port_value);
} ports SEC(".maps");

/* The daemon chooses the size, and replaces the map by a larger one before it is full. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct target_key);
	__type(value, struct target);
} targets SEC(".maps");

/* As large as targets. No program reads it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct target_key);
	__type(value, struct target_node);
} target_nodes SEC(".maps");

/*
 * See filter.h. 16 KiB, because the kernel has what is larger than 32 KiB in pages of 4 KiB, each of which can be a TLB miss: a fourfold
 * map costs 75 ns more.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2048);
	__type(key, __u32);
	__type(value, __u64);
} target_networks SEC(".maps");

/* See filter.h. It fits the size of targets: the smaller, the fewer cache misses. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 512);
	__type(key, __u32);
	__type(value, __u64);
} target_filter SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct cgroup_key);
	__type(value, struct cgroup_value);
} opt_outs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sock_record);
} sockets SEC(".maps");

/*
 * Entries live from the client's "established" to the server's, microseconds. The few that are left over by aborted handshakes are
 * evicted, and cannot match anything. But hand-overs that nobody takes can also be made on purpose, hundreds of thousands in a second
 * (TCP_REPAIR connects without a packet), and a connection whose ACK is lost once waits for a while. So the host has a map that no
 * pod can reach, and a cgroup with many pending hand-overs has its further ones in a third map, where only its like suffer.
 *
 * The loader makes them larger where there are many CPUs: each keeps up to 128 free entries for itself.
 */
struct in_flight {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct flow);
	__type(value, struct origin);
};

struct in_flight in_flight_host SEC(".maps");
struct in_flight in_flight_pods SEC(".maps");
struct in_flight in_flight_crowd SEC(".maps");

/* By the cgroup and not by the network namespace, of which anybody can make as many as he likes. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct cgroup_key);
	__type(value, struct pending);
} pending SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

/* Constants that the loader sets from what the kernel can do; the verifier removes what they switch off. */
const volatile __u8 have_set_retval = 0;     /* bpf_set_retval(), 5.18 */
const volatile __u8 have_sock_ops_netns = 0; /* bpf_get_netns_cookie() in sock_ops, 5.15 */

const volatile __u8 filter_bits = 15; /* logarithm of the number of bits in target_filter */

/* For the loader to read. */
const volatile __u16 layout = LAYOUT;

static __always_inline struct config *live_config(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&config, &zero);
}

static __always_inline int is_redirect_port(const struct config *cfg, __u32 port)
{
	return port - cfg->redirect_port < (__u32)REDIRECT_PORTS;
}

static __always_inline struct counters *my_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

/* Programs can be preempted, also by another of them: hence the atomic add, also on a CPU's own counter. */
#define COUNT(name)                                                                     \
	do {                                                                            \
		struct counters *counters_ = my_counters();                              \
		if (counters_)                                                          \
			__sync_fetch_and_add(&counters_->name, 1);                      \
	} while (0)
