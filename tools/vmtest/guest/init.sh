#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# The first and only process of a test machine: makes the usual file systems, runs /jobs/NN-NAME one after the other, powers
# off. Its lines on the serial console are described in console.go.
# shellcheck shell=dash disable=SC1091 # busybox's shell; /job.env is written into the archive

/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp TMPDIR=/tmp

say() { printf '\n@vmtest %s\n' "$*"; }

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
ulimit -n 20000

say boot "$(uname -r)"
while read -r module; do
	insmod "/modules/$module" || echo "error: $module could not be loaded"
done </modules/order

. /job.env # JOB_LIMIT, seconds
for job in /jobs/*; do
	name=${job##*/}
	name=${name#*-}
	say start "$name"
	begin=$(date +%s)
	timeout -s KILL "$JOB_LIMIT" "$job" </dev/null
	status=$?
	say end "$name" $status $(($(date +%s) - begin))
done

read -r tainted </proc/sys/kernel/tainted
[ "$tainted" = 0 ] || dmesg
say tainted "$tainted"
say "done"
poweroff -f
