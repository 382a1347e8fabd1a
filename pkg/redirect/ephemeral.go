// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// EphemeralPorts returns those of the redirect ports that the kernel may hand to any socket that asks for no particular port. The bind
// hook is not asked then: whoever gets one while no daemon runs can listen there, and a daemon cannot have it back before it is
// closed. There are none unless somebody has widened net.ipv4.ip_local_port_range; net.ipv4.ip_local_reserved_ports takes
// them out again. Both are those of this thread's network namespace.
func (k *Kernel) EphemeralPorts() ([]uint16, error) {
	ephemeral, err := readPortList("ip_local_port_range")
	if err != nil {
		return nil, err
	}
	reserved, err := readPortList("ip_local_reserved_ports")
	if err != nil {
		return nil, err
	}
	var ports []uint16
	for _, port := range k.RedirectPorts() {
		if ephemeral.has(port) && !reserved.has(port) {
			ports = append(ports, port)
		}
	}
	return ports, nil
}

// portList has ranges of ports, both ends included.
type portList [][2]uint16

func (l portList) has(port uint16) bool {
	for _, r := range l {
		if r[0] <= port && port <= r[1] {
			return true
		}
	}
	return false
}

func readPortList(setting string) (portList, error) {
	path := "/proc/sys/net/ipv4/" + setting
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, explain("read "+path, err)
	}
	list, err := parsePortList(string(text))
	if err != nil {
		return nil, fail("read "+path, err, "")
	}
	return list, nil
}

// parsePortList reads "8080,10270-10277" and, which is how the kernel writes its one range, "32768	60999".
func parsePortList(text string) (portList, error) {
	var list portList
	for part := range strings.SplitSeq(strings.TrimSpace(text), ",") {
		if part == "" {
			continue
		}
		from, to, isRange := strings.Cut(strings.ReplaceAll(part, "\t", "-"), "-")
		if !isRange {
			to = from
		}
		first, err := strconv.ParseUint(from, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%.20q is no port", from)
		}
		last, err := strconv.ParseUint(to, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("%.20q is no port", to)
		}
		list = append(list, [2]uint16{uint16(first), uint16(last)})
	}
	return list, nil
}
