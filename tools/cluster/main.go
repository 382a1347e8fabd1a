// SPDX-License-Identifier: Apache-2.0

// Command cluster prepares the Kubernetes that tests run against; "make" calls it.
//
//	cluster build      build the programs if the cache lacks them, and print where they are
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 || args[0] != "build" {
		return fmt.Errorf("usage: cluster build")
	}
	path, err := kubebed.Build(ctx, os.Stderr)
	if err != nil {
		return err
	}
	fmt.Println(path)
	return nil
}
