// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

// incumbentRules are what yurt-tunnel, and edge-tunnel before this one, put into the nat table of a node: a chain TUNNEL-PORT, a chain
// TUNNEL-PORT-PORT for each port, and a jump to the first from OUTPUT.
type incumbentRules struct {
	Tool   string          `json:"tool"` // such as iptables-nft
	Chains []string        `json:"chains"`
	Rules  []string        `json:"rules"` // of these chains, "-A CHAIN …", in their order
	Jumps  []incumbentJump `json:"jumps"` // from other chains
}

type incumbentJump struct {
	Chain    string `json:"chain"`
	Position int    `json:"position"` // in the chain, from 1 on
	Rule     string `json:"rule"`     // without "-A CHAIN"
}

const incumbentChain = "TUNNEL-PORT"

// isIncumbent reports whether a chain is one of theirs.
func isIncumbent(chain string) bool {
	port, ok := strings.CutPrefix(chain, incumbentChain)
	if !ok || port == "" {
		return ok
	}
	return len(port) > 1 && port[0] == '-' && strings.Trim(port[1:], "0123456789") == ""
}

// parseSave finds their rules in what iptables-save prints.
func parseSave(text string) incumbentRules {
	var found incumbentRules
	length := make(map[string]int)
	nat := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			nat = line == "*nat"
		case !nat:
		case strings.HasPrefix(line, ":"):
			if name, _, _ := strings.Cut(line[1:], " "); isIncumbent(name) {
				found.Chains = append(found.Chains, name)
			}
		case strings.HasPrefix(line, "-A "):
			chain, rule, _ := strings.Cut(line[len("-A "):], " ")
			length[chain]++
			if isIncumbent(chain) {
				found.Rules = append(found.Rules, line)
			} else if isIncumbent(targetOf(rule)) {
				found.Jumps = append(found.Jumps, incumbentJump{Chain: chain, Position: length[chain], Rule: rule})
			}
		}
	}
	return found
}

// targetOf is what follows -j, outside of quotes.
func targetOf(rule string) string {
	quoted, escaped, word, last := false, false, "", ""
	for _, r := range rule + " " {
		switch {
		case escaped:
			escaped = false
			word += `\` + string(r) // in a name of ours nothing is escaped
		case r == '\\':
			escaped = true
		case r == '"':
			quoted = !quoted
			word += " " // what was quoted is no word of ours
		case r == ' ' && !quoted:
			if last == "-j" {
				return word
			}
			last, word = word, ""
		default:
			word += string(r)
		}
	}
	return ""
}

func (r incumbentRules) empty() bool { return len(r.Chains) == 0 && len(r.Jumps) == 0 }

// removal is a script for iptables-restore, which does all of it at once.
func (r incumbentRules) removal() []string {
	var script []string
	for _, j := range r.Jumps {
		script = append(script, "-D "+j.Chain+" "+j.Rule)
	}
	for _, c := range r.Chains {
		script = append(script, "-F "+c)
	}
	for _, c := range r.Chains {
		script = append(script, "-X "+c)
	}
	return script
}

// creation is its reverse.
func (r incumbentRules) creation() []string {
	var script []string
	for _, c := range r.Chains {
		script = append(script, "-N "+c)
	}
	script = append(script, r.Rules...)
	for _, j := range r.Jumps {
		script = append(script, fmt.Sprintf("-I %s %d %s", j.Chain, j.Position, j.Rule))
	}
	return script
}

// valid keeps a file that somebody has edited from doing anything else.
func (r incumbentRules) valid() error {
	for _, c := range r.Chains {
		if !isIncumbent(c) {
			return fmt.Errorf("%q is none of the incumbent's chains", c)
		}
	}
	for _, line := range r.Rules {
		chain, _, _ := strings.Cut(strings.TrimPrefix(line, "-A "), " ")
		if !isIncumbent(chain) || strings.ContainsAny(line, "\r\n") {
			return fmt.Errorf("%q is no rule of the incumbent's chains", line)
		}
	}
	for _, j := range r.Jumps {
		if !isIncumbent(targetOf(j.Rule)) || j.Position < 1 || strings.ContainsAny(j.Chain+j.Rule, "\r\n") || strings.Contains(j.Chain, " ") {
			return fmt.Errorf("%q is no jump to the incumbent's chains", j.Rule)
		}
	}
	for _, tool := range iptablesTools {
		if tool == r.Tool {
			return nil
		}
	}
	return fmt.Errorf("%q is no iptables", r.Tool)
}

// iptablesTools are all of that name. The plain ones are another name of one of the others, and looked at where those are not there.
var iptablesTools = []string{"iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy", "iptables", "ip6tables"}

// readIncumbent looks for their rules with each iptables that there is.
func readIncumbent(ctx context.Context) ([]incumbentRules, error) {
	var all []incumbentRules
	have := make(map[string]bool)
	for _, tool := range iptablesTools {
		if _, err := exec.LookPath(tool + "-save"); err != nil || have[tool] {
			continue
		}
		family, _, _ := strings.Cut(tool, "-")
		have[family] = true
		out, err := outputOf(exec.CommandContext(ctx, tool+"-save"))
		if err != nil {
			return nil, err
		}
		if found := parseSave(out); !found.empty() {
			found.Tool = tool
			all = append(all, found)
		}
	}
	if len(have) == 0 {
		return nil, cli.WithHint(errors.New("there is no iptables-save"), "run it on the node itself, in its network namespace, with the iptables that the old tunnel used")
	}
	return all, nil
}

// restore has iptables carry out a script for the nat table, all of it or nothing.
func restore(ctx context.Context, tool string, script []string) error {
	cmd := exec.CommandContext(ctx, tool+"-restore", "--noflush", "--wait", "5")
	cmd.Stdin = strings.NewReader("*nat\n" + strings.Join(script, "\n") + "\nCOMMIT\n")
	_, err := outputOf(cmd)
	return err
}

func outputOf(cmd *exec.Cmd) (string, error) {
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}
