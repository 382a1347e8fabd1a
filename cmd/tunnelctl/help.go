// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

// examples makes the text of cobra's Example field from pairs of what and how.
func examples(pairs ...string) string {
	var list []cli.Example
	for i := 0; i+1 < len(pairs); i += 2 {
		list = append(list, cli.Example{What: pairs[i], Command: pairs[i+1]})
	}
	var b strings.Builder
	cli.WriteExamples(&b, list)
	return b.String()
}

// writeHelp is the same text as a daemon's --help, for a tree of commands.
func writeHelp(w io.Writer, cmd *cobra.Command) {
	text := cmd.Long
	if text == "" {
		text = cmd.Short
	}
	cli.WriteParagraphs(w, text)
	fmt.Fprint(w, "\nUSAGE\n")
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(w, "  %s COMMAND\n", cmd.CommandPath())
	} else {
		fmt.Fprintf(w, "  %s\n", cmd.UseLine())
	}
	for _, group := range append(cmd.Groups(), &cobra.Group{Title: otherCommands(cmd)}) {
		writeCommands(w, group, cmd.Commands())
	}
	writeFlags(w, "FLAGS", cmd.LocalFlags())
	writeFlags(w, "GLOBAL FLAGS", cmd.InheritedFlags())
	if strings.HasPrefix(cmd.Example, "\n") {
		fmt.Fprint(w, cmd.Example)
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(w, "\n%s COMMAND --help shows more about a command.\n", cmd.CommandPath())
	}
}

func otherCommands(cmd *cobra.Command) string {
	if len(cmd.Groups()) > 0 {
		return "MORE"
	}
	return "COMMANDS"
}

func writeCommands(w io.Writer, group *cobra.Group, all []*cobra.Command) {
	titled := false
	for _, c := range all {
		if !c.IsAvailableCommand() && c.Name() != "help" || c.GroupID != group.ID {
			continue
		}
		if !titled {
			fmt.Fprintf(w, "\n%s\n", group.Title)
			titled = true
		}
		fmt.Fprintf(w, "  %-14s %s\n", c.Name(), c.Short)
	}
}

func writeFlags(w io.Writer, title string, flags *pflag.FlagSet) {
	if flags.HasAvailableFlags() {
		for name, usage := range map[string]string{"help": "Show this text.", "version": "Show the version."} {
			if flag := flags.Lookup(name); flag != nil {
				flag.Usage = usage // cobra's words are not sentences
			}
		}
		fmt.Fprintf(w, "\n%s\n", title)
		cli.WriteFlags(w, flags)
	}
}

// helpCommand replaces cobra's, which takes a word that it does not know for success.
func helpCommand(root *cobra.Command) *cobra.Command {
	return command(&cobra.Command{Use: "help [COMMAND]", Short: "Show the help of a command."},
		func([]string) error { return nil },
		func(_ context.Context, args []string) error {
			target := root
			for _, word := range args {
				next := subcommand(target, word)
				if next == nil {
					return unknownCommand(target, word)
				}
				target = next
			}
			target.InitDefaultHelpFlag() // cobra adds these to the command that it runs only
			target.InitDefaultVersionFlag()
			return target.Help()
		})
}

func subcommand(parent *cobra.Command, name string) *cobra.Command {
	for _, c := range parent.Commands() {
		if c.Name() == name {
			return c
		}
	}
	return nil
}
