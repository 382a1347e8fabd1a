// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

const chart = "../../../deploy/chart"

// document is what these tests look at of an object.
type document struct {
	text       string // with its comments
	APIVersion string
	Kind       string
	Metadata   struct {
		Name, Namespace string
		Annotations     map[string]string
	}
	Rules    []struct{ Verbs []string }
	RoleRef  struct{ Kind, Name string }
	Subjects []struct{ Kind, Name, Namespace string }
	Spec     struct {
		Type     string
		Ports    []struct{ Port, NodePort int }
		Template struct{ Spec pod }
	}
}

type pod struct {
	ServiceAccountName, PriorityClassName string
	HostNetwork                           bool
	InitContainers, Containers            []container
	Volumes                               []struct{ Name string }
	Affinity                              struct {
		NodeAffinity struct {
			Required struct{ NodeSelectorTerms []term } `json:"requiredDuringSchedulingIgnoredDuringExecution"`
		}
	}
}

type term struct {
	MatchExpressions []struct {
		Key, Operator string
		Values        []string
	}
}

type container struct {
	Name, Image     string
	Command, Args   []string
	Ports           []any
	ReadinessProbe  any
	VolumeMounts    []struct{ Name, MountPropagation string }
	SecurityContext struct {
		Privileged, ReadOnlyRootFilesystem, RunAsNonRoot bool
		AllowPrivilegeEscalation                         *bool
		SeccompProfile                                   struct{ Type string }
		Capabilities                                     struct{ Add, Drop []string }
	}
}

func rendered(t *testing.T, set ...string) []document {
	t.Helper()
	return renderedAs(t, options{namespace: "kube-system", set: set})
}

func renderedAs(t *testing.T, o options) []document {
	t.Helper()
	var out bytes.Buffer
	if err := render(&out, chart, o); err != nil {
		t.Fatal(err)
	}
	var documents []document
	for text := range strings.SplitSeq(strings.TrimPrefix(out.String(), header), "---\n") {
		if text == "" {
			continue
		}
		d := document{text: text}
		if err := yaml.Unmarshal([]byte(text), &d); err != nil {
			t.Fatalf("%v:\n%s", err, text)
		}
		documents = append(documents, d)
	}
	return documents
}

// find returns the object, with an empty kind if there is none.
func find(documents []document, kind, name string) document {
	i := slices.IndexFunc(documents, func(d document) bool { return d.Kind == kind && d.Metadata.Name == name })
	if i < 0 {
		return document{}
	}
	return documents[i]
}

// programs are those of the image.
func programs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("go", "build", "-C", "../../..", "-o", dir+"/", "./cmd/tunnel-server", "./cmd/tunnel-agent", "./cmd/tunnel-controller", "./cmd/tunnelctl").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dir
}

