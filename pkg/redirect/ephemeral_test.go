// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"net"
	"os"
	"slices"
	"testing"
)

// TestEphemeralPorts: the bind hook cannot keep a redirect port from whoever asks for any port, so those that can be had that way are told.
func TestEphemeralPorts(t *testing.T) {
	l := newLab(t)
	k := l.open()
	set := func(setting, value string) { must(t, os.WriteFile("/proc/sys/net/ipv4/"+setting, []byte(value), 0)) }
	for _, c := range []struct {
		ports, reserved string
		want            []uint16
	}{
		{"32768 60999", "", nil},
		{"1024 65535", "", []uint16{10270, 10271, 10272, 10273, 10274, 10275, 10276, 10277}},
		{"10276 10999", "", []uint16{10276, 10277}},
		{"1024 65535", "8080,10270-10276", []uint16{10277}},
		{"1024 65535", "10000-11000", nil},
	} {
		set("ip_local_port_range", c.ports)
		set("ip_local_reserved_ports", c.reserved)
		if got, err := k.EphemeralPorts(); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q without %q: %v, %v; want %v", c.ports, c.reserved, got, err, c.want)
		}
	}
}

// TestEphemeralPortIsNotGuarded shows why they are told.
func TestEphemeralPortIsNotGuarded(t *testing.T) {
	l := newLab(t)
	k := l.open()
	must(t, k.Attach())
	set := func(setting, value string) { must(t, os.WriteFile("/proc/sys/net/ipv4/"+setting, []byte(value), 0)) }
	set("ip_local_port_range", "10270 10277")
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("the hook guards these, too: %v", err)
	}
	must(t, listener.Close())
	set("ip_local_reserved_ports", "10270-10277")
	if listener, err := net.Listen("tcp4", "127.0.0.1:0"); err == nil {
		t.Errorf("%v is reserved", listener.Addr())
		_ = listener.Close()
	}
}

func FuzzParsePortList(f *testing.F) {
	for _, text := range []string{"32768\t60999\n", "\n", "8080,10270-10277\n", "1-2-3", "-", "70000"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parsePortList(text)
		if err == nil && len(list) > len(text) {
			t.Errorf("%q gives %v", text, list)
		}
	})
}
