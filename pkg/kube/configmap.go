// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
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
	wake chan struct{}

	mu          sync.Mutex // guards what follows
	data, told  map[string]string
	listed      bool // data is what a whole list, and the events since then, have
	status      ConfigMapStatus
	interrupted bool // the latest watch could not be begun
}

// NewConfigMap makes one that does nothing until Run.
func NewConfigMap(c ConfigMapConfig) *ConfigMap {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &ConfigMap{c: c, wake: make(chan struct{}, 1)}
}

// Run follows it until ctx ends, whatever happens to the API server.
func (m *ConfigMap) Run(ctx context.Context) error {
	client := m.c.Client.CoreV1().ConfigMaps(m.c.Namespace)
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, m.c.Name).String()
	source := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = only
			list, err := client.List(ctx, o)
			m.note(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = only
			if m.wasAway() && o.SendInitialEvents == nil {
				return nil, apierrors.NewResourceExpired("the API server was away, and may have been restored: list again")
			}
			w, err := client.Watch(ctx, o)
			m.note(ctx, err)
			if err != nil && o.SendInitialEvents != nil {
				// As an error of no known kind, or the reflector waits without looking at ctx. It falls back to a list.
				err = errors.New(err.Error())
			}
			return w, err
		},
	}, m.c.Client)
	silent := klog.Logger{} // what goes wrong is in Status and logged once
	r := cache.NewReflectorWithOptions(source, &corev1.ConfigMap{}, (*configMapStore)(m), cache.ReflectorOptions{
		Name: "configmap", Logger: &silent, Backoff: &wait.Backoff{Duration: 250 * time.Millisecond, Cap: 5 * time.Second, Factor: 2, Jitter: 0.5, Steps: 64},
	})
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { r.RunWithContext(klog.NewContext(ctx, silent)) })
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
	m.mu.Lock()
	data, status := m.data, m.status
	m.mu.Unlock()
	if data == nil && status.Exists {
		if !sleep(ctx, confirmPause) {
			return
		}
	}
	for data == nil {
		found, err := m.c.Client.CoreV1().ConfigMaps(m.c.Namespace).Get(ctx, m.c.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			break
		}
		m.note(ctx, err)
		switch {
		case err == nil:
			data = contentOf(found)
		case !sleep(ctx, confirmPause):
			return
		}
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

// wasAway reports, once, whether the latest watch could not be begun.
func (m *ConfigMap) wasAway() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.interrupted
	m.interrupted = false
	return was
}

// note records how a request ended.
func (m *ConfigMap) note(ctx context.Context, err error) {
	if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // that says nothing about the API server
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.interrupted = err != nil
	if err == nil {
		if m.status.Err != nil {
			m.c.Log.Info("the ConfigMap is followed again", "configmap", m.name())
		}
		m.status.Err, m.status.Since = nil, time.Time{}
		return
	}
	if m.status.Err == nil {
		m.status.Since = time.Now()
		m.c.Log.Warn("the ConfigMap cannot be followed, what it said before counts", "configmap", m.name(), "err", err)
	}
	m.status.Err = fmt.Errorf("follow ConfigMap %s: %w", m.name(), err)
}

func (m *ConfigMap) name() string { return m.c.Namespace + "/" + m.c.Name }

// Status returns the present state.
func (m *ConfigMap) Status() ConfigMapStatus {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status
}

// set notes what a list or an event says.
func (m *ConfigMap) set(data map[string]string) {
	m.mu.Lock()
	same := m.listed && (m.data == nil) == (data == nil) && maps.Equal(m.data, data)
	m.data, m.listed = data, true
	m.mu.Unlock()
	if same {
		return
	}
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// contentOf is not nil: there is a ConfigMap, even if there is nothing in it.
func contentOf(c *corev1.ConfigMap) map[string]string {
	if c.Data == nil {
		return map[string]string{}
	}
	return c.Data
}

// configMapStore is the side of a ConfigMap that a reflector fills.
type configMapStore ConfigMap

func (s *configMapStore) Add(object any) error { return s.Update(object) }

func (s *configMapStore) Update(object any) error {
	(*ConfigMap)(s).set(contentOf(object.(*corev1.ConfigMap)))
	return nil
}

func (s *configMapStore) Delete(any) error {
	(*ConfigMap)(s).set(nil)
	return nil
}

// Replace is called with whole lists only.
func (s *configMapStore) Replace(objects []any, _ string) error {
	var data map[string]string
	for _, object := range objects {
		data = contentOf(object.(*corev1.ConfigMap))
	}
	(*ConfigMap)(s).set(data)
	return nil
}

func (s *configMapStore) Resync() error { return nil }
