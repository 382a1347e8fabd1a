// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var accounts = []string{"controller", "server", "agent"} // tunnel-…, with the roles edge-tunnel-…

// request is what the API server's audit log says of one.
type request struct {
	User      struct{ Username string }
	Verb      string
	ObjectRef struct{ APIGroup, Resource, Subresource, Namespace, Name string }

	Annotations map[string]string
}

// audit makes the API server write down what our accounts ask for: the flags, and how to read it.
func audit(t *testing.T) (flags []string, read func() ([]request, error)) {
	t.Helper()
	policy, log := filepath.Join(t.TempDir(), "policy.json"), filepath.Join(t.TempDir(), "log")
	var users []string
	for _, a := range accounts {
		users = append(users, "system:serviceaccount:kube-system:tunnel-"+a)
	}
	content, err := json.Marshal(map[string]any{
		"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": []string{"RequestReceived"},
		"rules": []map[string]any{{"level": "Metadata", "users": users}, {"level": "None"}},
	})
	if err == nil {
		err = os.WriteFile(policy, content, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return []string{"--audit-policy-file=" + policy, "--audit-log-path=" + log}, func() ([]request, error) {
		f, err := os.Open(log)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		var requests []request
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var r request
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				return nil, fmt.Errorf("audit log: %w: %s", err, lines.Bytes())
			}
			requests = append(requests, r)
		}
		return requests, lines.Err()
	}
}

// seldom are rights that a run of these tests has no need of.
var seldom = []string{
	"controller get pods",      // before Kubernetes 1.30
	"controller create events", // a ConfigMap of names that is nearly full
	"controller patch events",
	"controller delete leases", // a server that is gone for good
}

// lacking fails for each right that somebody lacked. Who is being uninstalled lacks all.
func (w *world) lacking() error {
	requests, err := w.audited()
	errs := []error{err}
	for _, r := range requests {
		if r.Annotations["authorization.k8s.io/decision"] != "allow" {
			errs = append(errs, fmt.Errorf("forbidden: %+v", r))
		}
	}
	return errors.Join(errs...)
}

// unused fails for each right that nobody has used.
func (w *world) unused() error {
	requests, err := w.audited()
	if err != nil {
		return err
	}
	var errs []error
	for _, kind := range []string{"clusterroles", "roles"} {
		var roles struct {
			Items []struct {
				Metadata struct{ Name, Namespace string }
				Rules    []struct{ APIGroups, Resources, ResourceNames, Verbs []string }
			}
		}
		if err := w.Do(http.MethodGet, "/apis/rbac.authorization.k8s.io/v1/"+kind+"?labelSelector=app.kubernetes.io/name=edge-tunnel", nil, &roles); err != nil {
			return err
		}
		if len(roles.Items) < len(accounts)-1 {
			return fmt.Errorf("%s: %+v", kind, roles.Items)
		}
		for _, role := range roles.Items {
			account := strings.TrimPrefix(role.Metadata.Name, "edge-tunnel-")
			for _, rule := range role.Rules {
				for _, verb := range rule.Verbs {
					what := account + " " + verb + " " + strings.Join(rule.Resources, ",")
					used := slices.ContainsFunc(requests, func(r request) bool {
						o := r.ObjectRef
						resource := strings.TrimSuffix(o.Resource+"/"+o.Subresource, "/")
						return strings.HasSuffix(r.User.Username, ":tunnel-"+account) && slices.Contains(rule.APIGroups, o.APIGroup) && slices.Contains(rule.Resources, resource) &&
							(len(rule.ResourceNames) == 0 || slices.Contains(rule.ResourceNames, o.Name)) && (kind == "clusterroles" || o.Namespace == role.Metadata.Namespace) &&
							(r.Verb == verb || verb == "list" && r.Verb == "watch") // newer API servers stream the list
					})
					if !used && rule.Resources[0] != "signers" && !slices.Contains(seldom, what) { // signers are asked about within the API server
						errs = append(errs, fmt.Errorf("nobody used: %s %v in %q", what, rule.ResourceNames, role.Metadata.Namespace))
					}
				}
			}
		}
	}
	return errors.Join(errs...)
}
