// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

// What the chart's hooks are made of, which clean every node up before Kubernetes deletes the rest. Helm waits for Jobs only, so one of them waits for the
// DaemonSet that does it. It asks the API server without client-go, which would double the size of this program.

// pauseCommand is the container of a pod whose work was done by init containers.
func pauseCommand() *cobra.Command {
	return command(&cobra.Command{Use: "pause", Short: "Do nothing until SIGTERM, as the pod of a DaemonSet has to.", Hidden: true,
		Example: examples("In a pod:", "tunnelctl pause")}, nil,
		func(ctx context.Context, _ []string) error {
			<-ctx.Done()
			return nil
		})
}

func awaitCommand(env cli.Env) *cobra.Command {
	var within time.Duration
	cmd := command(&cobra.Command{
		Use:     "await [--within DURATION] NAMESPACE/NAME",
		Short:   "Wait until each pod of a DaemonSet is ready.",
		Long:    "Waits, in a pod, until each pod of a DaemonSet is ready. Nodes that are off never are: after a while that is said, and no failure.",
		Example: examples("In a pod that may get that DaemonSet:", "tunnelctl await kube-system/tunnel-cleanup"),
		Hidden:  true,
	}, func(args []string) error {
		if namespace, name, ok := strings.Cut(strings.Join(args, " "), "/"); !ok || namespace == "" || name == "" || strings.ContainsAny(name, "/ ") {
			return cli.Usagef("expected one NAMESPACE/NAME")
		}
		return nil
	}, nil)
	cmd.Flags().DurationVar(&within, "within", 3*time.Minute, "How long to wait.")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		namespace, name, _ := strings.Cut(args[0], "/")
		api, err := newPodAPI("/var/run/secrets/kubernetes.io/serviceaccount", env.Getenv)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), within)
		defer cancel()
		return api.await(ctx, env.Stdout, namespace, name)
	}
	return cmd
}

// podAPI is the API server as a pod reaches it.
type podAPI struct {
	url, token string
	client     http.Client
	every      time.Duration
}

func newPodAPI(dir string, getenv func(string) string) (*podAPI, error) {
	token, err := os.ReadFile(filepath.Join(dir, "token"))
	ca, caErr := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err := errors.Join(err, caErr); err != nil {
		return nil, fmt.Errorf("read the pod's account: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("read the pod's account: %s has no certificate", filepath.Join(dir, "ca.crt"))
	}
	return &podAPI{
		url:   "https://" + net.JoinHostPort(getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")),
		token: strings.TrimSpace(string(token)),
		client: http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}},
		every: time.Second,
	}, nil
}

func (a *podAPI) await(ctx context.Context, out io.Writer, namespace, name string) error {
	for {
		missing, err := a.missing(ctx, namespace, name)
		if err == nil && missing == 0 {
			fmt.Fprintf(out, "all pods of DaemonSet %s/%s are ready\n", namespace, name)
			return nil
		}
		select {
		case <-ctx.Done():
			if err != nil {
				return err
			}
			fmt.Fprintf(out, "%d pods of DaemonSet %s/%s are not ready, and not waited for any longer\n", missing, namespace, name)
			return nil
		case <-time.After(a.every):
		}
	}
}

// missing is how many pods are not ready, at least one as long as nobody has looked at the DaemonSet.
func (a *podAPI) missing(ctx context.Context, namespace, name string) (int, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.client.Timeout) // the last answer is wanted after the end, too
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/apis/apps/v1/namespaces/%s/daemonsets/%s", a.url, namespace, name), http.NoBody)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	resp, err := a.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var set struct {
		Message  string
		Metadata struct{ Generation int }
		Status   struct{ ObservedGeneration, DesiredNumberScheduled, NumberReady int }
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&set); err != nil {
		return 0, fmt.Errorf("DaemonSet %s/%s: answer %s: %w", namespace, name, resp.Status, err)
	}
	switch s := set.Status; {
	case resp.StatusCode != http.StatusOK:
		return 0, fmt.Errorf("DaemonSet %s/%s: %s: %s", namespace, name, resp.Status, set.Message)
	case s.ObservedGeneration < set.Metadata.Generation:
		return 1, nil
	default:
		return s.DesiredNumberScheduled - s.NumberReady, nil
	}
}
