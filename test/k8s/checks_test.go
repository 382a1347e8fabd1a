// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"bufio"
	"bytes"
	"context"
	"crypto/md5"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// check is something that a person or a program does with a node. What it looks for in the answer is worked out there: an error
// message that quotes the question does not pass.
type check struct {
	name string
	run  func(*client) error
}

var checks = []check{
	{"top", (*client).top}, // takes longest
	{"logs", (*client).logs},
	{"logs -f", (*client).follow},
	{"logs --previous", (*client).previous},
	{"logs of a static pod", (*client).logsOfStatic},
	{"exec", (*client).exec},
	{"exec over SPDY", overSPDY((*client).exec)},
	{"exit status", (*client).exitStatus},
	{"stdin", (*client).stdin},
	{"stdin over SPDY", overSPDY((*client).stdin)},
	{"terminal", (*client).terminal},
	{"terminal over SPDY", overSPDY((*client).terminal)},
	{"attach", (*client).attach},
	{"port-forward", (*client).portForward},
	{"port-forward over SPDY", overSPDY((*client).portForward)},
	{"cp", (*client).copy},
	{"stats", (*client).stats},
	{"metrics", (*client).metrics},
	{"scrapes", (*client).scrapes},
	{"proxy to a pod", (*client).proxy},
	{"service by a pod", (*client).serviceByPod},
	{"service by the node's name", (*client).serviceByName},
	{"service by a process", (*client).serviceByProcess},
}

const (
	nodePort = "18080"   // of the pods in the nodes' own networks
	bulk     = 8_000_000 // bytes
)

// client makes one check on one node.
type client struct {
	w     *world
	node  *kubebed.Node
	limit time.Duration
	spdy  bool // where kubectl has a WebSocket otherwise
}

func overSPDY(f func(*client) error) func(*client) error {
	return func(c *client) error {
		c.spdy = true
		return f(c)
	}
}

// pod is the one in a network of its own.
func (c *client) pod() string { return "pod-" + c.node.Name }

func (c *client) command(ctx context.Context, args ...string) *netlab.Cmd {
	cmd := c.w.KubectlCommand(ctx, args...)
	if c.spdy {
		cmd.Env = append(cmd.Env, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false")
	}
	return cmd
}

// kubectl returns the standard output; standard error is in the error.
func (c *client) kubectl(stdin io.Reader, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.limit)
	defer cancel()
	cmd := c.command(ctx, args...)
	var out, problems bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &problems
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, problems.String())
	}
	return strings.TrimSpace(out.String()), err
}

// stream runs a kubectl until f has read what it wants of its output.
func (c *client) stream(f func(context.Context, *bufio.Scanner) error, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.limit)
	defer cancel()
	cmd := c.command(ctx, args...)
	read, write := io.Pipe()
	var problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = write, &problems
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		write.CloseWithError(io.EOF)
		ended <- err
	}()
	err := f(ctx, bufio.NewScanner(read))
	cancel()
	read.Close()
	if end := <-ended; err != nil {
		err = fmt.Errorf("kubectl %s: %w (%w: %s)", strings.Join(args, " "), err, end, problems.String())
	}
	return err
}

