// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// The errors of these parsers complete a sentence that begins with the entry: `"80-90" is a range`.

// ParsePort reads a port, 1 to 65535.
func ParsePort(s string) (uint16, error) {
	port, err := strconv.ParseUint(s, 10, 16)
	switch first, last, dash := strings.Cut(s, "-"); {
	case dash && isNumber(first) && isNumber(last):
		return 0, errors.New("is a range, and ranges are not possible here")
	case errors.Is(err, strconv.ErrRange), err == nil && port == 0:
		return 0, errors.New("is not between 1 and 65535")
	case err != nil || !isNumber(s):
		return 0, errors.New("is not a port")
	}
	return uint16(port), nil
}

func isNumber(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

// ParseAddr reads an IP address. IPv4 written as IPv6 comes back as IPv4.
func ParseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	switch {
	case err != nil && looksLikeHostPort(s):
		return netip.Addr{}, errors.New("is an address with a port, and only the address is wanted")
	case err != nil && strings.Contains(s, "/"):
		return netip.Addr{}, errors.New("is a range of addresses, and one address is wanted")
	case err != nil:
		return netip.Addr{}, errors.New("is not an IP address")
	case addr.Zone() != "":
		return netip.Addr{}, errors.New("has a zone, and link-local addresses are not possible here")
	}
	return addr.Unmap(), nil
}

func looksLikeHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	return err == nil && isNumber(port) && isAddr(host)
}

func isAddr(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

// ParsePrefix reads a range of addresses in CIDR form, without bits below the mask: what was meant by 10.1.2.3/8 is
// anybody's guess.
func ParsePrefix(s string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(s)
	switch {
	case err != nil && isAddr(s):
		addr := netip.MustParseAddr(s).WithZone("").Unmap()
		return netip.Prefix{}, fmt.Errorf("is one address; as a range it is %s/%d", addr, addr.BitLen())
	case err != nil:
		return netip.Prefix{}, errors.New("is not a range of addresses")
	case prefix.Addr().Is4In6():
		return netip.Prefix{}, errors.New("is IPv4 written as IPv6; write it as IPv4")
	case prefix != prefix.Masked():
		return netip.Prefix{}, fmt.Errorf("has bits below its mask; the range is %s", prefix.Masked())
	}
	return prefix, nil
}

// ParseHostPort reads HOST or HOST:PORT, where HOST is a DNS name or an address (IPv6 with a port in brackets), and
// returns HOST:PORT as net.Dial wants it.
func ParseHostPort(s string, defaultPort uint16) (string, error) {
	host, port := s, strconv.Itoa(int(defaultPort))
	switch {
	case strings.Contains(s, "://"):
		return "", errors.New("is a URL")
	case isAddr(s): // also an IPv6 address without brackets
	case strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]"):
		host = s[1 : len(s)-1]
		if !strings.Contains(host, ":") {
			return "", errors.New("has brackets around something that is not an IPv6 address")
		}
	case strings.Contains(s, ":"):
		var err error
		if host, port, err = net.SplitHostPort(s); err != nil {
			return "", errors.New("is not HOST:PORT")
		}
		if _, err := ParsePort(port); err != nil {
			return "", fmt.Errorf("has a port that %w", err)
		}
		if strings.HasPrefix(s, "[") && !strings.Contains(host, ":") {
			return "", errors.New("has brackets around something that is not an IPv6 address")
		}
	}
	host, err := parseHost(host)
	if err != nil {
		return "", err
	}
	number, _ := strconv.Atoi(port) // without leading zeros; ParsePort has seen it
	return net.JoinHostPort(host, strconv.Itoa(number)), nil
}

// parseHost reads a DNS name or an address.
func parseHost(host string) (string, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" {
			return "", errors.New("has a zone, and link-local addresses are not possible here")
		}
		return addr.Unmap().String(), nil
	}
	name := strings.TrimSuffix(host, ".")
	if name == "" {
		return "", errors.New("has no host")
	}
	if len(name) > 253 {
		return "", errors.New("has a host name of more than 253 letters")
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' || !isLabel(label) {
			return "", errors.New("has a host that is neither an address nor a DNS name")
		}
	}
	// 10.0.0.256 is a typing error, not a name that a resolver should be asked for.
	if isNumber(labels[len(labels)-1]) {
		return "", errors.New("has a host that is neither an address nor a DNS name")
	}
	return host, nil
}

func isLabel(s string) bool {
	for _, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}

// ParseListen reads where to listen: :PORT (all addresses), ADDR:PORT, [ADDR6]:PORT or localhost:PORT. Port 0 is any
// free one.
func ParseListen(s string) (string, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return "", errors.New("is not ADDR:PORT")
	}
	if port != "0" {
		number, err := ParsePort(port)
		if err != nil {
			return "", fmt.Errorf("has a port that %w", err)
		}
		port = strconv.Itoa(int(number))
	}
	if host == "" || host == "localhost" {
		return net.JoinHostPort(host, port), nil
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" {
		return "", errors.New("has a host that is not an address of this machine")
	}
	return net.JoinHostPort(addr.Unmap().String(), port), nil
}
