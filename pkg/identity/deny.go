// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"errors"
	"fmt"
	"strings"
)

const (
	maxDenyFile    = 4 << 20 // bytes; 100,000 typical node names need half of it
	maxDenyReports = 5       // bad lines named in one error
	maxSerialHex   = 40      // RFC 5280: at most 20 octets

	serialPrefix = "serial:"
)

// denyList is a parsed deny file. The zero value denies nobody.
type denyList struct {
	names   map[string]struct{}
	serials map[string]struct{} // as serialText writes them
}

// parseDeny parses a whole deny file; its format is in the package comment. One bad line refuses all of it.
func parseDeny(data []byte) (denyList, error) {
	d := denyList{names: map[string]struct{}{}, serials: map[string]struct{}{}}
	var bad []error
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		entry, _, _ := strings.Cut(line, "#")
		entry = strings.TrimSpace(entry)
		if entry == "" {
			continue
		}
		if err := d.add(entry); err != nil {
			if len(bad) == maxDenyReports {
				bad = append(bad, errors.New("and more"))
				break
			}
			bad = append(bad, fmt.Errorf("line %d: %w", n, err))
		}
	}
	if len(bad) > 0 {
		return denyList{}, joinInLine(bad)
	}
	return d, nil
}

func (d denyList) add(entry string) error {
	if hex, ok := strings.CutPrefix(entry, serialPrefix); ok {
		serial, err := parseSerial(hex)
		if err != nil {
			return err
		}
		d.serials[serial] = struct{}{}
		return nil
	}
	if err := CheckName(entry); err != nil {
		return err
	}
	d.names[entry] = struct{}{}
	return nil
}

// match returns the entry that denies p, if any.
func (d denyList) match(p Peer) (entry string, denied bool) {
	if _, ok := d.names[p.Name]; ok {
		return p.Name, true
	}
	if _, ok := d.serials[p.Serial]; ok {
		return serialPrefix + p.Serial, true
	}
	return "", false
}

func (d denyList) len() int { return len(d.names) + len(d.serials) }

// parseSerial brings a serial number into the form of Peer.Serial: lower-case hexadecimal without leading zeros.
func parseSerial(s string) (string, error) {
	hex := strings.ToLower(strings.ReplaceAll(strings.TrimSpace(s), ":", ""))
	hex = strings.TrimLeft(hex, "0")
	if hex == "" && strings.Contains(s, "0") {
		return "0", nil
	}
	if hex == "" || len(hex) > maxSerialHex || strings.Trim(hex, "0123456789abcdef") != "" {
		return "", fmt.Errorf("%.60q is not a serial number in hexadecimal", s)
	}
	return hex, nil
}

// joinInLine joins errors with "; ": errors.Join's newlines do not fit a one-line report.
func joinInLine(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	var texts []string
	for _, err := range errs {
		texts = append(texts, err.Error())
	}
	return errors.New(strings.Join(texts, "; "))
}
