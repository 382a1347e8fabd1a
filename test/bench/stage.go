// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
)

// stage is the lab's T outside of a test: it keeps what has to be undone, and what the lab calls fatal ends the suite.
type stage struct {
	progress
	cleanups []func()
	failed   bool
}

// unmade is the panic value by which Fatalf leaves; clear turns it into an error.
type unmade struct{ text string }

func (s *stage) Helper()                           {}
func (s *stage) Logf(format string, args ...any)   { s.say(format, args...) }
func (s *stage) Fatalf(format string, args ...any) { panic(unmade{fmt.Sprintf(format, args...)}) }
func (s *stage) Skipf(format string, args ...any)  { s.Fatalf(format, args...) }
func (s *stage) Failed() bool                      { return s.failed }
func (s *stage) Cleanup(f func())                  { s.cleanups = append(s.cleanups, f) }

// clear undoes everything, last thing first. It is deferred, and also runs when something panics.
func (s *stage) clear(err *error) {
	if p := recover(); p != nil {
		u, ok := p.(unmade)
		if !ok {
			defer panic(p) // after the clean-up
		}
		*err = errors.New(u.text)
	}
	s.failed = *err != nil
	for i := len(s.cleanups) - 1; i >= 0; i-- {
		s.cleanups[i]()
	}
}
