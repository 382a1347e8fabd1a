// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// PortVar adds a flag for one port. The default is what *p holds.
func PortVar(fs *pflag.FlagSet, p *uint16, name, usage string) {
	fs.Var(&single[uint16]{
		p: p, typ: "PORT", expect: "a port from 1 to 65535", parse: ParsePort,
		format: func(v uint16) string { return strconv.Itoa(int(v)) },
	}, name, usage)
}

// ListenVar adds a flag for where to listen, see [ParseListen]. The default is what *p holds.
func ListenVar(fs *pflag.FlagSet, p *string, name, usage string) {
	fs.Var(&single[string]{
		p: p, typ: "ADDR", expect: "ADDR:PORT, such as 127.0.0.1:10265, [::1]:10265, or :10262 for all addresses",
		parse: ParseListen, format: func(v string) string { return v },
	}, name, usage)
}

// PortsVar adds a flag for a list of ports, without duplicates and in ascending order. The default is what *p holds.
func PortsVar(fs *pflag.FlagSet, p *[]uint16, name, usage string) {
	ListVar(fs, p, name, List[uint16]{Type: "PORT", Form: "ports from 1 to 65535, such as 9100,10250", Parse: ParsePort, Sorted: true}, usage)
}

// AddrsVar adds a flag for a list of IP addresses, without duplicates. The default is what *p holds.
func AddrsVar(fs *pflag.FlagSet, p *[]netip.Addr, name, usage string) {
	ListVar(fs, p, name, List[netip.Addr]{Type: "IP", Form: "IP addresses, such as 10.0.0.5,2001:db8::5", Parse: ParseAddr}, usage)
}

// PrefixesVar adds a flag for a list of address ranges, without duplicates. The default is what *p holds.
func PrefixesVar(fs *pflag.FlagSet, p *[]netip.Prefix, name, usage string) {
	ListVar(fs, p, name, List[netip.Prefix]{Type: "CIDR", Form: "ranges of addresses, such as 10.99.0.0/16,2001:db8::/64", Parse: ParsePrefix}, usage)
}

// HostPortsVar adds a flag for a list of HOST[:PORT], see [ParseHostPort], without duplicates.
func HostPortsVar(fs *pflag.FlagSet, p *[]string, name string, defaultPort uint16, usage string) {
	ListVar(fs, p, name, List[string]{
		Type:  "HOST:PORT",
		Form:  fmt.Sprintf("HOST or HOST:PORT, such as cloud.example.com, 192.0.2.1:%d or [2001:db8::1]:%[1]d", defaultPort),
		Parse: func(s string) (string, error) { return ParseHostPort(s, defaultPort) },
	}, usage)
}

// List is how the entries of a list flag look.
type List[T comparable] struct {
	Type   string                  // shown in the help, such as PORT
	Form   string                  // completes "expected …"
	Parse  func(string) (T, error) // its error completes a sentence that begins with the entry
	Sorted bool                    // by its text when it is no number
}

// ListVar adds a flag for a list: commas or repeated flags. The first use replaces the default, which is what *p holds.
func ListVar[T comparable](fs *pflag.FlagSet, p *[]T, name string, l List[T], usage string) {
	fs.Var(&list[T]{p: p, List: l}, name, usage)
}

type list[T comparable] struct {
	List[T]
	p   *[]T
	set bool
}

func (l *list[T]) Type() string { return l.List.Type + ",..." }
func (l *list[T]) form() string { return l.Form }

func (l *list[T]) String() string {
	if l.p == nil {
		return ""
	}
	texts := make([]string, 0, len(*l.p))
	for _, v := range *l.p {
		texts = append(texts, fmt.Sprint(v))
	}
	return strings.Join(texts, ",")
}

func (l *list[T]) Set(text string) error {
	var values []T
	if l.set {
		values = *l.p
	}
	var bad []error
	for entry := range strings.SplitSeq(text, ",") {
		entry = strings.TrimSpace(entry)
		v, err := l.Parse(entry)
		switch {
		case entry == "":
			bad = append(bad, errors.New("an entry is empty"))
		case err != nil:
			bad = append(bad, fmt.Errorf("%q %w", shortened(entry), err))
		case !slices.Contains(values, v):
			values = append(values, v)
		}
		if len(bad) == 3 { // enough to see what is wrong
			break
		}
	}
	if bad != nil {
		return errors.Join(bad...)
	}
	if l.Sorted {
		slices.SortFunc(values, compareText[T])
	}
	*l.p, l.set = values, true
	return nil
}

// compareText orders numbers by size and everything else by its text: a shorter decimal number is a smaller one.
func compareText[T any](a, b T) int {
	x, y := fmt.Sprint(a), fmt.Sprint(b)
	if len(x) != len(y) && isNumber(x) && isNumber(y) {
		return len(x) - len(y)
	}
	return strings.Compare(x, y)
}

// Choice is one of the words that a flag accepts, and what it stands for.
type Choice[T comparable] struct {
	Word  string
	Value T
}

// ChoiceVar adds a flag that accepts one of several words. The default is what *p holds.
func ChoiceVar[T comparable](fs *pflag.FlagSet, p *T, name string, choices []Choice[T], usage string) {
	choiceVar(fs, p, name, "", choices, usage)
}

// ChoiceVarP is [ChoiceVar] with a one-letter name as well.
func ChoiceVarP[T comparable](fs *pflag.FlagSet, p *T, name, shorthand string, choices []Choice[T], usage string) {
	choiceVar(fs, p, name, shorthand, choices, usage)
}

func choiceVar[T comparable](fs *pflag.FlagSet, p *T, name, shorthand string, choices []Choice[T], usage string) {
	words := make([]string, 0, len(choices))
	for _, c := range choices {
		words = append(words, c.Word)
	}
	form := strings.Join(words, " or ")
	if n := len(words); n > 2 {
		form = strings.Join(words[:n-1], ", ") + " or " + words[n-1]
	}
	fs.VarP(&single[T]{
		p: p, typ: strings.Join(words, "|"), expect: form,
		parse: func(s string) (T, error) {
			for _, c := range choices {
				if c.Word == s {
					return c.Value, nil
				}
			}
			var none T
			return none, errors.New("is not one of the choices")
		},
		format: func(v T) string {
			for _, c := range choices {
				if c.Value == v {
					return c.Word
				}
			}
			return ""
		},
	}, name, shorthand, usage)
}

// single is a flag with one value.
type single[T any] struct {
	p           *T
	typ, expect string
	parse       func(string) (T, error)
	format      func(T) string
}

func (s *single[T]) Type() string { return s.typ }
func (s *single[T]) form() string { return s.expect }

func (s *single[T]) String() string {
	if s.p == nil {
		return ""
	}
	return s.format(*s.p)
}

func (s *single[T]) Set(text string) error {
	v, err := s.parse(text)
	if err != nil {
		return fmt.Errorf("%q %w", shortened(text), err)
	}
	*s.p = v
	return nil
}

// shortened keeps a pasted file out of an error message.
func shortened(text string) string {
	const most = 100
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "…"
}
