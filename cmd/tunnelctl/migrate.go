// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

// migration is what migrate answers.
type migration struct {
	Action string           `json:"action"` // plan, apply or undo
	Rules  []incumbentRules `json:"rules"`  // that are removed, or put back
	Kept   string           `json:"kept"`   // the file from which they can be put back
}

func migrateCommand(env cli.Env) *cobra.Command {
	var (
		d, o               = newDaemon(), output{}
		apply, undo, force bool
		state              = "/var/lib/edge-tunnel"
	)
	cmd := command(&cobra.Command{
		Use:   "migrate [--apply | --undo] [--force] [--state-dir DIR] [--control PATH] [-o json]",
		Short: "Take the rules of yurt-tunnel out of this node's iptables, or put them back.",
		Long: "Shows what yurt-tunnel, or the edge-tunnel of old, has in this node's iptables: the chain TUNNEL-PORT, one chain for each port, and the jump to them " +
			"from OUTPUT. --apply removes them, at once, and keeps them in a file; --undo puts them back as they were. Nobody else's rules are touched." +
			"\n\nBoth tunnels may serve a node at a time: a connection that this one redirects never meets those rules. So: install tunnel-server, see that it is ready and " +
			"`tunnelctl targets` shows the edge nodes online, stop yurt-tunnel-server, which otherwise writes its rules anew, and apply. --apply is refused while no tunnel-server is ready " +
			"here. Back again: start yurt-tunnel-server, --undo, then `tunnelctl cleanup --leave`.",
		Example: examples(
			"What would change:", "tunnelctl migrate",
			"Change it, and back:", "tunnelctl migrate --apply; tunnelctl migrate --undo"),
	}, nil, func(ctx context.Context, _ []string) error {
		answer := migration{Action: "plan", Kept: filepath.Join(state, "migrate.json")}
		var err error
		switch {
		case apply && undo:
			return cli.Usagef("--apply and --undo: only one of them")
		case undo:
			answer.Action = "undo"
			answer.Rules, err = undoMigration(ctx, answer.Kept)
		case apply && !force:
			status, asked := d.client().Status(ctx)
			if asked != nil || !status.Ready || status.Server == nil {
				return cli.WithHint(errors.Join(errors.New("no tunnel-server is ready on this node, connections to edge nodes would go nowhere"), asked),
					"`tunnelctl status` says what is missing; --force removes the rules all the same")
			}
			fallthrough
		default:
			if answer.Rules, err = readIncumbent(ctx); err == nil && apply {
				answer.Action = "apply"
				err = applyMigration(ctx, answer.Kept, answer.Rules)
			}
		}
		if err != nil {
			return err
		}
		return o.write(env.Stdout, answer, answer.table)
	})
	d.flag(cmd, false)
	o.flag(cmd)
	cmd.Flags().BoolVar(&apply, "apply", false, "Remove the rules.")
	cmd.Flags().BoolVar(&undo, "undo", false, "Put back what was removed.")
	cmd.Flags().BoolVar(&force, "force", false, "Remove them also where no tunnel-server is ready.")
	cmd.Flags().StringVar(&state, "state-dir", state, "Keep what was removed in this `DIR`.")
	return cmd
}

func (m migration) table(w io.Writer) error {
	if len(m.Rules) == 0 {
		fmt.Fprintln(w, "nothing of yurt-tunnel is in this node's iptables")
		return nil
	}
	does := map[string]string{"plan": "would remove", "apply": "removed", "undo": "put back"}[m.Action]
	var rows [][]string
	for _, r := range m.Rules {
		for _, j := range r.Jumps {
			rows = append(rows, []string{r.Tool, does, "-A " + j.Chain + " " + j.Rule})
		}
		for _, rule := range r.Rules {
			rows = append(rows, []string{r.Tool, does, rule})
		}
	}
	if err := table(w, "TOOL ACTION RULE", rows); err != nil {
		return err
	}
	switch m.Action {
	case "plan":
		fmt.Fprintln(w, "\nnothing was changed: --apply does")
	case "apply":
		fmt.Fprintf(w, "\nkept in %s: --undo puts them back\n", m.Kept)
	}
	return nil
}

// applyMigration keeps the rules, then removes them.
func applyMigration(ctx context.Context, file string, all []incumbentRules) error {
	if len(all) == 0 {
		return nil
	}
	text, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("keep the rules: %w", err)
	}
	if err := os.WriteFile(file+".new", append(text, '\n'), 0o600); err != nil {
		return fmt.Errorf("keep the rules: %w", err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		return fmt.Errorf("keep the rules: %w", err)
	}
	for _, r := range all {
		if err := restore(ctx, r.Tool, r.removal()); err != nil {
			return err
		}
	}
	return nil
}

// undoMigration puts back what was kept, in the place of what is there now.
func undoMigration(ctx context.Context, file string) ([]incumbentRules, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, cli.WithHint(fmt.Errorf("%s is not there, so nothing was removed", file), "--state-dir says where --apply kept it")
	}
	if err != nil {
		return nil, fmt.Errorf("read what was removed: %w", err)
	}
	kept, err := decodeRules(text)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	present, err := readIncumbent(ctx)
	if err != nil {
		return nil, err
	}
	for _, r := range kept {
		var script []string
		for _, p := range present {
			if p.Tool == r.Tool {
				script = p.removal()
			}
		}
		if err := restore(ctx, r.Tool, append(script, r.creation()...)); err != nil {
			return nil, err
		}
	}
	return kept, os.Remove(file)
}

func decodeRules(text []byte) ([]incumbentRules, error) {
	var kept []incumbentRules
	if err := json.Unmarshal(text, &kept); err != nil {
		return nil, err
	}
	for _, r := range kept {
		if err := r.valid(); err != nil {
			return nil, err
		}
	}
	return kept, nil
}
