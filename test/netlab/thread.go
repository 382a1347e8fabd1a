// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"fmt"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// thread is an operating system thread that lives in a node's namespaces and starts the node's processes: a child
// inherits the namespaces of the thread that forks it, and is killed when that thread dies (Pdeathsig), which is
// why one thread stays for the life of the node.
type thread struct {
	work chan func()
	done chan struct{}
}

// newThread starts a thread and runs enter on it, which changes its namespaces.
func newThread(enter func() error) (*thread, error) {
	t := &thread{work: make(chan func()), done: make(chan struct{})}
	entered := make(chan error)
	go func() {
		defer close(t.done)
		t.live(enter, entered)
	}()
	if err := <-entered; err != nil {
		<-t.done
		return nil, err
	}
	return t, nil
}

func (t *thread) live(enter func() error, entered chan<- error) {
	runtime.LockOSThread()
	// The process's first thread cannot end: it would keep the namespaces, and /proc/self would show them to everybody.
	// While this goroutine holds it, another one gets another thread.
	if unix.Gettid() == unix.Getpid() {
		defer runtime.UnlockOSThread()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			t.live(enter, entered)
		}()
		<-ended
		return
	}
	// Never unlocked: Go then ends the thread with the goroutine instead of using it for others.
	err := enter()
	entered <- err
	if err != nil {
		return
	}
	for f := range t.work {
		f()
	}
}

// do runs f on the thread and waits for it.
func (t *thread) do(f func()) {
	ended := make(chan struct{})
	t.work <- func() {
		defer close(ended)
		f()
	}
	<-ended
}

func (t *thread) close() {
	close(t.work)
	<-t.done
}

// newNetns makes a network namespace and leaves the calling thread where it is.
func newNetns() (netns.NsHandle, error) {
	var handle netns.NsHandle
	t, err := newThread(func() (err error) {
		handle, err = netns.New()
		return err
	})
	if err != nil {
		return netns.None(), fmt.Errorf("make a network namespace: %w", err)
	}
	t.close()
	return handle, nil
}
