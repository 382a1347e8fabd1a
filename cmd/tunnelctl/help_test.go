// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

// Every command says what it is, shows how it is called, and explains each of its flags in a sentence.
func TestHelpTeaches(t *testing.T) {
	var commands int
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		commands++
		path := cmd.CommandPath()
		if !strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: %q is no sentence", path, cmd.Short)
		}
		var help bytes.Buffer
		writeHelp(&help, cmd)
		examples := 0
		for line := range strings.Lines(help.String()) {
			line = strings.TrimSuffix(line, "\n")
			if len([]rune(line)) > 120 {
				t.Errorf("%s: a line of %d characters: %s", path, len(line), line)
			}
			if strings.HasPrefix(line, "  tunnelctl ") || strings.HasPrefix(line, "  source <(tunnelctl") {
				examples++
			}
		}
		ours := !strings.HasPrefix(path, "tunnelctl completion") && cmd.Name() != "help"
		if examples < 2 && ours { // the usage line is one
			t.Errorf("%s has no example:\n%s", path, &help)
		}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if ours && f.Name != "help" && f.Name != "version" && !strings.HasSuffix(f.Usage, ".") {
				t.Errorf("%s --%s: %q is no sentence", path, f.Name, f.Usage)
			}
		})
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	root := newRoot(cli.Env{Stdout: new(bytes.Buffer), Stderr: new(bytes.Buffer)})
	root.InitDefaultHelpCmd()
	walk(root)
	if commands < 12 {
		t.Errorf("only %d commands were looked at", commands)
	}
}
