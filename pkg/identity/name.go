// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"errors"
	"fmt"
)

const maxName = 253

// CheckName reports why name cannot be the name of a node or a server. The rule is the one that Kubernetes has for
// node names: an RFC 1123 subdomain of at most 253 bytes, lower case. Like Kubernetes, and unlike DNS, it does not limit
// the length of one label.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("name is empty")
	case len(name) > maxName:
		return fmt.Errorf("name has %d bytes, at most %d are allowed", len(name), maxName)
	}
	prev := byte('.')
	for i := range len(name) {
		c := name[i]
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		case c == '-' && prev != '.':
		case c == '.' && prev != '.' && prev != '-':
		case c == '-' || c == '.':
			return fmt.Errorf("name %q: a part between dots must begin and end with a letter or digit", name)
		default:
			return fmt.Errorf("name %q: %q is not a lower-case letter, digit, '-' or '.'", name, c)
		}
		prev = c
	}
	if prev == '.' || prev == '-' {
		return fmt.Errorf("name %q: must end with a letter or digit", name)
	}
	return nil
}
