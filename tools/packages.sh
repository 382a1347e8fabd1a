#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Gives the build, the tests and the demo the Debian packages of packages.txt without installing them: no
# service is started, no user added, nothing of the machine's package database changed.
#
#   packages.sh install      download and unpack what the machine lacks (quick when nothing is missing)
#   packages.sh list         what was unpacked: name, version, checksum
#   packages.sh run CMD...   run CMD where the unpacked files lie over /usr and /etc
#
# "run" is a private mount namespace with two read-only overlays, so that every program finds its libraries and
# its helpers at the usual paths. Other processes see none of it. It needs root, as does everything that loads BPF.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# test/netlab/mounts.go looks in the same place.
cache=${EDGE_TUNNEL_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/edge-tunnel}
root=$cache/packages
debs=$cache/debs
manifest=usr/share/edge-tunnel/packages

fail() {
	echo "error: $1" >&2
	shift
	[ $# -eq 0 ] || echo "hint: $*" >&2
	exit 1
}

names() {
	sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$here/packages.txt" | tr -d ' \t'
}

# What is needed depends on this script, on the list and on what the machine has installed.
wanted() {
	cat "$here/packages.sh" "$here/packages.txt" /var/lib/dpkg/status 2>/dev/null | sha256sum | cut -d' ' -f1
}

download() {
	local names
	mapfile -t names < <(names)
	# Without --no-upgrade an outdated but working program would be downloaded a second time.
	apt-get install --yes --quiet=2 --download-only --no-install-recommends --no-upgrade \
		-o Debug::NoLocking=1 -o Dir::Cache::archives="$debs" -o APT::Keep-Downloaded-Packages=true "${names[@]}"
}

# The files that the resolver now asks for: the folder may hold older versions too.
resolved() {
	local names
	mapfile -t names < <(names)
	apt-get install --yes --quiet=2 --print-uris --no-install-recommends --no-upgrade \
		-o Debug::NoLocking=1 -o Dir::Cache::archives="$debs/none" "${names[@]}" | sed -n "s/^'[^']*' \([^ ]*\.deb\) .*/\1/p"
}

install() {
	[ "$(cat "$root.stamp" 2>/dev/null)" != "$(wanted)" ] || return 0
	command -v apt-get >/dev/null || fail "apt-get is missing: only Debian 12 and its like are prepared automatically" \
		"install the packages named in tools/packages.txt by your system's own means, then: make PACKAGES=no test"

	mkdir -p "$debs/partial" "$debs/none/partial"
	exec 9>"$cache/lock"
	flock --wait 600 9 || fail "another run holds $cache/lock for ten minutes" "see who: fuser -v $cache/lock"
	local stamp
	stamp=$(wanted)
	[ "$(cat "$root.stamp" 2>/dev/null)" != "$stamp" ] || return 0

	echo "unpacking packages into $root (nothing is installed)"
	if ! download >"$cache/apt.log" 2>&1; then
		# Old or absent package lists are the usual reason.
		{ apt-get update --quiet=2 && download; } >>"$cache/apt.log" 2>&1 ||
			{ tail -n 5 "$cache/apt.log" >&2; fail "packages could not be downloaded" \
				"is the machine offline? The first run needs a Debian mirror; the log is $cache/apt.log"; }
	fi

	rm -rf "$root.new"
	# Debian 12 has merged /usr; older archives still carry /lib and /bin.
	mkdir -p "$root.new/usr/share/edge-tunnel" "$root.new/etc"
	local deb name
	while read -r deb; do
		rm -rf "$root.one"
		dpkg-deb --extract "$debs/$deb" "$root.one"
		for name in bin sbin lib lib64; do
			[ -d "$root.one/$name" ] || continue
			mkdir -p "$root.one/usr/$name"
			cp -a "$root.one/$name/." "$root.one/usr/$name/"
		done
		for name in usr etc; do
			[ ! -d "$root.one/$name" ] || cp -a "$root.one/$name/." "$root.new/$name/"
		done
		echo "$(dpkg-deb --field "$debs/$deb" Package) $(dpkg-deb --field "$debs/$deb" Version) $(sha256sum <"$debs/$deb" | cut -d' ' -f1)"
	done < <(resolved) >"$root.manifest"
	rm -rf "$root.one"
	mv "$root.manifest" "$root.new/$manifest"
	# A test that runs now may hold the present folder in an overlay, so one generation is kept.
	rm -rf "$root.old"
	[ ! -e "$root" ] || mv "$root" "$root.old"
	mv "$root.new" "$root"
	echo "$stamp" >"$root.stamp"
}

run() {
	[ $# -gt 0 ] || fail "run needs a command"
	# A root shell made by plain "su" lacks these.
	export PATH=$PATH:/usr/sbin:/sbin
	# Inside already, or nothing was unpacked because the machine has everything.
	if [ -e "/$manifest" ]; then exec "$@"; fi
	[ -e "$root/$manifest" ] || fail "packages are not unpacked" "make deps"
	[ "$(id -u)" = 0 ] || fail "this step needs root: it mounts, makes network namespaces and loads BPF" "run make as root"
	# shellcheck disable=SC2016 # expanded by the inner shell
	exec unshare --mount --propagation slave -- bash -c '
		set -e
		for dir in usr etc; do
			mount -t overlay -o "ro,lowerdir=$1/$dir:/$dir" edge-tunnel "/$dir"
		done
		shift
		exec "$@"' packages.sh "$root" "$@"
}

case ${1:-} in
install) install ;;
list) cat "$root/$manifest" ;;
run)
	shift
	run "$@"
	;;
*) fail "unknown command '${1:-}'" "packages.sh install | list | run CMD..." ;;
esac
