// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// SocketError says why a control socket cannot be had.
type SocketError struct {
	Path string
	Err  error

	reason, hint string
}

func (e *SocketError) Error() string { return fmt.Sprintf("control socket %s: %v", e.Path, e.Err) }
func (e *SocketError) Unwrap() error { return e.Err }

// Reason is "in_use", "not_a_socket" or "unusable".
func (e *SocketError) Reason() string { return e.reason }

// Hint is one sentence for the user, possibly empty.
func (e *SocketError) Hint() string { return e.hint }

// ListenControl makes the control socket, of mode 0600 from its first moment, and the folder it is in. A file that a dead
// daemon left behind is replaced; one that somebody answers on, or that is no socket, is a [*SocketError]. Closing
// the listener removes the file.
func ListenControl(ctx context.Context, path string) (net.Listener, error) {
	refuse := func(reason, hint string, err error) error {
		return &SocketError{Path: path, Err: err, reason: reason, hint: hint}
	}
	if len(path) >= len(syscall.RawSockaddrUnix{}.Path) {
		return nil, refuse("unusable", "use a shorter --control path", errors.New("path is longer than 107 bytes"))
	}
	folder := filepath.Dir(path)
	if err := os.MkdirAll(folder, 0o755); err != nil { //nolint:gosec // others may look; the socket is what is protected
		return nil, refuse("unusable", "choose another place with --control", withoutPath(err))
	}
	// Two daemons that start at once must not both find the file stale.
	unlock, err := lockFolder(folder)
	if err != nil {
		return nil, refuse("unusable", "", err)
	}
	defer unlock()

	if err := removeStale(ctx, path); err != nil {
		switch {
		case errors.Is(err, errAnswers):
			return nil, refuse("in_use", "stop the other daemon, or give this one another --control path", err)
		case errors.Is(err, errNoSocket):
			return nil, refuse("not_a_socket", "remove the file, or choose another --control path", err)
		}
		return nil, refuse("unusable", "", withoutPath(err))
	}
	config := net.ListenConfig{
		// The file gets the mode that the socket has when it is bound. To change it afterwards would leave a moment
		// in which everybody may connect; to change the umask would change it for the whole process.
		Control: func(_, _ string, raw syscall.RawConn) error {
			var chmod error
			if err := raw.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
				return err
			}
			return chmod
		},
	}
	ln, err := config.Listen(ctx, "unix", path)
	if err != nil {
		return nil, refuse("unusable", "", withoutPath(err))
	}
	return ln, nil
}

var (
	errAnswers  = errors.New("another daemon answers there")
	errNoSocket = errors.New("there is a file that is not a socket")
)

// removeStale removes a socket that nobody listens on.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errNoSocket
	}
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close()
		return errAnswers
	}
	// Anything but a refusal (a full backlog, say) means that somebody is there.
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w, but not us: %w", errAnswers, withoutPath(err))
	}
	return os.Remove(path)
}

func lockFolder(folder string) (unlock func(), err error) {
	dir, err := os.Open(folder)
	if err != nil {
		return nil, withoutPath(err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("lock folder: %w", err)
	}
	return func() { _ = dir.Close() }, nil
}

// withoutPath drops the operation and path, which a [SocketError] says already.
func withoutPath(err error) error {
	var (
		path *fs.PathError
		op   *net.OpError
		call *os.SyscallError
	)
	if errors.As(err, &path) {
		return path.Err
	}
	if errors.As(err, &op) {
		err = op.Err
	}
	if errors.As(err, &call) {
		return call.Err
	}
	return err
}