// TestChart: whatever the values, nobody has more rights than are explained, and the programs take the flags that they are given.
func TestChart(t *testing.T) {
	bin := programs(t)
	for name, set := range map[string][]string{
		"default": nil,
		"nodeport": {
			"metrics=true", "service.type=NodePort", "service.nodePort=31008", "service.externalAddr=tunnel.example.com:31008", "service.name=other", "portsConfigMap=yurt-tunnel-server-cfg",
			"ports={9100,9256}", "edge.labels={example.com/edge=yes}", "edge.modeLabels=null",
		},
		"fixed": {
			"service.loadBalancerIP=203.0.113.7", "service.loadBalancerClass=example.com/lb", "service.loadBalancerSourceRanges={0.0.0.0/0}", "service.annotations.a=b",
			"agent.servers={tunnel.example.com,203.0.113.8:443}", "server.intercept=host", "portsConfigMap=", "leaseNamespace=elsewhere",
		},
		"monitored": {"metrics=true", "serviceMonitor.create=true", "serviceMonitor.labels.release=prometheus"},
		"less": {
			"priorityClass.create=false", "priorityClass.name=", "networkPolicy.create=false", "server.resources=null", "agent.tolerations=null", "seLinuxOptions=null",
			"image.pullSecrets={a,b}", "controller.nodeSelector.a=b", "server.extraCapabilities={SYS_RESOURCE}", "server.extraArgs={--target-cidr=10.0.0.0/8}", "controller.nodeStatus=false", "agent.logLevel=debug",
		},
	} {
		t.Run(name, func(t *testing.T) {
			seen := map[string]bool{}
			for hooks, want := range map[bool]int{false: 3, true: 2} {
				documents := renderedAs(t, options{namespace: "kube-system", set: set, hooks: hooks})
				workloads := 0
				for _, d := range documents {
					id := fmt.Sprintf("%s %s/%s", d.Kind, d.Metadata.Namespace, d.Metadata.Name)
					if d.APIVersion == "" || d.Kind == "" || d.Metadata.Name == "" || seen[id] {
						t.Errorf("%s: incomplete, or there twice", id)
					}
					seen[id] = true
					if d.Metadata.Annotations["helm.sh/hook"] == "pre-delete" != hooks {
						t.Errorf("%s: %v", id, d.Metadata.Annotations)
					}
					if p := d.Spec.Template.Spec; len(p.Containers) > 0 {
						workloads++
						checkPod(t, bin, documents, p)
					}
					checkRules(t, documents, d)
				}
				if workloads != want {
					t.Errorf("%d workloads, hooks %v", workloads, hooks)
				}
			}
		})
	}
}

func checkPod(t *testing.T, bin string, documents []document, p pod) {
	t.Helper()
	if find(documents, "ServiceAccount", p.ServiceAccountName).Kind == "" {
		t.Errorf("account %q does not exist", p.ServiceAccountName)
	}
	mounted := map[string]bool{}
	for _, c := range slices.Concat(p.InitContainers, p.Containers) {
		s := c.SecurityContext
		switch {
		case c.Name == "mount-bpffs":
			if !s.Privileged || !slices.Equal(c.Command, []string{"/tunnelctl", "mount-bpffs"}) || c.Args != nil || len(c.VolumeMounts) != 1 {
				t.Errorf("%+v", c)
			}
		case s.Privileged, !s.ReadOnlyRootFilesystem, s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation,
			s.SeccompProfile.Type != "RuntimeDefault", !slices.Equal(s.Capabilities.Drop, []string{"ALL"}):
			t.Errorf("%s: %+v", c.Name, s)
		}
		if len(s.Capabilities.Add) > 0 && c.Name != "tunnel-server" && c.Name != "cleanup" || !p.HostNetwork && !s.RunAsNonRoot {
			t.Errorf("%s has more than it needs: %+v", c.Name, s)
		}
		if c.Ports != nil {
			t.Errorf("%s declares ports", c.Name)
		}
		for _, m := range c.VolumeMounts {
			mounted[m.Name] = true
			if m.MountPropagation == "Bidirectional" && !s.Privileged {
				t.Errorf("%s: %+v", c.Name, m)
			}
		}
		// The variables that Kubernetes fills in.
		given := strings.Split(regexp.MustCompile(`\$\(\w+\)`).ReplaceAllString(strings.Join(c.Args, "\x00"), "192.0.2.9"), "\x00")
		// Flags are read from left to right, and "help" ends it well.
		out, err := exec.Command(filepath.Join(bin, c.Command[0]), slices.Concat(c.Command[1:], slices.DeleteFunc(given, func(s string) bool { return s == "" }), []string{"--help"})...).CombinedOutput()
		if err != nil {
			t.Errorf("%s does not take %q: %v: %s", c.Command, c.Args, err, out)
		}
	}
	if len(mounted) != len(p.Volumes) {
		t.Errorf("volumes %v, mounted %v", p.Volumes, mounted)
	}
	for _, c := range p.Containers {
		if c.ReadinessProbe == nil && c.Name != "pause" && c.Name != "await" {
			t.Errorf("%s has no readiness", c.Name)
		}
	}
}

