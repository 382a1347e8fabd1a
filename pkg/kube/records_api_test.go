// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// The rights in deploy/ are enough to keep the records of so many nodes that they do not fit, which is said before it is so; over an outage,
// and beside somebody else who writes them.
func TestRecordsInKubernetes(t *testing.T) {
	api := kubebed.APIServer(t)
	account, err := NewClient(ClientOptions{Kubeconfig: api.ServiceAccount("kube-system", "tunnel-controller")})
	must(t, err)
	admin, err := NewClient(ClientOptions{Kubeconfig: api.Admin(), QPS: 1000})
	must(t, err)
	api.Install()
	put := func(name string, addrs ...string) {
		t.Helper()
		n, err := admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		must(t, err)
		for _, a := range addrs {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
		}
		_, err = admin.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{})
		must(t, err)
	}
	maps := admin.CoreV1().ConfigMaps("kube-system")
	text := func() string {
		t.Helper()
		c, err := maps.Get(context.Background(), "edge-tunnel-nodes", metav1.GetOptions{})
		must(t, err)
		return c.Data[KeyRecords]
	}
	put("cloud-1", "10.0.0.1", "2001:db8::1")
	// Much is taken already: who else has something in the ConfigMap keeps it.
	others := maxConfigMap - 5000
	c, err := maps.Get(t.Context(), "edge-tunnel-nodes", metav1.GetOptions{})
	must(t, err)
	c.Data = map[string]string{"others": strings.Repeat("x", others)}
	_, err = maps.Update(t.Context(), c, metav1.UpdateOptions{})
	must(t, err)

	p, err := NewPublisher(PublisherConfig{
		Client: account, Component: "tunnel-controller", Self: "cloud-1", RecordsNamespace: "kube-system", RecordsName: "edge-tunnel-nodes",
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	defer func() {
		cancel()
		must(t, <-done)
	}()
	said := func(reason string) func() bool {
		return func() bool {
			list, err := admin.CoreV1().Events("kube-system").List(t.Context(), metav1.ListOptions{
				FieldSelector: "reason=" + reason + ",involvedObject.kind=ConfigMap,involvedObject.name=edge-tunnel-nodes"})
			must(t, err)
			return len(list.Items) == 1
		}
	}
	const cloud = "10.0.0.1\tcloud-1\n2001:db8::1\tcloud-1\n"
	eventually(t, "written", func() bool { return text() == cloud })
	eventually(t, "said that it is nearly full", said("RecordsNearlyFull"))

	// A name may be as long as that; 20 of them are too much, by little.
	long := strings.Repeat("x.", 100)
	for i := range 25 {
		put(fmt.Sprintf("%s%d", long, i+10), fmt.Sprintf("10.1.0.%d", i+10))
	}
	eventually(t, "some are left out", func() bool {
		s := p.Stats().Records
		return s.LeftOut > 0 && s.Records+s.LeftOut == 2+25 && s.Error == ""
	})
	if size := others + len(text()); size > maxConfigMap || size < maxConfigMap-250 || p.Stats().Records.Bytes != size {
		t.Errorf("%d bytes of %d, %+v", size, maxConfigMap, p.Stats().Records)
	}
	eventually(t, "said that it is full", said("RecordsFull"))

	// Somebody else writes them: that is said, and nobody's text is lost.
	c, err = maps.Get(t.Context(), "edge-tunnel-nodes", metav1.GetOptions{})
	must(t, err)
	c.Data = map[string]string{KeyRecords: "10.9.9.9\tcloud-1"}
	_, err = maps.Update(t.Context(), c, metav1.UpdateOptions{FieldManager: "yurt-tunnel-server"})
	must(t, err)
	must(t, admin.CoreV1().Nodes().Delete(t.Context(), long+"10", metav1.DeleteOptions{}))
	eventually(t, "refused", func() bool {
		e := p.Stats().Records.Error
		return strings.Contains(e, "another writes") && strings.Contains(e, "yurt-tunnel-server")
	})
	if text() != "10.9.9.9\tcloud-1" {
		t.Errorf("%q", text())
	}
	api.Kill()
	api.Start()
	c, err = maps.Get(t.Context(), "edge-tunnel-nodes", metav1.GetOptions{})
	must(t, err)
	c.Data = nil
	_, err = maps.Update(t.Context(), c, metav1.UpdateOptions{FieldManager: "yurt-tunnel-server"})
	must(t, err)
	eventually(t, "theirs again", func() bool { s := p.Stats().Records; return s.Error == "" && s.Records == 26 && s.LeftOut == 0 })
	if !strings.HasPrefix(text(), cloud[:len("10.0.0.1\tcloud-1\n")]) {
		t.Errorf("%q", text())
	}
}
