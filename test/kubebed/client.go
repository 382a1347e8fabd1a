// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// client asks the API server over HTTP: this module's tests need not have client-go for the little that they set up.
type client struct {
	url  string
	http *http.Client
}

func (s *Server) newClient(user string, groups ...string) (*client, error) {
	certPEM, keyPEM, err := s.pki.ca.issue(user, groups, nil, nil)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.pki.ca.cert)
	return &client{s.URL, &http.Client{
		Timeout: 30 * time.Second,
		// Nothing is kept alive: a connection would outlive the test, or the server.
		Transport: &http.Transport{DialContext: s.node.Dial, DisableKeepAlives: true,
			TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}},
	}}, nil
}

// StatusError is an answer of the API server that is not a success.
type StatusError struct {
	Code    int
	Message string
}

func (e *StatusError) Error() string { return fmt.Sprintf("status %d: %s", e.Code, e.Message) }

// do sends in and reads the answer into out, both JSON and both optional.
func (c *client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader = http.NoBody
	if in != nil {
		content, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(content)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return &StatusError{resp.StatusCode, strings.TrimSpace(string(content))}
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(content, out)
}

// Object is JSON without a type.
type Object = map[string]any

// Do asks the API server as its administrator; in and the answer out are JSON and may be nil. PATCH is a merge patch. An answer that is
// not a success is a [*StatusError].
func (s *Server) Do(method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := s.admin.do(ctx, method, path, in, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// Create makes an object in the collection at path, and ends the test if that fails.
func (s *Server) Create(path string, object Object) {
	s.t.Helper()
	if err := s.Do(http.MethodPost, path, object, nil); err != nil {
		s.t.Fatalf("%v", err)
	}
}

// ensure is Create for what may be there already.
func (s *Server) ensure(path string, object Object) {
	s.t.Helper()
	err := s.Do(http.MethodPost, path, object, nil)
	if status := (*StatusError)(nil); err != nil && !(errors.As(err, &status) && status.Code == http.StatusConflict) {
		s.t.Fatalf("%v", err)
	}
}

// Kubectl runs the kubectl of the server's version as administrator and returns what it wrote, trimmed. The error has it too.
func (s *Server) Kubectl(args ...string) (string, error) { return s.kubectl("", args) }

// Apply applies a manifest with kubectl.
func (s *Server) Apply(manifest string) {
	s.t.Helper()
	if _, err := s.kubectl(manifest, []string{"apply", "-f", "-"}); err != nil {
		s.t.Fatalf("apply a manifest: %v", err)
	}
}

// Install applies what a cluster of ours has: deploy/manifests, which the chart gives. Edits, pairs of old and new text, are made before.
func (s *Server) Install(edits ...string) {
	s.t.Helper()
	dir, err := moduleDir(context.Background())
	var manifest []byte
	if err == nil {
		manifest, err = os.ReadFile(filepath.Join(dir, "deploy", "manifests", "edge-tunnel.yaml"))
	}
	if err != nil {
		s.t.Fatalf("read the manifests: %v", err)
	}
	s.Apply(strings.NewReplacer(edits...).Replace(string(manifest)))
}

// KubectlCommand prepares a kubectl on the server's node, as administrator.
func (s *Server) KubectlCommand(ctx context.Context, args ...string) *netlab.Cmd {
	cmd := s.node.Command(ctx, s.Program("kubectl"), args...)
	cmd.Env = append(cmd.Env, "KUBECONFIG="+s.Admin())
	return cmd
}

func (s *Server) kubectl(stdin string, args []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := s.KubectlCommand(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, text)
	}
	return text, err
}

// CA is the file with the certificate of the cluster's CA.
func (s *Server) CA() string { return s.pki.path("ca.crt") }

// Admin is the administrator's kubeconfig file.
func (s *Server) Admin() string { return s.pki.path("admin.conf") }

// Kubeconfig writes a kubeconfig file for a user with a client certificate. A node is system:node:NAME in system:nodes.
func (s *Server) Kubeconfig(user string, groups ...string) string {
	s.t.Helper()
	name := "user-" + strings.NewReplacer(":", "-", "/", "-").Replace(user)
	if err := s.writeKubeconfig(name, user, groups...); err != nil {
		s.t.Fatalf("write a kubeconfig: %v", err)
	}
	return s.pki.path(name + ".conf")
}

// ServiceAccount writes a kubeconfig file with a token of a ServiceAccount, which is made if it does not exist.
func (s *Server) ServiceAccount(namespace, name string) string {
	s.t.Helper()
	s.ensureAccount(namespace, name)
	return s.tokenConfig(namespace, name, nil)
}

// PodToken writes a kubeconfig file with a token of a ServiceAccount as a pod on that node has it: the API server knows the pod and the node
// by it. What does not exist (Node, ServiceAccount, Pod NAME-NODE) is made.
func (s *Server) PodToken(namespace, name, node string) string {
	s.t.Helper()
	s.ensureAccount(namespace, name)
	s.ensure("/api/v1/nodes", Object{"metadata": Object{"name": node}})
	pod := name + "-" + node
	pods := "/api/v1/namespaces/" + namespace + "/pods"
	s.ensure(pods, Object{"metadata": Object{"name": pod}, "spec": Object{
		"nodeName": node, "serviceAccountName": name, "containers": []Object{{"name": "main", "image": "none"}}}})
	var made struct{ Metadata struct{ UID string } }
	if err := s.Do(http.MethodGet, pods+"/"+pod, nil, &made); err != nil {
		s.t.Fatalf("%v", err)
	}
	return s.tokenConfig(namespace, name, Object{"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": made.Metadata.UID})
}

func (s *Server) ensureAccount(namespace, name string) {
	s.t.Helper()
	s.ensure("/api/v1/namespaces", Object{"metadata": Object{"name": namespace}})
	s.ensure("/api/v1/namespaces/"+namespace+"/serviceaccounts", Object{"metadata": Object{"name": name}})
}

// tokenConfig asks for a token, bound to a pod if that is given.
func (s *Server) tokenConfig(namespace, name string, bound Object) string {
	s.t.Helper()
	spec := Object{"expirationSeconds": 3600}
	file := "account-" + namespace + "-" + name
	if bound != nil {
		spec["boundObjectRef"] = bound
		file += "-" + bound["name"].(string)
	}
	var answer struct{ Status struct{ Token string } }
	path := "/api/v1/namespaces/" + namespace + "/serviceaccounts/" + name + "/token"
	err := s.Do(http.MethodPost, path, Object{"spec": spec}, &answer)
	if err == nil {
		err = s.writeConfig(file, Object{"token": answer.Status.Token})
	}
	if err != nil {
		s.t.Fatalf("get a token of %s/%s: %v", namespace, name, err)
	}
	return s.pki.path(file + ".conf")
}

func (s *Server) writeKubeconfig(file, user string, groups ...string) error {
	certPEM, keyPEM, err := s.pki.ca.issue(user, groups, nil, nil)
	if err != nil {
		return err
	}
	return s.writeConfig(file, Object{"client-certificate-data": certPEM, "client-key-data": keyPEM})
}

// WriteAdmin writes an administrator's kubeconfig to a file, for another way to the server that ends at one of the names or addresses in its
// certificate, such as 127.0.0.1.
func (s *Server) WriteAdmin(path, url string) error {
	content, err := os.ReadFile(s.Admin())
	if err != nil {
		return err
	}
	return os.WriteFile(path, bytes.ReplaceAll(content, []byte(s.URL), []byte(url)), 0o600)
}

// writeConfig writes a kubeconfig. JSON is YAML, and a []byte in it is base64, as kubeconfig has it.
func (s *Server) writeConfig(file string, user Object) error {
	config := Object{
		"apiVersion": "v1", "kind": "Config", "current-context": "bed",
		"clusters": []Object{{"name": "bed", "cluster": Object{"server": s.URL, "certificate-authority-data": s.pki.ca.pem}}},
		"users":    []Object{{"name": "bed", "user": user}},
		"contexts": []Object{{"name": "bed", "context": Object{"cluster": "bed", "user": "bed"}}},
	}
	content, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(s.pki.path(file+".conf"), content, 0o600)
}
