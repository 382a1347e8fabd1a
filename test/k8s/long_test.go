// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"bufio"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	chatRate  = 1_000_000 // bytes a second that a pod logs
	chatTime  = time.Minute
	stdinMuch = 100_000_000 // bytes
	gigabyte  = 1 << 30
	crowd     = 100 // connections through one port-forward
)

// longChecks go the ways of the others, with much more. They would fail without a tunnel for lack of time alone, so they are made with one only.
var longChecks = []check{
	{"logs -f for a minute", (*client).followLong},
	{"stdin of 100 MB", (*client).stdinLong},
	{"stdin of 100 MB over SPDY", overSPDY((*client).stdinLong)},
	{"port-forward of 100 connections", (*client).forwardCrowd},
	{"port-forward of 1 GiB", (*client).forwardGigabyte},
	{"cp of 1 GiB", (*client).copyGigabyte},
}

// longLimit is for a machine that does all of them at once, and whatever else.
const longLimit = 5 * time.Minute

// followLong reads what a pod logs for a minute: complete and in order.
func (c *client) followLong() error {
	c.limit = longLimit
	const want = chatRate * int64(chatTime/time.Second)
	return c.stream(func(_ context.Context, lines *bufio.Scanner) error {
		begin, last := time.Now(), 0
		for got := int64(0); got < want; got += int64(len(lines.Bytes())) + 1 {
			if !lines.Scan() {
				return fmt.Errorf("%d of %d bytes after %v", got, want, time.Since(begin))
			}
			var number int
			if _, err := fmt.Sscanf(lines.Text(), "line %d ", &number); err != nil || len(lines.Bytes()) != 999 {
				return fmt.Errorf("line %.40q of %d bytes: %w", lines.Text(), len(lines.Bytes()), err)
			}
			if last != 0 && number != last+1 {
				return fmt.Errorf("line %d after %d", number, last)
			}
			last = number
		}
		if took := time.Since(begin); took < chatTime*9/10 {
			return fmt.Errorf("a minute's lines came within %v", took)
		}
		return nil
	}, "logs", "--follow", "--tail=1", "chat-"+c.node.Name)
}

// unguessable is n bytes that nobody can guess, without keeping them.
func unguessable(n int64, seed byte) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{seed}), n)
}

func sumOf(r io.Reader) (string, error) {
	hash := md5.New()
	_, err := io.Copy(hash, r)
	return hex.EncodeToString(hash.Sum(nil)), err
}

func (c *client) stdinLong() error {
	c.limit = longLimit
	want, err := sumOf(unguessable(stdinMuch, 3))
	if err != nil {
		return err
	}
	out, err := c.kubectl(unguessable(stdinMuch, 3), "exec", "--stdin", c.pod(), "--", "md5sum")
	if err == nil && !strings.HasPrefix(out, want) {
		err = fmt.Errorf("sum of stdin: %q, want %s", out, want)
	}
	return err
}

// forwardCrowd has a crowd of connections open at once.
func (c *client) forwardCrowd() error {
	c.limit = longLimit
	return c.forward(func(ctx context.Context, addr string) error {
		ctx, cancel := context.WithCancel(ctx)
		var wait sync.WaitGroup
		defer wait.Wait()
		defer cancel()
		errs := make(chan error, crowd)
		var arrived atomic.Int32
		all := make(chan struct{}) // closed when all of them are connected
		for range crowd {
			wait.Go(func() {
				errs <- c.askWhen(ctx, addr, all, func() {
					if arrived.Add(1) == crowd {
						close(all)
					}
				})
			})
		}
		for range crowd {
			if err := <-errs; err != nil {
				return fmt.Errorf("%d of %d were connected: %w", arrived.Load(), crowd, err)
			}
		}
		return nil
	})
}

// askWhen connects, sends half a request and calls arrived, and then the rest when all is closed.
func (c *client) askWhen(ctx context.Context, addr string, all <-chan struct{}, arrived func()) error {
	conn, err := c.w.Cloud[0].Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline) // an error shows at the next use
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\nHost: "); err != nil {
		return err
	}
	arrived()
	select {
	case <-all:
	case <-ctx.Done():
		return ctx.Err()
	}
	if _, err := io.WriteString(conn, "x\r\n\r\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	return c.greeting(string(answer), c.pod())
}

func (c *client) forwardGigabyte() error {
	c.limit = longLimit
	want, err := sumOf(unguessable(gigabyte, 0))
	if err != nil {
		return err
	}
	return c.forward(func(ctx context.Context, addr string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s/bytes?n=%d", addr, int64(gigabyte)), http.NoBody)
		if err != nil {
			return err
		}
		resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: c.w.Cloud[0].Dial}}).Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		got, err := sumOf(resp.Body)
		if err == nil && got != want {
			err = fmt.Errorf("sum %s, want %s", got, want)
		}
		return err
	})
}

func (c *client) copyGigabyte() (err error) {
	c.limit = longLimit
	dir, err := os.MkdirTemp(c.w.Lab.Dir(), "cp-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	file, err := os.Create(there)
	if err != nil {
		return err
	}
	hash := md5.New()
	_, err = io.Copy(io.MultiWriter(file, hash), unguessable(gigabyte, 4))
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	sum := hex.EncodeToString(hash.Sum(nil))
	if _, err := c.kubectl(nil, "cp", there, c.pod()+":/tmp/gigabyte"); err != nil {
		return err
	}
	out, err := c.kubectl(nil, "exec", c.pod(), "--", "md5sum", "/tmp/gigabyte")
	if err == nil && !strings.HasPrefix(out, sum) {
		err = fmt.Errorf("sum of the copy there: %q, want %s", out, sum)
	}
	if err != nil {
		return err
	}
	// With retries, which kubectl has for streams that end early.
	if _, err := c.kubectl(nil, "cp", "--retries=5", c.pod()+":/tmp/gigabyte", back); err != nil {
		return err
	}
	if _, err := c.kubectl(nil, "exec", c.pod(), "--", "sh", "-c", ": >/tmp/gigabyte"); err != nil {
		return err
	}
	file, err = os.Open(back)
	if err != nil {
		return err
	}
	defer file.Close()
	got, err := sumOf(file)
	if err == nil && got != sum {
		err = fmt.Errorf("sum of the copy that came back: %s, want %s", got, sum)
	}
	return err
}
