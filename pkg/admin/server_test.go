// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func testConfig() Config {
	return Config{
		Name: "tunnel-test", Version: "v1",
		Ready:   func() []Condition { return []Condition{{Name: "hooks", OK: true}} },
		Metrics: func() []Metric { return []Metric{Counter("edge_tunnel_tests_total", "Tests.", 3)} },
		State: func() State {
			return State{Status: Status{Role: RoleServer, Name: "cloud-1"}, Targets: []Target{{Addr: netip.MustParseAddr("10.99.1.10"), Node: "edge-1", State: TargetOnline}}}
		},
	}
}

// started serves config over TCP and returns its base URL.
func started(t *testing.T, config Config) (url string, stop func()) {
	t.Helper()
	s, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	ln := localListener(t)
	return "http://" + ln.Addr().String(), running(t, ln, s.Serve)
}

// request makes a request on a connection of its own, so that nothing idles on.
func request(t *testing.T, method, url string, change ...func(*http.Request)) (status int, header http.Header, body string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true
	for _, c := range change {
		c(r)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, response.Header, string(content)
}

func TestPages(t *testing.T) {
	url, _ := started(t, testConfig())
	for _, c := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"GET", "/healthz", 200, "ok\n"},
		{"GET", "/readyz", 200, "[+]hooks ok\nready\n"},
		{"GET", "/readyz?format=json", 200, `{"ready":true,"conditions":[{"name":"hooks","ok":true}]}`},
		{"GET", "/metrics", 200, "# TYPE edge_tunnel_tests_total counter\nedge_tunnel_tests_total 3\n"},
		{"GET", "/metrics", 200, `edge_tunnel_build_info{version="v1"} 1`},
		{"GET", "/metrics", 200, "\ngo_goroutines "},
		{"GET", "/metrics", 200, "\nprocess_open_fds "},
		{"GET", "/state", 200, `"targets":[{"addr":"10.99.1.10","node":"edge-1","state":"online"}]`},
		{"GET", "/", 200, `<h1>tunnel-test v1</h1>`},
		{"HEAD", "/healthz", 200, ""},
		{"POST", "/state", 405, ""},
		{"DELETE", "/healthz", 405, ""},
		{"GET", "/nothing", 404, ""},
		{"GET", "/debug/pprof/", 404, ""},
	} {
		status, header, body := request(t, c.method, url+c.path)
		if status != c.status || !strings.Contains(body, c.want) {
			t.Errorf("%s %s: %d, want %d with %q:\n%.2000s", c.method, c.path, status, c.status, c.want, body)
		}
		if header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s %s: headers %v", c.method, c.path, header)
		}
	}
}

func TestIndexListsWhatThereIs(t *testing.T) {
	config := testConfig()
	config.Pprof = true
	config.Name = "<script>"
	url, _ := started(t, config)
	_, _, body := request(t, "GET", url+"/")
	if strings.Contains(body, "<script>") {
		t.Errorf("the name is markup:\n%s", body)
	}
	for line := range strings.Lines(body) {
		if _, rest, ok := strings.Cut(line, `href="`); ok {
			path, _, _ := strings.Cut(rest, `"`)
			if status, _, _ := request(t, "GET", url+path); status != 200 {
				t.Errorf("%s is listed and answers %d", path, status)
			}
		}
	}
	if !strings.Contains(body, "/debug/pprof/") {
		t.Error("pprof is not listed")
	}
}

func TestNotReady(t *testing.T) {
	conditions := []Condition{{Name: "hooks", OK: true}, {Name: "canary", Reason: "it did not arrive\nagain"}}
	config := testConfig()
	config.Ready = func() []Condition { return conditions }
	url, _ := started(t, config)
	status, _, body := request(t, "GET", url+"/readyz")
	if want := "[+]hooks ok\n[-]canary: it did not arrive; again\nnot ready\n"; status != 503 || body != want {
		t.Errorf("%d %q, want 503 %q", status, body, want)
	}
	status, _, body = request(t, "GET", url+"/readyz?format=json")
	var answer struct {
		Ready      bool
		Conditions []Condition
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || status != 503 || answer.Ready || len(answer.Conditions) != 2 {
		t.Errorf("%d %s %v", status, body, err)
	}
	conditions = nil
	if status, _, _ := request(t, "GET", url+"/readyz"); status != 503 {
		t.Errorf("without any condition it answers %d", status)
	}
}

func TestWebPagesAreKeptAway(t *testing.T) {
	url, _ := started(t, testConfig())
	for host, want := range map[string]int{
		"evil.example": 403, "evil.example:80": 403, "127.0.0.1.evil.example": 403,
		"localhost:10265": 200, "localhost": 200, "127.0.0.1": 200, "[::1]:10265": 200, "[::1]": 200,
	} {
		status, _, _ := request(t, "GET", url+"/state", func(r *http.Request) { r.Host = host })
		if status != want {
			t.Errorf("host %q: %d, want %d", host, status, want)
		}
	}
}

func TestPprof(t *testing.T) {
	config := testConfig()
	config.Pprof = true
	url, _ := started(t, config)
	if status, _, body := request(t, "GET", url+"/debug/pprof/goroutine?debug=1"); status != 200 || !strings.Contains(body, "goroutine profile") {
		t.Errorf("%d %.200s", status, body)
	}
}

func TestConfigIsChecked(t *testing.T) {
	_, err := New(Config{})
	for _, field := range []string{"Name", "Ready", "Metrics", "State"} {
		if err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%v does not name %s", err, field)
		}
	}
}

// A profile that was asked to take 20 seconds, and a connection that says nothing, must not hold up the end.
func TestServeEndsWithRequestsInProgress(t *testing.T) {
	config := testConfig()
	config.Pprof = true
	entered := make(chan struct{})
	var once atomic.Bool
	config.State = func() State {
		if once.CompareAndSwap(false, true) {
			close(entered)
		}
		return State{}
	}
	url, stop := started(t, config)
	addr := strings.TrimPrefix(url, "http://")
	var silent []net.Conn
	for range 3 {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		silent = append(silent, conn)
	}
	fmt.Fprintf(silent[0], "GET /debug/pprof/trace?seconds=20 HTTP/1.1\r\nHost: localhost\r\n\r\n")
	fmt.Fprintf(silent[1], "GET /state HTTP/1.1\r\nHost: localhost\r\n\r\n")
	<-entered
	if _, err := bufio.NewReader(silent[1]).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	stop()
	if took := time.Since(begun); took > 15*time.Second {
		t.Errorf("the end took %v", took)
	}
}

func TestServeReportsABrokenListener(t *testing.T) {
	s, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	ln := localListener(t)
	ln.Close()
	if err := s.Serve(context.Background(), ln); err == nil {
		t.Error("no error from a closed listener")
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	url, _ := started(t, testConfig())
	addr := strings.TrimPrefix(url, "http://")
	var conns []net.Conn
	for range maxConns {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// A request on each makes sure that it was accepted.
		fmt.Fprintf(conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	late, err := net.Dial("tcp", addr) // the kernel's backlog takes it
	if err != nil {
		t.Fatal(err)
	}
	defer late.Close()
	fmt.Fprintf(late, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
	if err := late.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := late.Read(make([]byte, 1)); err == nil {
		t.Errorf("connection %d was served (%d bytes)", maxConns+1, n)
	}
	conns[0].Close()
	if err := late.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := late.Read(make([]byte, 1)); err != nil {
		t.Errorf("after one has gone: %v", err)
	}
}
