// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
)

// quickDial is how long a dial may take without its stream being watched: most take less, and are not worth a goroutine.
const quickDial = 2 * time.Millisecond

// watch notices that a stream breaks while it is dialed for. It reads nothing: what the client sends meanwhile waits in the
// stream.
type watch struct {
	stream relay.Conn
	timer  *time.Timer
	done   chan error
}

// watchStream calls lost when the stream breaks. Stop must be called before anybody reads the stream.
func watchStream(stream relay.Conn, lost func()) *watch {
	w := &watch{stream: stream, done: make(chan error, 1)}
	watcher, ok := stream.(relay.Watcher)
	if !ok {
		return w
	}
	w.timer = time.AfterFunc(quickDial, func() {
		err := watcher.WaitFailed()
		if err != nil {
			lost()
		}
		w.done <- err
	})
	return w
}

// stop ends the watching, and returns the error that broke the stream if one did.
func (w *watch) stop() error {
	if w.timer == nil || w.timer.Stop() {
		return nil // what is wrong with the stream its next user learns
	}
	w.stream.SetReadDeadline(time.Unix(1, 0))
	err := <-w.done
	w.stream.SetReadDeadline(time.Time{})
	return err
}
