// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

const (
	maxAnswer     = 256 << 20 // bytes: about a million targets
	clientTimeout = 10 * time.Second
)

// Client talks to a daemon over its control socket. It keeps no connection open and needs no Close.
type Client struct {
	path string
	http http.Client
}

// NewClient returns a client of the daemon whose control socket is at path. It connects at each request.
func NewClient(path string) *Client {
	c := &Client{path: path}
	c.http.Timeout = clientTimeout
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}
	return c
}

// Path is where the control socket is.
func (c *Client) Path() string { return c.path }

// Status asks for the daemon's status.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return ask[Status](ctx, c, http.MethodGet, "/v1/status", nil)
}

// Targets asks a server for its targets.
func (c *Client) Targets(ctx context.Context) (TargetList, error) {
	return ask[TargetList](ctx, c, http.MethodGet, "/v1/targets", nil)
}

// Tunnels asks for the tunnels.
func (c *Client) Tunnels(ctx context.Context) (TunnelList, error) {
	return ask[TunnelList](ctx, c, http.MethodGet, "/v1/tunnels", nil)
}

// Connections asks for the open connections.
func (c *Client) Connections(ctx context.Context) (ConnectionList, error) {
	return ask[ConnectionList](ctx, c, http.MethodGet, "/v1/connections", nil)
}

// Forget makes a server forget a node. errors.Is(err, ErrUnknownNode) when there is none of this name.
func (c *Client) Forget(ctx context.Context, node string) (Forgotten, error) {
	return ask[Forgotten](ctx, c, http.MethodPost, "/v1/forget", map[string]string{"node": node})
}

// Drain makes the daemon end as SIGTERM does. It returns when the drain has begun.
func (c *Client) Drain(ctx context.Context) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "/v1/drain", struct{}{})
	return err
}

// Leave makes a server end its work and remove what it has in the kernel. Its process stays, and does nothing, until it is ended. Leave returns when the
// drain has begun.
func (c *Client) Leave(ctx context.Context) error {
	_, err := ask[struct{}](ctx, c, http.MethodPost, "/v1/leave", struct{}{})
	return err
}

// ask sends one request and reads its answer.
func ask[T any](ctx context.Context, c *Client, method, path string, body any) (answer T, err error) {
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return answer, fmt.Errorf("encode request: %w", err)
		}
		content = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://edge-tunnel"+path, content)
	if err != nil {
		return answer, fmt.Errorf("make request: %w", err)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return answer, c.unreachable(ctx, err)
	}
	defer response.Body.Close()
	limited := io.LimitReader(response.Body, maxAnswer)
	if response.StatusCode != http.StatusOK {
		return answer, refusal(response, limited)
	}
	if err := json.NewDecoder(limited).Decode(&answer); err != nil {
		return answer, fmt.Errorf("read answer of the daemon at %s: %w", c.path, err)
	}
	return answer, nil
}

// ErrNotRunning says that no daemon listens on a control socket.
var ErrNotRunning = errors.New("no daemon is running")

// UnreachableError says why a daemon cannot be asked. errors.Is(err, ErrNotRunning) when there is none.
type UnreachableError struct {
	Path string
	Err  error

	hint string
}

func (e *UnreachableError) Error() string {
	return fmt.Sprintf("ask the daemon at %s: %v", e.Path, e.Err)
}
func (e *UnreachableError) Unwrap() error { return e.Err }

// Hint is one sentence for the user, possibly empty.
func (e *UnreachableError) Hint() string { return e.hint }

func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	e := &UnreachableError{Path: c.path, Err: err}
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.Err, e.hint = ErrNotRunning, "start tunnel-server or tunnel-agent, or say where its socket is with --control PATH"
	case errors.Is(err, syscall.ECONNREFUSED):
		e.Err, e.hint = fmt.Errorf("%w (it left its socket behind)", ErrNotRunning), "look at the daemon's log for why it ended, and start it again"
	case errors.Is(err, fs.ErrPermission):
		e.Err, e.hint = fs.ErrPermission, "only the user that runs the daemon may ask it, usually root"
	case errors.As(err, &timeout) && timeout.Timeout():
		e.Err, e.hint = fmt.Errorf("no answer within %v", clientTimeout), "the daemon is stopped or very busy; its log may say more"
	default:
		e.Err = withoutPath(err)
	}
	return e
}

// Refusal is the daemon's answer when it does not do what it was asked.
type Refusal struct {
	Status  int    // of HTTP
	Message string // a sentence

	reason, hint string
}

func (r *Refusal) Error() string { return r.Message }

// Reason is a short snake_case word, possibly empty.
func (r *Refusal) Reason() string { return r.reason }

// Hint is one sentence for the user, possibly empty.
func (r *Refusal) Hint() string { return r.hint }

// Is makes errors.Is work across the socket.
func (r *Refusal) Is(target error) bool {
	return target == ErrUnknownNode && r.reason == reasonUnknownNode
}

func refusal(response *http.Response, body io.Reader) error {
	var view refusalView
	if err := json.NewDecoder(body).Decode(&view); err != nil || view.Error == "" {
		view = refusalView{Error: "the daemon answered " + response.Status}
	}
	return &Refusal{Status: response.StatusCode, Message: view.Error, reason: view.Reason, hint: view.Hint}
}
