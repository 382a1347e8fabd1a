// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// object is what a follower follows.
type object interface {
	metav1.Object
	runtime.Object
}

// endsEarly is how much before its time a watch may end without anybody wondering.
const endsEarly = 2 * time.Second

// change is what became of one object. Of one that is new, was is nil; of one that is gone, is.
type change[T object] struct{ was, is T }

// follower keeps a copy of a list of objects, each known by its name. Unlike client-go's shared informers it tries again within five seconds
// of the API server's return, where those take up to a minute; and it lists anew after every outage, because what comes back may have been
// restored from a backup: a watch from a version that it has not reached, or has reached in another way, would leave things out and say
// nothing.
type follower[T object] struct {
	what   string // in errors, such as "nodes"
	client kubernetes.Interface
	list   func(context.Context, metav1.ListOptions) (runtime.Object, error)
	watch  func(context.Context, metav1.ListOptions) (watch.Interface, error)
	// lighten makes a copy with nothing in it but what is needed: there may be thousands.
	lighten func(T) T
	// changed is told after the first whole list, then after each event and each further list, of which nothing may be new. One call at a time.
	changed func([]change[T])
	log     *slog.Logger

	mu          sync.Mutex // guards what follows
	objects     map[string]T
	complete    bool      // a whole list was seen
	interrupted bool      // the latest watch could not be begun
	due         time.Time // when the present watch ends by itself; zero: there is none
	status      followerStatus
}

// followerStatus says why there is nothing newer; Err is nil while all is well.
type followerStatus struct {
	Err   error
	Since time.Time
}

// run follows until ctx ends.
func (f *follower[T]) run(ctx context.Context) {
	source := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := f.list(ctx, o)
			f.note(ctx, err)
			f.mu.Lock()
			f.due = time.Time{}
			f.mu.Unlock()
			return list, err
		},
		WatchFuncWithContext: f.begin,
	}, f.client)
	silent := klog.Logger{} // what goes wrong is in the status, and logged once
	var example T
	cache.NewReflectorWithOptions(source, example, (*followerStore[T])(f), cache.ReflectorOptions{
		Name: f.what, Logger: &silent,
		Backoff: &wait.Backoff{Duration: 250 * time.Millisecond, Cap: 5 * time.Second, Factor: 2, Jitter: 0.5, Steps: 64},
	}).RunWithContext(klog.NewContext(ctx, silent))
}

// begin begins a watch.
func (f *follower[T]) begin(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	if o.SendInitialEvents != nil {
		// A watch that begins with the whole list begins with the newest: a restored API server may be far from the version that the reflector
		// asks for, and would not say that the list is whole until then.
		o.ResourceVersion = ""
	}
	f.mu.Lock()
	// One that ended before its time says the same as one that could not be begun: client-go tries again by itself, and may find another API server.
	interrupted := f.interrupted || time.Now().Before(f.due)
	f.interrupted, f.due = false, time.Time{}
	f.mu.Unlock()
	if interrupted && o.ResourceVersion != "" {
		return nil, apierrors.NewResourceExpired("the API server was away")
	}
	w, err := f.watch(ctx, o)
	if err == nil && reflect.TypeOf(w) == reflect.TypeOf(watch.NewEmptyWatch()) {
		// What client-go makes of a connection that was closed before an answer came, by a load balancer say.
		err = errors.New("the connection was closed before an answer came")
	}
	f.note(ctx, err)
	if err == nil && o.TimeoutSeconds != nil {
		f.mu.Lock()
		f.due = time.Now().Add(time.Duration(*o.TimeoutSeconds)*time.Second - endsEarly)
		f.mu.Unlock()
	}
	if err != nil && o.SendInitialEvents != nil {
		// As an error of no known kind, or the reflector waits without looking at ctx. It falls back to a list.
		err = errors.New(err.Error())
	}
	return w, err
}

// note records how a request ended.
func (f *follower[T]) note(ctx context.Context, err error) {
	if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // that says nothing about the API server
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.interrupted = err != nil
	if err == nil {
		if f.status.Err != nil {
			f.log.Info("the API server is followed again", "what", f.what)
		}
		f.status = followerStatus{}
		return
	}
	if apierrors.IsForbidden(err) {
		err = fmt.Errorf("the ServiceAccount needs a role that allows it to list and watch: %w", err)
	}
	err = fmt.Errorf("follow %s: %w", f.what, err)
	if f.status.Err == nil {
		f.status.Since = time.Now()
	}
	if f.status.Err == nil || f.status.Err.Error() != err.Error() {
		f.log.Warn("the API server cannot be followed, what was known before stays in force", "what", f.what, "err", err)
	}
	f.status.Err = err
}

// all returns every object, in no order.
func (f *follower[T]) all() []T {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.objects))
}

// get returns one object, nil if there is none, and whether a whole list was seen.
func (f *follower[T]) get(name string) (T, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.objects[name], f.complete
}

func (f *follower[T]) state() followerStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// followerStore is the side of a follower that the reflector fills.
type followerStore[T object] follower[T]

// Transformer has a list of many made light while it comes in.
func (s *followerStore[T]) Transformer() cache.TransformFunc {
	return func(o any) (any, error) {
		if whole, ok := o.(T); ok {
			return s.lighten(whole), nil
		}
		return o, nil
	}
}

func (s *followerStore[T]) Add(o any) error { return s.Update(o) }

func (s *followerStore[T]) Update(o any) error {
	is := s.lighten(o.(T))
	s.mu.Lock()
	was := s.objects[is.GetName()]
	if s.objects == nil {
		s.objects = make(map[string]T)
	}
	s.objects[is.GetName()] = is
	s.mu.Unlock()
	s.changed([]change[T]{{was, is}})
	return nil
}

func (s *followerStore[T]) Delete(o any) error {
	name := o.(T).GetName()
	s.mu.Lock()
	c := change[T]{was: s.objects[name]}
	delete(s.objects, name)
	s.mu.Unlock()
	s.changed([]change[T]{c})
	return nil
}

// Replace is called with whole lists only.
func (s *followerStore[T]) Replace(list []any, _ string) error {
	objects := make(map[string]T, len(list))
	for _, o := range list {
		is := s.lighten(o.(T))
		objects[is.GetName()] = is
	}
	s.mu.Lock()
	before := s.objects
	s.objects, s.complete = objects, true
	s.mu.Unlock()
	changes := make([]change[T], 0, len(objects))
	for name, is := range objects {
		changes = append(changes, change[T]{before[name], is})
	}
	for name, was := range before {
		if _, still := objects[name]; !still {
			changes = append(changes, change[T]{was: was})
		}
	}
	s.changed(changes)
	return nil
}

func (s *followerStore[T]) Resync() error { return nil }
