// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	var log bytes.Buffer
	getenv := func(socket string) func(string) string {
		return func(name string) string {
			if name != "NOTIFY_SOCKET" {
				t.Errorf("asked for %s", name)
			}
			return socket
		}
	}
	Notify(getenv(""), Ready, slog.New(slog.NewTextHandler(&log, nil)))
	Notify(getenv(path), Ready, slog.New(slog.NewTextHandler(&log, nil)))
	manager.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 100)
	n, err := manager.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if log.Len() != 0 {
		t.Errorf("log: %s", &log)
	}
	Notify(getenv(path+"-not"), Stopping, slog.New(slog.NewTextHandler(&log, nil)))
	if !strings.Contains(log.String(), "cannot tell the service manager") {
		t.Errorf("log: %s", &log)
	}
}
