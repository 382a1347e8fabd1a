// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Control answers on the control socket. Status, Tunnels and Connections are required; what a daemon cannot do stays nil and is
// refused as "not_supported".
//
//	GET  /v1/status       Status
//	GET  /v1/targets      TargetList
//	GET  /v1/tunnels      TunnelList
//	GET  /v1/connections  ConnectionList
//	POST /v1/forget       {"node": NAME} → Forgotten
//	POST /v1/drain        {} → {} when the drain has begun
//	POST /v1/leave        {} → {} when the drain has begun that ends with nothing left in the kernel
//
// A refusal is {"error": SENTENCE, "reason": SNAKE_CASE, "hint": SENTENCE}, the last two only where there are any.
type Control struct {
	Status      func() Status
	Targets     func() []Target
	Tunnels     func() []Tunnel
	Connections func() []Connection

	// Forget removes a node and its targets, also from the stored ones. An error that wraps [ErrUnknownNode] says that
	// there is none of this name.
	Forget func(ctx context.Context, node string) (Forgotten, error)
	// Drain begins what SIGTERM begins, and does not wait for its end.
	Drain func(ctx context.Context) error
	// Leave is Drain for good: nothing stays in the kernel, and the process does nothing more until it is ended.
	Leave func(ctx context.Context) error

	Log *slog.Logger
}

// ErrUnknownNode says that a node is not known.
var ErrUnknownNode = errors.New("unknown node")

const maxNodeName = 253

// Serve answers on ln, which it closes, until ctx ends.
func (c Control) Serve(ctx context.Context, ln net.Listener) error {
	c.Log = orDiscard(c.Log)
	if err := serve(ctx, ln, nil, c.Handler(), 30*time.Second, c.Log); err != nil {
		return fmt.Errorf("serve control socket: %w", err)
	}
	return nil
}

// Handler returns what [Control.Serve] serves.
func (c Control) Handler() http.Handler {
	c.Log = orDiscard(c.Log)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", answer(c, c.Status != nil, func(*http.Request) (any, error) { return c.Status(), nil }))
	mux.HandleFunc("GET /v1/targets", answer(c, c.Targets != nil, func(*http.Request) (any, error) {
		return TargetList{SourceDaemon, notNil(c.Targets())}, nil
	}))
	mux.HandleFunc("GET /v1/tunnels", answer(c, c.Tunnels != nil, func(*http.Request) (any, error) {
		return TunnelList{notNil(c.Tunnels())}, nil
	}))
	mux.HandleFunc("GET /v1/connections", answer(c, c.Connections != nil, func(*http.Request) (any, error) {
		return ConnectionList{notNil(c.Connections())}, nil
	}))
	mux.HandleFunc("POST /v1/forget", answer(c, c.Forget != nil, func(r *http.Request) (any, error) {
		node, err := decodeForget(r.Body)
		if err != nil {
			return nil, err
		}
		return c.Forget(r.Context(), node)
	}))
	mux.HandleFunc("POST /v1/drain", answer(c, c.Drain != nil, func(r *http.Request) (any, error) {
		return struct{}{}, c.Drain(r.Context())
	}))
	mux.HandleFunc("POST /v1/leave", answer(c, c.Leave != nil, func(r *http.Request) (any, error) {
		return struct{}{}, c.Leave(r.Context())
	}))
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		c.refuse(w, &Refusal{Status: http.StatusNotFound, Message: fmt.Sprintf("there is no %s %s", r.Method, r.URL.Path), reason: "not_found"})
	})
	return mux
}

// answer makes a handler of a function; can says whether this daemon has it.
func answer(c Control, can bool, do func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !can {
			c.refuse(w, &Refusal{Status: http.StatusNotFound, Message: "this daemon cannot do that", reason: "not_supported", hint: "ask a tunnel-server; see --control"})
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		v, err := do(r)
		if err != nil {
			c.refuse(w, err)
			return
		}
		writeJSON(w, http.StatusOK, v, c.Log)
	}
}

// refuse answers with an error: a mistake of the caller, a refusal with a reason, or a failure.
func (c Control) refuse(w http.ResponseWriter, err error) {
	answer := refusalView{Error: err.Error()}
	if h := (interface{ Hint() string })(nil); errors.As(err, &h) {
		answer.Hint = h.Hint()
	}
	status := http.StatusInternalServerError
	if r := (interface{ Reason() string })(nil); errors.As(err, &r) {
		answer.Reason, status = r.Reason(), http.StatusConflict
	}
	if refusal := (*Refusal)(nil); errors.As(err, &refusal) {
		status = refusal.Status
	}
	if errors.Is(err, ErrUnknownNode) {
		answer.Reason, status = reasonUnknownNode, http.StatusNotFound
	}
	writeJSON(w, status, answer, c.Log)
}

const reasonUnknownNode = "unknown_node"

// refusalView is a refusal on the wire.
type refusalView struct {
	Error  string `json:"error"`
	Reason string `json:"reason,omitempty"`
	Hint   string `json:"hint,omitempty"`
}

// decodeForget reads {"node": NAME} and nothing else.
func decodeForget(body io.Reader) (node string, err error) {
	var request struct {
		Node string `json:"node"`
	}
	decoder := json.NewDecoder(body)
	decoder.DisallowUnknownFields()
	bad := func(message string) error {
		return &Refusal{Status: http.StatusBadRequest, Message: message, reason: "bad_request"}
	}
	if err := decoder.Decode(&request); err != nil {
		return "", bad("the request is not {\"node\": NAME}")
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return "", bad("the request goes on after its end")
	}
	if request.Node == "" || len(request.Node) > maxNodeName {
		return "", bad("a node's name has 1 to 253 bytes")
	}
	return request.Node, nil
}

// notNil makes a list that is empty "[]" and not "null".
func notNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
