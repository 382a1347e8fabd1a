// SPDX-License-Identifier: Apache-2.0

// Command importcheck fails when a package imports something that its place in the layout does not allow. The
// layout is the table in rules.go; ARCHITECTURE.md explains it to people, this program holds the code to it.
//
// Only what is compiled into the programs is judged. A package's own tests may import what they like, except that
// nothing but tests may import a package that exists for tests.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

const module = "github.com/edge-tunnel/edge-tunnel"

func main() {
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(out io.Writer) error {
	packages, err := list()
	if err != nil {
		return err
	}
	broken := check(packages)
	for _, sentence := range broken {
		fmt.Fprintln(out, sentence)
	}
	if len(broken) > 0 {
		return fmt.Errorf("%d imports against the layout (tools/importcheck/rules.go)", len(broken))
	}
	return nil
}

// pkg is what go list says about one package.
type pkg struct {
	ImportPath string
	Imports    []string
}

// list asks for every package of the module as it is built for Linux.
func list() ([]pkg, error) {
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Imports", "./...")
	cmd.Env = append(os.Environ(), "GOOS=linux")
	cmd.Stderr = os.Stderr
	raw, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var packages []pkg
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return packages, nil
		} else if err != nil {
			return nil, fmt.Errorf("read go list: %w", err)
		}
		packages = append(packages, p)
	}
}
