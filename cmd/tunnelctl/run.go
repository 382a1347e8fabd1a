// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

func run(ctx context.Context, env cli.Env) error {
	return newRoot(env).ExecuteContext(ctx)
}

func newRoot(env cli.Env) *cobra.Command {
	root := &cobra.Command{
		Use:   "tunnelctl",
		Short: "Make certificates for edge-tunnel, and look at a running tunnel-server or tunnel-agent.",
		Example: examples(
			"Make a CA and the certificates of a server and of an agent:",
			"tunnelctl pki init --dir pki\ntunnelctl pki issue-server --dir pki --name cloud-1 --host cloud.example.com\ntunnelctl pki issue-agent --dir pki --node edge-1 --ip 10.99.1.10",
			"See what the server on this node intercepts:", "tunnelctl targets",
			"Complete commands with the tab key in this bash:", "source <(tunnelctl completion bash)"),
		Version:       cli.Version(),
		SilenceErrors: true, // cli.Main tells about them
		SilenceUsage:  true,
	}
	root.AddGroup(&cobra.Group{ID: groupLook, Title: "LOOK AT A DAEMON"}, &cobra.Group{ID: groupAct, Title: "CHANGE SOMETHING"})
	root.AddCommand(
		inGroup(groupLook, statusCommand(env)), inGroup(groupLook, targetsCommand(env)),
		inGroup(groupLook, tunnelsCommand(env)), inGroup(groupLook, connectionsCommand(env)),
		inGroup(groupAct, pkiCommand(env)), inGroup(groupAct, forgetCommand(env)),
		inGroup(groupAct, drainCommand(env)), inGroup(groupAct, mountCommand(env)),
		inGroup(groupAct, cleanupCommand(env)), inGroup(groupAct, migrateCommand(env)),
		pauseCommand(), awaitCommand(env),
	)
	ofSubcommands(root)
	tameCompletion(root)
	root.SetHelpCommand(helpCommand(root))
	root.SetHelpFunc(func(cmd *cobra.Command, _ []string) { writeHelp(env.Stdout, cmd) })
	root.SetVersionTemplate(cli.VersionLine(root.Name()) + "\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return helpHint(cmd, cli.FlagError(cmd.Flags(), err)) })
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetArgs(env.Args)
	return root
}

const (
	groupLook = "look"
	groupAct  = "act"
)

func inGroup(id string, cmd *cobra.Command) *cobra.Command {
	cmd.GroupID = id
	return cmd
}

// command makes cobra check what every command of ours wants checked before it runs. args is nil for commands without arguments.
func command(cmd *cobra.Command, args func([]string) error, run func(context.Context, []string) error) *cobra.Command {
	if args == nil {
		args = cli.NoArgs
	}
	cmd.DisableFlagsInUseLine = true
	cmd.Args = func(cmd *cobra.Command, given []string) error {
		return helpHint(cmd, errors.Join(args(given), cli.Missing(cmd.Flags())))
	}
	cmd.RunE = func(cmd *cobra.Command, given []string) error { return run(cmd.Context(), given) }
	return cmd
}

// ofSubcommands makes a command that does nothing by itself: alone it shows its help, and a word that it does not know is an error.
func ofSubcommands(cmd *cobra.Command) *cobra.Command {
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(cmd, args[0])
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}

// tameCompletion gives cobra's own command the words and the exit statuses of ours.
func tameCompletion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() != "completion" {
			continue
		}
		c.Short = "Print a script that completes commands in your shell."
		c.Long = c.Short
		ofSubcommands(c)
		for _, shell := range c.Commands() {
			shell.Args = func(cmd *cobra.Command, args []string) error { return helpHint(cmd, cli.NoArgs(args)) }
			shell.Short = "Print the script for " + shell.Name() + "."
		}
	}
}

func unknownCommand(parent *cobra.Command, word string) error {
	var names []string
	for _, c := range parent.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	err := cli.Usagef("%s has no command %.100q", parent.CommandPath(), word)
	if name := cli.Nearest(word, names); name != "" {
		return cli.WithHint(err, fmt.Sprintf("did you mean %q?", parent.CommandPath()+" "+name))
	}
	return cli.WithHint(err, "its commands are "+strings.Join(names, ", "))
}

// helpHint points to the help of the command that was called, where nothing better is known.
func helpHint(cmd *cobra.Command, err error) error {
	return cli.OrHint(err, cmd.CommandPath()+" --help shows what is possible")
}