func checkRules(t *testing.T, documents []document, d document) {
	t.Helper()
	switch d.Kind {
	case "Role", "ClusterRole":
		if b := find(documents, d.Kind+"Binding", d.Metadata.Name); b.RoleRef.Name != d.Metadata.Name {
			t.Errorf("%s %s is bound to nobody", d.Kind, d.Metadata.Name)
		}
		// Before each rule stands "VERB, VERB: why", with all of its verbs, and a resource is never "*".
		_, rules, _ := strings.Cut(d.text, "\nrules:\n")
		texts := regexp.MustCompile(`(?m)^ +- apiGroups`).Split(rules, -1)
		if len(texts) != len(d.Rules)+1 || strings.Contains(rules, "*") {
			t.Errorf("%s %s: %d rules\n%s", d.Kind, d.Metadata.Name, len(d.Rules), rules)
			return
		}
		for i, rule := range d.Rules {
			why := texts[i][strings.Index(texts[i], "#"):]
			for _, verb := range rule.Verbs {
				if !regexp.MustCompile(`(# |, |\. )` + verb + `\b[^.]*: `).MatchString(why) {
					t.Errorf("%s %s: %s is not explained in %q", d.Kind, d.Metadata.Name, verb, why)
				}
			}
		}
	case "RoleBinding", "ClusterRoleBinding":
		role := find(documents, d.RoleRef.Kind, d.RoleRef.Name)
		if role.Kind == "" || d.RoleRef.Kind+"Binding" != d.Kind || len(d.Subjects) != 1 || find(documents, d.Subjects[0].Kind, d.Subjects[0].Name).Metadata.Namespace != d.Subjects[0].Namespace {
			t.Errorf("%s %s: %+v, %+v", d.Kind, d.Metadata.Name, d.RoleRef, d.Subjects)
		}
	}
}

// runsOn is what the scheduler makes of a pod's affinity.
func runsOn(t *testing.T, p pod, labels map[string]string) bool {
	t.Helper()
	return slices.ContainsFunc(p.Affinity.NodeAffinity.Required.NodeSelectorTerms, func(term term) bool {
		for _, e := range term.MatchExpressions {
			value, set := labels[e.Key]
			in := set && slices.Contains(e.Values, value)
			if e.Operator != "In" && e.Operator != "NotIn" {
				t.Fatalf("operator %q", e.Operator)
			}
			if in != (e.Operator == "In") {
				return false
			}
		}
		return len(term.MatchExpressions) > 0
	})
}

func TestWhoRunsWhere(t *testing.T) {
	documents := rendered(t)
	server, agent := find(documents, "DaemonSet", "tunnel-server").Spec.Template.Spec, find(documents, "DaemonSet", "tunnel-agent").Spec.Template.Spec
	controller := find(documents, "Deployment", "tunnel-controller").Spec.Template.Spec
	for _, c := range []struct {
		labels        map[string]string
		server, agent bool
	}{
		{map[string]string{}, true, false},
		{map[string]string{"alibabacloud.com/is-edge-worker": "false"}, true, false},
		{map[string]string{"alibabacloud.com/is-edge-worker": "true"}, false, true},
		{map[string]string{"openyurt.io/is-edge-worker": "true", "openyurt.io/interconnection-mode": "normal"}, false, true},
		{map[string]string{"alibabacloud.com/edge-enable-reverseTunnel-client": "true"}, false, true},
		{map[string]string{"alibabacloud.com/is-edge-worker": "true", "alibabacloud.com/interconnection-mode": "private"}, false, false},
		{map[string]string{"alibabacloud.com/is-edge-worker": "true", "alibabacloud.com/interconnection-mode": "improved"}, false, false},
		{map[string]string{"type": "virtual-kubelet"}, false, false},
		{map[string]string{"kubernetes.io/os": "windows"}, false, false},
	} {
		if c.labels["kubernetes.io/os"] == "" {
			c.labels["kubernetes.io/os"] = "linux"
		}
		if s, a, k := runsOn(t, server, c.labels), runsOn(t, agent, c.labels), runsOn(t, controller, c.labels); s != c.server || a != c.agent || k != c.server {
			t.Errorf("%v: server %v, agent %v, controller %v", c.labels, s, a, k)
		}
	}
}

