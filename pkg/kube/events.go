// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/tools/record/util"
)

// At most so many Events wait, and so many are written: all at once, then one every so often. They are for people, who can do without those
// that are too many; that there were is counted.
const (
	eventsWaiting = 512
	eventsBurst   = 100
	eventsEvery   = 500 * time.Millisecond
)

// EventsStats is a snapshot.
type EventsStats struct {
	Written  uint64
	Dropped  uint64 // too many at once, too often the same, or the API server was away
	Failures uint64 // of writing
	Err      error  // of the latest write; nil if it went well
}

// events writes Events. What is said again is counted by the one that is there, as client-go does it (its correlator is used). Its broadcaster
// is not: nobody can wait for its goroutines, and while the API server is away it tries one Event for two minutes.
type events struct {
	client    kubernetes.Interface
	component string
	log       *slog.Logger
	queue     chan *corev1.Event
	correlate *record.EventCorrelator
	limit     *rate.Limiter

	mu    sync.Mutex
	stats EventsStats
}

func newEvents(client kubernetes.Interface, component string, log *slog.Logger) *events {
	return &events{
		client: client, component: component, log: log, queue: make(chan *corev1.Event, eventsWaiting),
		correlate: record.NewEventCorrelatorWithOptions(record.CorrelatorOptions{}), limit: rate.NewLimiter(rate.Every(eventsEvery), eventsBurst),
	}
}

// emit has an Event written about an object, soon. It never waits.
func (e *events) emit(about corev1.ObjectReference, kind, reason, message string) {
	now := metav1.Now()
	namespace := cmp.Or(about.Namespace, metav1.NamespaceDefault)
	event := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, Name: util.GenerateEventName(about.Name, now.UnixNano())},
		InvolvedObject: about, Type: kind, Reason: reason, Message: message, Count: 1, FirstTimestamp: now, LastTimestamp: now,
		Source: corev1.EventSource{Component: e.component}, ReportingController: e.component,
	}
	select {
	case e.queue <- event:
	default:
		e.count(func(s *EventsStats) { s.Dropped++ })
	}
}

func (e *events) count(f func(*EventsStats)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f(&e.stats)
}

func (e *events) snapshot() EventsStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stats
}

// run writes until ctx ends.
func (e *events) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-e.queue:
			e.write(ctx, event)
		}
	}
}

func (e *events) write(ctx context.Context, event *corev1.Event) {
	known, err := e.correlate.EventCorrelate(event)
	if err != nil || known.Skip || e.limit.Wait(ctx) != nil {
		e.count(func(s *EventsStats) { s.Dropped++ })
		return
	}
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	api := e.client.CoreV1().Events(event.Namespace)
	event, written := known.Event, known.Event
	if event.Count > 1 {
		written, err = api.Patch(ctx, event.Name, types.StrategicMergePatchType, known.Patch, metav1.PatchOptions{})
	}
	if event.Count <= 1 || apierrors.IsNotFound(err) { // the one that is counted is kept for an hour
		event.ResourceVersion = ""
		written, err = api.Create(ctx, event, metav1.CreateOptions{})
	}
	if err == nil {
		e.correlate.UpdateState(written)
	}
	e.count(func(s *EventsStats) {
		if err == nil {
			s.Written++
		} else {
			s.Dropped++
			s.Failures++
			if s.Err == nil {
				e.log.Warn("Events cannot be written", "err", err)
			}
		}
		s.Err = err
	})
}
