// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// Leaving asks whether a DaemonSet goes away from a node for good, and says in what way: it is not there or being deleted, the Node is not there, or
// the DaemonSet does not choose it any more. Otherwise why is empty: a pod that ends is replaced.
func Leaving(ctx context.Context, client kubernetes.Interface, namespace, name, node string) (why string, err error) {
	set, err := client.AppsV1().DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return "there is no DaemonSet " + namespace + "/" + name, nil
	case err != nil:
		return "", fmt.Errorf("get DaemonSet %s/%s: %w", namespace, name, err)
	case set.DeletionTimestamp != nil:
		return "the DaemonSet is being deleted", nil
	}
	at, err := client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return "there is no Node " + node, nil
	case err != nil:
		return "", fmt.Errorf("get Node %s: %w", node, err)
	}
	spec := set.Spec.Template.Spec
	chosen, err := nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: spec}).Match(at)
	if err != nil {
		return "", fmt.Errorf("compare Node %s with the DaemonSet: %w", node, err)
	}
	if !chosen {
		return "the DaemonSet's node selector and affinity do not choose Node " + node, nil
	}
	for _, taint := range at.Spec.Taints {
		if taint.Effect == corev1.TaintEffectNoExecute && !tolerated(taint, spec.Tolerations) {
			return fmt.Sprintf("the DaemonSet does not tolerate the taint %s of Node %s", taint.Key, node), nil
		}
	}
	return "", nil
}

// tolerated reports whether pods of a DaemonSet stay on a node with this taint. All of them tolerate those by which Kubernetes says that a node is in
// trouble.
func tolerated(taint corev1.Taint, tolerations []corev1.Toleration) bool {
	if strings.HasPrefix(taint.Key, "node.kubernetes.io/") {
		return true
	}
	for _, t := range tolerations {
		if (t.Effect == "" || t.Effect == taint.Effect) && (t.Key == "" && t.Operator == corev1.TolerationOpExists ||
			t.Key == taint.Key && (t.Operator == corev1.TolerationOpExists || t.Value == taint.Value)) {
			return true
		}
	}
	return false
}