func TestValuesCount(t *testing.T) {
	documents := rendered(t, "service.type=NodePort", "service.nodePort=31008", "service.externalAddr=tunnel.example.com:31008", "ports={9100,9256}",
		"image.repository=registry.example.com/x", "image.tag=v9", "networkPolicy.create=false", "priorityClass.create=false", "priorityClass.name=mine")
	service := find(documents, "Service", "x-tunnel-server-svc")
	if service.Spec.Type != "NodePort" || service.Spec.Ports[0].NodePort != 31008 || service.Metadata.Annotations["x-tunnel-server-external-addr"] != "tunnel.example.com:31008" {
		t.Errorf("%+v", service)
	}
	if find(documents, "NetworkPolicy", "tunnel-controller").Kind != "" || find(documents, "PriorityClass", "mine").Kind != "" {
		t.Error("what was declined is there")
	}
	server := find(documents, "DaemonSet", "tunnel-server").Spec.Template.Spec
	if server.PriorityClassName != "mine" || server.Containers[0].Image != "registry.example.com/x:v9" || !slices.Contains(server.Containers[0].Args, "--tunneled-ports=9100,9256") {
		t.Errorf("%+v", server)
	}
	scraped := rendered(t, "metrics=true", "ports={9100}")
	if args := find(scraped, "DaemonSet", "tunnel-server").Spec.Template.Spec.Containers[0].Args; !slices.Contains(args, "--tunneled-ports=9100,10279") || !slices.Contains(args, "--metrics=:10278") {
		t.Errorf("%q", args)
	}
	monitored := rendered(t, "metrics=true", "serviceMonitor.create=true")
	for _, name := range []string{"server", "agent", "controller"} {
		service := find(monitored, "Service", "tunnel-"+name+"-metrics").Spec
		if find(monitored, "ServiceMonitor", "tunnel-"+name).Kind == "" || len(service.Ports) != 1 {
			t.Errorf("%s is not monitored: %+v", name, service)
			continue
		}
		flag := fmt.Sprintf("--metrics=:%d", service.Ports[0].Port)
		if !slices.ContainsFunc(monitored, func(d document) bool {
			c := d.Spec.Template.Spec.Containers
			return len(c) == 1 && c[0].Name == "tunnel-"+name && slices.Contains(c[0].Args, flag)
		}) {
			t.Errorf("tunnel-%s has no %s", name, flag)
		}
	}
	if kinds := rendered(t); find(kinds, "NetworkPolicy", "tunnel-controller").Kind == "" || find(kinds, "PriorityClass", "edge-tunnel").Kind == "" {
		t.Error("what is there by default is not")
	}
}

func TestBadValues(t *testing.T) {
	for _, set := range []string{
		"serviceMonitor.create=true", // without metrics
		"image.registry=x", "nonsense=1", "ports={70000}", "service.type=ClusterIP", "service.nodePort=0", "service.externalAddr=tunnel.example.com", "edge.labels={edge}",
		"edge.labels=null", "server.intercept=pods", "server.extraArgs={x}", "controller.replicas=0", "priorityClass.value=2000000000", "leaseNamespace=", "leaseNamespace=null", "service.type=null", "agent.logLevel=loud",
	} {
		if err := render(&bytes.Buffer{}, chart, options{namespace: "x", set: []string{set}}); err == nil {
			t.Errorf("%s was taken", set)
		}
	}
}