// ticks reads lines of the workload, which counts them.
func ticks(lines *bufio.Scanner, want int) error {
	last := 0
	for n := 0; n < want; n++ {
		if !lines.Scan() {
			return fmt.Errorf("%d of %d lines", n, want)
		}
		var number int
		if _, err := fmt.Sscanf(lines.Text(), "tick %d", &number); err != nil {
			return fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		if last != 0 && number != last+1 {
			return fmt.Errorf("tick %d after %d", number, last)
		}
		last = number
	}
	return nil
}

func (c *client) logs() error {
	out, err := c.kubectl(nil, "logs", c.pod())
	if err != nil {
		return err
	}
	if !strings.HasPrefix(out, "tick 1\n") {
		return fmt.Errorf("logs begin with %.20q", out)
	}
	return ticks(bufio.NewScanner(strings.NewReader(out)), strings.Count(out, "\n")+1)
}

func (c *client) follow() error {
	return c.stream(func(_ context.Context, lines *bufio.Scanner) error { return ticks(lines, 4) }, "logs", "--follow", "--tail=1", c.pod())
}

// previous reads what a container wrote that has ended.
func (c *client) previous() error {
	out, err := c.kubectl(nil, "logs", "--previous", "twice-"+c.node.Name)
	if err == nil && out != "life 1" {
		err = fmt.Errorf("the first life's logs: %q", out)
	}
	return err
}

// logsOfStatic reads those of a pod that the kubelet found in a folder.
func (c *client) logsOfStatic() error {
	out, err := c.kubectl(nil, "logs", "static-"+c.node.Name)
	if err == nil && !strings.HasPrefix(out, "tick 1") {
		err = fmt.Errorf("logs begin with %.20q", out)
	}
	return err
}

func (c *client) exec() error {
	out, err := c.kubectl(nil, "exec", c.pod(), "--", "sh", "-c", "echo $((40+2)) $(hostname)")
	if err == nil && out != "42 "+c.pod() {
		err = fmt.Errorf("exec: %q", out)
	}
	return err
}

func (c *client) exitStatus() error {
	_, err := c.kubectl(nil, "exec", c.pod(), "--", "sh", "-c", "exit 42")
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 42 {
		return nil
	}
	return fmt.Errorf("want exit status 42: %w", err)
}

func random(seed uint64) (content []byte, sum string) {
	content = make([]byte, bulk)
	source := rand.NewChaCha8([32]byte{byte(seed)})
	_, _ = source.Read(content) // never fails
	return content, fmt.Sprintf("%x", md5.Sum(content))
}

func (c *client) stdin() error {
	content, sum := random(1)
	out, err := c.kubectl(bytes.NewReader(content), "exec", "--stdin", c.pod(), "--", "md5sum")
	if err == nil && !strings.HasPrefix(out, sum) {
		err = fmt.Errorf("sum of stdin: %q, want %s", out, sum)
	}
	return err
}

// terminal is kubectl exec -it in a window that changes its size.
func (c *client) terminal() error {
	ctx, cancel := context.WithTimeout(context.Background(), c.limit)
	defer cancel()
	window, tty, err := openTerminal()
	if err != nil {
		return err
	}
	defer window.Close()
	defer tty.Close()
	resize := func(rows, columns uint16) error {
		return unix.IoctlSetWinsize(int(window.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns})
	}
	if err := resize(33, 77); err != nil {
		return err
	}
	// The window's size arrives a moment after the start.
	cmd := c.command(ctx, "exec", "--stdin", "--tty", c.pod(), "--", "sh", "-c", `
		until [ "$(stty size)" = "33 77" ]; do sleep 0.1; done 2>/dev/null; stty size
		while [ "$(stty size)" = "33 77" ]; do sleep 0.1; done; stty size; exit 7`)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		tty.Close() // now the window's reader gets an end
		ended <- err
	}()
	lines := bufio.NewScanner(window)
	var seen []string
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if seen = append(seen, line); line != "33 77" {
			continue
		}
		// A shell's terminal would send the signal; this kubectl has no session of its own.
		if err := errors.Join(resize(44, 88), cmd.Process.Signal(syscall.SIGWINCH)); err != nil {
			seen = append(seen, err.Error())
		}
	}
	err = <-ended
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 7 && len(seen) >= 2 && slices.Equal(seen[:2], []string{"33 77", "44 88"}) {
		return nil
	}
	return fmt.Errorf("terminal: %w, it showed %q", err, seen)
}

// openTerminal returns both ends of a pseudo terminal.
func openTerminal() (window, tty *os.File, err error) {
	// Not blocking, so that a read ends with the window.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	window = os.NewFile(uintptr(fd), "ptmx")
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		window.Close()
	}
	return window, tty, err
}

