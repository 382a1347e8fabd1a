// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"errors"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func TestLeaving(t *testing.T) {
	cloud := &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{
			{Key: "alibabacloud.com/is-edge-worker", Operator: corev1.NodeSelectorOpNotIn, Values: []string{"true"}},
		}}},
	}}}
	for name, c := range map[string]struct {
		change func(*appsv1.DaemonSet, *corev1.Node)
		gone   string // that is not there
		why    string // part of it; empty: it stays
	}{
		"an upgrade": {},
		"deleted":    {gone: "daemonsets", why: "no DaemonSet kube-system/tunnel-server"},
		"being deleted": {change: func(s *appsv1.DaemonSet, _ *corev1.Node) {
			s.DeletionTimestamp = &metav1.Time{}
			s.Finalizers = []string{"x"}
		}, why: "being deleted"},
		"without Node": {gone: "nodes", why: "no Node cloud-1"},
		"another selector": {change: func(s *appsv1.DaemonSet, _ *corev1.Node) {
			s.Spec.Template.Spec.NodeSelector = map[string]string{"a": "b"}
		}, why: "do not choose"},
		"its selector": {change: func(s *appsv1.DaemonSet, n *corev1.Node) {
			s.Spec.Template.Spec.NodeSelector = map[string]string{"a": "b"}
			n.Labels["a"] = "b"
		}},
		"the node's label": {change: func(_ *appsv1.DaemonSet, n *corev1.Node) { n.Labels["alibabacloud.com/is-edge-worker"] = "true" }, why: "do not choose"},
		"a taint": {change: func(_ *appsv1.DaemonSet, n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "mine", Effect: "NoExecute"}}
		}, why: "taint mine"},
		"a taint, no eviction": {change: func(_ *appsv1.DaemonSet, n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "mine", Effect: "NoSchedule"}}
		}},
		"a node in trouble": {change: func(_ *appsv1.DaemonSet, n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/unreachable", Effect: "NoExecute"}}
		}},
		"a tolerated taint": {change: func(s *appsv1.DaemonSet, n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "mine", Value: "v", Effect: "NoExecute"}}
			s.Spec.Template.Spec.Tolerations = []corev1.Toleration{{Key: "mine", Value: "v"}}
		}},
		"another value": {change: func(s *appsv1.DaemonSet, n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "mine", Value: "v", Effect: "NoExecute"}}
			s.Spec.Template.Spec.Tolerations = []corev1.Toleration{{Key: "mine", Value: "w"}, {Key: "other", Operator: "Exists"}, {Operator: "Exists", Effect: "NoSchedule"}}
		}, why: "taint mine"},
		"everything tolerated": {change: func(s *appsv1.DaemonSet, n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: "mine", Effect: "NoExecute"}}
			s.Spec.Template.Spec.Tolerations = []corev1.Toleration{{Operator: "Exists"}}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			set := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "tunnel-server"}}
			set.Spec.Template.Spec.Affinity = cloud
			n := node("cloud-1", map[string]string{"kubernetes.io/os": "linux"})
			if c.change != nil {
				c.change(set, n)
			}
			var objects []runtime.Object
			if c.gone != "daemonsets" {
				objects = append(objects, set)
			}
			if c.gone != "nodes" {
				objects = append(objects, n)
			}
			why, err := Leaving(t.Context(), fake.NewClientset(objects...), "kube-system", "tunnel-server", "cloud-1")
			if err != nil || (why == "") != (c.why == "") || !strings.Contains(why, c.why) {
				t.Errorf("%q, %v; want %q", why, err, c.why)
			}
		})
	}
	for _, resource := range []string{"daemonsets", "nodes"} {
		client := fake.NewClientset(&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "tunnel-server"}}, node("cloud-1", nil))
		client.PrependReactor("get", resource, func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errors.New("refused") })
		if why, err := Leaving(t.Context(), client, "kube-system", "tunnel-server", "cloud-1"); err == nil || why != "" {
			t.Errorf("no answer about %s: %q, %v", resource, why, err)
		}
	}
}
