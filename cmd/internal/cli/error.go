// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// ErrDone says that all was said and done while the flags were parsed (--help, --version). [Run] makes it status 0.
var ErrDone = errors.New("done")

// UsageError says that the command line makes no sense. It makes the exit status [StatusUsage].
type UsageError struct{ err error }

// Usagef is fmt.Errorf for a [UsageError].
func Usagef(format string, args ...any) error { return &UsageError{fmt.Errorf(format, args...)} }

func (e *UsageError) Error() string { return e.err.Error() }
func (e *UsageError) Unwrap() error { return e.err }

// WithHint adds to an error one sentence about what to do. A nil error stays nil.
func WithHint(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hinted{err, hint}
}

// OrHint is [WithHint] for those of the joined errors that have no hint of their own.
func OrHint(err error, hint string) error {
	if err == nil {
		return nil
	}
	parts := split(err)
	for i, part := range parts {
		if len(hints(part)) == 0 {
			parts[i] = WithHint(part, hint)
		}
	}
	return errors.Join(parts...)
}

type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }
func (h *hinted) Hint() string  { return h.hint }

// report writes each of the joined errors as one line, its hints below it. A hint that several errors share is
// given once, after the last of them.
func report(env Env, err error) {
	type entry struct {
		problem string
		hints   []string
	}
	var entries []entry
	for _, err := range split(err) {
		advice := hints(err)
		if usage := (*UsageError)(nil); len(advice) == 0 && errors.As(err, &usage) {
			advice = []string{fmt.Sprintf("%s --help shows what is possible", env.Name)}
		}
		entries = append(entries, entry{err.Error(), advice})
	}
	for i, e := range entries {
		fmt.Fprintf(env.Stderr, "error: %s\n", Visible(e.problem))
		for _, hint := range e.hints {
			if i+1 == len(entries) || !slices.Contains(entries[i+1].hints, hint) {
				fmt.Fprintf(env.Stderr, "hint: %s\n", Visible(hint))
			}
		}
	}
}

// split takes joined errors apart. What was wrapped around a join stays one error: its first words belong to all.
func split(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var texts []string
	var parts []error
	for _, part := range joined.Unwrap() {
		texts = append(texts, part.Error())
		parts = append(parts, split(part)...)
	}
	if err.Error() != strings.Join(texts, "\n") { // fmt.Errorf with two %w is a sentence, not a join
		return []error{err}
	}
	return parts
}

// hints finds the outermost hint on each branch of the chain.
func hints(err error) []string {
	if h, ok := err.(interface{ Hint() string }); ok {
		if hint := h.Hint(); hint != "" {
			return []string{hint}
		}
	}
	switch u := err.(type) { //nolint:errorlint // this walks the chain itself
	case interface{ Unwrap() error }:
		return hints(u.Unwrap())
	case interface{ Unwrap() []error }:
		var all []string
		for _, branch := range u.Unwrap() {
			for _, hint := range hints(branch) {
				if !slices.Contains(all, hint) {
					all = append(all, hint)
				}
			}
		}
		return all
	}
	return nil
}

// Visible keeps a text on its line and its bytes off the terminal's control functions: parts of it may come from the
// other end of a connection, or from a process that chose its own name.
func Visible(text string) string {
	text = strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, text)
}