func (c *client) attach() error {
	return c.stream(func(_ context.Context, lines *bufio.Scanner) error { return ticks(lines, 3) }, "attach", c.pod())
}

// greeting is what the workload tells its clients.
func (c *client) greeting(answer, pod string) error {
	if !strings.Contains(answer, fmt.Sprintf("node=%s pod=%s ", c.node.Name, pod)) {
		return fmt.Errorf("answer %q is not from %s", answer, pod)
	}
	return nil
}

var forwarding = regexp.MustCompile(`^Forwarding from (127\.0\.0\.1:\d+) `)

// forward runs f with an address that is forwarded to the pod.
func (c *client) forward(f func(ctx context.Context, addr string) error) error {
	return c.stream(func(ctx context.Context, lines *bufio.Scanner) error {
		for lines.Scan() {
			if match := forwarding.FindStringSubmatch(lines.Text()); match != nil {
				go func() { // until the pipe is closed: it says something of each connection, and waits until that is read
					for lines.Scan() {
					}
				}()
				return f(ctx, match[1])
			}
		}
		return errors.New("no address is forwarded")
	}, "port-forward", c.pod(), ":8080")
}

func (c *client) portForward() error {
	return c.forward(func(ctx context.Context, addr string) error {
		for range 20 {
			answer, err := c.get(ctx, c.w.Cloud[0], "http://"+addr+"/")
			if err == nil {
				err = c.greeting(answer, c.pod())
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// get fetches over a new connection from a node, outside of its cgroup.
func (c *client) get(ctx context.Context, from *kubebed.Node, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: from.Dial}}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return string(content), err
}

func (c *client) copy() error {
	content, sum := random(2)
	dir, err := os.MkdirTemp(c.w.Lab.Dir(), "cp-")
	if err != nil {
		return err
	}
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	if err := os.WriteFile(there, content, 0o600); err != nil {
		return err
	}
	if _, err := c.kubectl(nil, "cp", there, c.pod()+":/tmp/copy"); err != nil {
		return err
	}
	out, err := c.kubectl(nil, "exec", c.pod(), "--", "md5sum", "/tmp/copy")
	if err == nil && !strings.HasPrefix(out, sum) {
		err = fmt.Errorf("sum of the copy there: %q, want %s", out, sum)
	}
	if err != nil {
		return err
	}
	if _, err := c.kubectl(nil, "cp", c.pod()+":/tmp/copy", back); err != nil {
		return err
	}
	got, err := os.ReadFile(back)
	if err == nil && !bytes.Equal(got, content) {
		err = fmt.Errorf("the copy that came back differs: %d bytes of %d", len(got), len(content))
	}
	return err
}

// raw asks the node's kubelet through the API server.
func (c *client) raw(path string) (string, error) {
	return c.kubectl(nil, "get", "--raw", "/api/v1/nodes/"+c.node.Name+"/proxy/"+path)
}

func (c *client) stats() error {
	out, err := c.raw("stats/summary")
	if err != nil {
		return err
	}
	var summary struct{ Node struct{ NodeName string } }
	if err := json.Unmarshal([]byte(out), &summary); err != nil {
		return err
	}
	if summary.Node.NodeName != c.node.Name {
		return fmt.Errorf("statistics of node %q", summary.Node.NodeName)
	}
	return nil
}

func (c *client) metrics() error {
	out, err := c.raw("metrics/cadvisor")
	if want := fmt.Sprintf("pod=%q", c.pod()); err == nil && !strings.Contains(out, want) {
		err = fmt.Errorf("metrics of %s lack %s", c.node.Name, want)
	}
	return err
}

// top asks for metrics that are younger than the question: the metrics-server goes round every ten seconds, and shows for a while what it
// has of a node that it reaches no more.
func (c *client) top() error {
	begin := time.Now()
	c.limit = max(c.limit, 25*time.Second)
	for {
		out, err := c.kubectl(nil, "get", "--raw", "/apis/metrics.k8s.io/v1beta1/nodes/"+c.node.Name)
		var metrics struct{ Timestamp time.Time }
		if err == nil {
			err = json.Unmarshal([]byte(out), &metrics)
		}
		if err == nil && metrics.Timestamp.After(begin) {
			break
		}
		if time.Since(begin) > c.limit {
			return fmt.Errorf("metrics of %v: %w", metrics.Timestamp, errors.Join(err, context.DeadlineExceeded))
		}
		time.Sleep(time.Second)
	}
	for _, what := range [][]string{{"node", c.node.Name}, {"pod", c.pod()}} {
		out, err := c.kubectl(nil, "top", what[0], "--no-headers", what[1])
		if err != nil {
			return err
		}
		if f := strings.Fields(out); len(f) < 3 || f[0] != what[1] || !strings.HasSuffix(f[1], "m") {
			return fmt.Errorf("top %s: %q", what[0], out)
		}
	}
	return nil
}

// scrapes asks the Prometheus in a pod whether it has reached the node's kubelet, its cadvisor and its node-exporter since the question.
func (c *client) scrapes() error {
	begin := time.Now()
	want := map[string]string{"kubelet": "10250", "cadvisor": "10250", "node": kubebed.ExporterPort}
	for {
		out, err := c.kubectl(nil, "get", "--raw", "/api/v1/namespaces/default/pods/"+kubebed.PrometheusPod+":9090/proxy/api/v1/targets?state=active")
		var answer struct {
			Data struct {
				ActiveTargets []struct {
					ScrapePool, Health, LastError string
					ScrapeURL                     string
					LastScrape                    time.Time
				}
			}
		}
		if err == nil {
			err = json.Unmarshal([]byte(out), &answer)
		}
		up := 0
		for _, t := range answer.Data.ActiveTargets {
			switch {
			case !strings.Contains(t.ScrapeURL, "//"+c.node.V4.String()+":"+want[t.ScrapePool]+"/"):
			case t.Health == "up" && t.LastScrape.After(begin):
				up++
			default:
				err = errors.Join(err, fmt.Errorf("%s: %s since %v: %s", t.ScrapeURL, t.Health, t.LastScrape, t.LastError))
			}
		}
		if err == nil && up == len(want) {
			return nil
		}
		if time.Since(begin) > c.limit {
			return fmt.Errorf("%d of %d targets are up: %w", up, len(want), errors.Join(err, context.DeadlineExceeded))
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// proxy has the API server itself ask a pod in the node's network.
func (c *client) proxy() error {
	out, err := c.kubectl(nil, "get", "--raw", "/api/v1/namespaces/default/pods/host-"+c.node.Name+":"+nodePort+"/proxy/")
	if err == nil {
		err = c.greeting(out, "host-"+c.node.Name)
	}
	return err
}

// serviceByPod asks a pod that is in the node's network, from a pod on the second cloud node.
func (c *client) serviceByPod() error { return c.askFromPod(c.node.V4.String()) }

// serviceByName has the pod ask the cluster's DNS.
func (c *client) serviceByName() error { return c.askFromPod(c.node.Name) }

func (c *client) askFromPod(host string) error {
	out, err := c.kubectl(nil, "exec", "pod-"+c.w.Cloud[1].Name, "--", "workload", "get", "http://"+host+":"+nodePort+"/")
	if err == nil {
		err = c.greeting(out, "host-"+c.node.Name)
	}
	return err
}

// serviceByProcess asks the same, from a program of the first cloud node that Kubernetes knows nothing of.
func (c *client) serviceByProcess() error {
	out, err := c.w.Cloud[0].Run("curl", "--silent", "--show-error", "--max-time", "10", "http://"+c.node.V4.String()+":"+nodePort+"/")
	if err == nil {
		err = c.greeting(out, "host-"+c.node.Name)
	}
	return err
}
