// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// confirmPause is how long a ConfigMap that is gone may take to come back: to replace one, some tools delete it first.
const confirmPause = time.Second

// ConfigMapConfig is what [NewConfigMap] needs.
type ConfigMapConfig struct {
	Client          kubernetes.Interface
	Namespace, Name string
	// Changed is told what the ConfigMap has in it, one state after the other; nil, if there is none. Its context ends with Run's.
	Changed func(ctx context.Context, data map[string]string)
	Log     *slog.Logger
}

// ConfigMapStatus says how fresh the state is.
type ConfigMapStatus struct {
	Complete bool // it is known whether there is one
	Exists   bool
	Err      error     // why it cannot be followed now: what was known stays
	Since    time.Time // of Err
}

// ConfigMap follows one ConfigMap. That it is gone is concluded from an API server that says so when it is asked for it, and from nothing else.
type ConfigMap struct {
	c    ConfigMapConfig
	maps *follower[*corev1.ConfigMap] // of that name: one, or none
	wake chan struct{}

	mu     sync.Mutex // guards what follows
	told   map[string]string
	status ConfigMapStatus // without Err
}

// NewConfigMap makes one that does nothing until Run.
func NewConfigMap(c ConfigMapConfig) *ConfigMap {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	m := &ConfigMap{c: c, wake: make(chan struct{}, 1)}
	api := c.Client.CoreV1().ConfigMaps(c.Namespace)
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, c.Name).String()
	m.maps = &follower[*corev1.ConfigMap]{
		what: "ConfigMap " + c.Namespace + "/" + c.Name, client: c.Client, log: c.Log,
		lighten: func(whole *corev1.ConfigMap) *corev1.ConfigMap { return whole },
		changed: func([]change[*corev1.ConfigMap]) {
			select {
			case m.wake <- struct{}{}:
			default:
			}
		},
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = only
			return api.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = only
			return api.Watch(ctx, o)
		},
	}
	return m
}

// Run follows it until ctx ends, whatever happens to the API server.
func (m *ConfigMap) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { m.maps.run(ctx) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		}
		m.tell(ctx)
	}
}

// tell hands on what is known, after a look of its own if that is that there is none.
func (m *ConfigMap) tell(ctx context.Context) {
	found, _ := m.maps.get(m.c.Name)
	if found == nil && m.Status().Exists && !sleep(ctx, confirmPause) {
		return
	}
	for found == nil {
		var err error
		if found, err = m.c.Client.CoreV1().ConfigMaps(m.c.Namespace).Get(ctx, m.c.Name, metav1.GetOptions{}); apierrors.IsNotFound(err) {
			found = nil
			break
		} else if err != nil {
			found = nil
			m.maps.note(ctx, err)
			if !sleep(ctx, confirmPause) {
				return
			}
		}
	}
	var data map[string]string
	if found != nil {
		data = contentOf(found)
	}
	m.mu.Lock()
	same := m.status.Complete && m.status.Exists == (data != nil) && maps.Equal(m.told, data)
	m.told = data
	m.status.Complete, m.status.Exists = true, data != nil
	m.mu.Unlock()
	if !same {
		m.c.Changed(ctx, data)
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// Status returns the present state.
func (m *ConfigMap) Status() ConfigMapStatus {
	outage := m.maps.state()
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.status
	s.Err, s.Since = outage.Err, outage.Since
	return s
}

// contentOf is not nil: there is a ConfigMap, even if there is nothing in it.
func contentOf(c *corev1.ConfigMap) map[string]string {
	if c.Data == nil {
		return map[string]string{}
	}
	return c.Data
}
