#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The daemons at work: this machine is the cloud node, "pod" a network namespace on it, "edge" one behind it that the cloud has
# no route to. Prints the lines of "go test -v". The first step that fails ends it, with the daemons' logs.
# shellcheck shell=dash disable=SC2317,SC2086 # steps are called by name; $edge and $pod are several words

PATH=/tests:$PATH
pins=/sys/fs/bpf/edge-tunnel/v1
groups=/sys/fs/cgroup
url=http://10.99.0.5:9100/
url6="http://[fd99::5]:9100/"
said="the edge says hello"

case $(uname -r) in
5.1[0-7].*) refusal="Connection reset by peer" ;; # a program cannot choose connect's error yet
*) refusal="No route to host" ;;
esac

step() { # name, command...
	name=$1
	shift
	echo "=== RUN   $name"
	if "$@"; then
		echo "--- PASS: $name"
		return
	fi
	for log in /tmp/*.log; do
		echo "$log:"
		cat "$log"
	done
	echo "--- FAIL: $name"
	exit 1
}

# within SECONDS COMMAND... tries until it succeeds, or prints its last complaint.
within() {
	left=$1
	shift
	until complaint=$("$@" 2>&1); do
		left=$((left - 1))
		[ $left -gt 0 ] || { echo "$complaint" && return 1; }
		sleep 1
	done
}

# in_group NAME COMMAND... becomes a command in a cgroup: nodes share one kernel, and only the cloud's is hooked.
in_group() {
	echo 0 >$groups/$1/cgroup.procs
	shift
	exec "$@"
}

# fetches URL and answers [PREFIX...] compare what a program sees: the page, or wget's complaint.
fetches() { # url, what, command prefix...
	at=$1
	what=$2
	shift 2
	# "timeout", because the option of this wget crashes when it cannot connect.
	got=$(in_group cloud "$@" timeout 10 wget -q -O - "$at" 2>&1)
	case $got in
	*"$what"*) return 0 ;;
	esac
	echo "    $at: got \"$got\", want \"$what\""
	return 1
}

namespace() { # prints the command that enters a new network namespace
	unshare -n sleep 100000 >/dev/null 2>&1 &
	until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do usleep 10000; done
	echo "nsenter -n/proc/$!/ns/net"
}

# connect NAMESPACE-COMMAND NUMBER: a veth pair between the cloud and it, 172.16.NUMBER.0/24 and fd16:NUMBER::/64.
connect() {
	pid=${1#*/proc/}
	ip link add cloud$2 type veth
	ip link set veth0 netns ${pid%%/*}
	for where in "" "$1"; do
		if [ -z "$where" ]; then dev=cloud$2 host=1; else dev=veth0 host=2; fi
		$where sh -c "
			echo 0 >/proc/sys/net/ipv6/conf/$dev/accept_dad
			ip link set lo up
			ip link set $dev up
			ip addr add 172.16.$2.$host/24 dev $dev
			ip addr add fd16:$2::$host/64 dev $dev"
	done
}

network() {
	mkdir -p $groups/cloud $groups/edge /tmp/www &&
		edge=$(namespace) && pod=$(namespace) &&
		connect "$edge" 1 && connect "$pod" 2 &&
		$edge ip addr add 10.99.0.5/32 dev lo &&
		$edge ip addr add fd99::5/128 dev lo &&
		$pod ip route add default via 172.16.2.1 &&
		$pod ip -6 route add default via fd16:2::1 &&
		echo "$said" >/tmp/www/index.html || return 1
	(in_group edge $edge httpd -f -p 9100 -h /tmp/www) &
	# The cloud cannot reach the edge by itself.
	fetches $url "Network is unreachable"
}

start_server() {
	(in_group cloud tunnel-server --ca-cert /pki/ca.crt --cert /pki/cloud-1.crt --key /pki/cloud-1.key \
		--tunneled-ports 9100 --cgroup-root $groups/cloud --state-dir /tmp/state --node-ip 172.16.2.1,fd16:2::1) >>/tmp/server.log 2>&1 &
	server=$!
	within 30 timeout 5 wget -q -O /dev/null http://127.0.0.1:10265/readyz
}

start_agent() {
	(in_group edge $edge tunnel-agent --server 172.16.1.1 --ca-cert /pki/ca.crt --cert /pki/edge-1.crt --key /pki/edge-1.key) >>/tmp/agent.log 2>&1 &
	agent=$!
	within 30 fetches $url "$said"
}

port_is_guarded() {
	for port in 10270 10277; do
		got=$(in_group cloud timeout 5 nc -l -p $port 2>&1)
		case $got in
		*"Permission denied"* | *"Operation not permitted"*) ;;
		*) echo "    bind to $port: \"$got\"" && return 1 ;;
		esac
	done
}

# While the server is dead nothing goes astray, and its links stay; the next one takes them over.
kill_server() {
	links=$(ls $pins/links)
	kill -9 $server
	wait $server
	fetches $url "Connection refused" && fetches $url "Connection refused" $pod && port_is_guarded &&
		start_server && within 30 fetches $url "$said" && fetches $url "$said" $pod &&
		[ "$links" = "$(ls $pins/links)" ]
}

kill_agent() {
	kill -9 $agent
	wait $agent
	within 30 fetches $url "$refusal" && fetches $url6 "$refusal" && fetches $url "$refusal" $pod && start_agent
}

stop_server() {
	kill -TERM $server
	wait $server
	status=$?
	[ $status = 0 ] || { echo "    status $status" && return 1; }
	fetches $url "Connection refused"
}

cleanup() {
	tunnelctl cleanup && fetches $url "Network is unreachable" && ! ls -d $pins
}

step network network
step server start_server
step agent start_agent
step host/IPv6 fetches $url6 "$said"
step pod/IPv4 fetches $url "$said" $pod
step pod/IPv6 fetches $url6 "$said" $pod
step untouched fetches http://10.99.0.6:9100/ "Network is unreachable"
step status tunnelctl status
step guard port_is_guarded
step "agent killed" kill_agent
step "server killed" kill_server
step "server stopped" stop_server
step cleanup cleanup
kill -9 $agent
