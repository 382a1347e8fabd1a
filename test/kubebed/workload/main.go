// SPDX-License-Identifier: Apache-2.0

// Command workload is what runs in the test bed's pods, beside a busybox.
//
//	workload pause           waits until it is told to end: a pod's sandbox
//	workload serve ADDR      logs a line a second, and tells each HTTP client which node, pod and peer it met
//	workload chat BYTES      logs numbered lines, so many bytes a second
//	workload get URL         fetches, with the pod's token if it has one
//
// The server's /bytes?n=N sends N bytes of [math/rand/v2.ChaCha8] with a seed of zeros, its /drip a line every 100 ms without end.
package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 1 && args[0] == "pause":
		pause()
	case len(args) == 2 && args[0] == "serve":
		err = serve(args[1])
	case len(args) == 2 && args[0] == "chat":
		err = chat(args[1])
	case len(args) == 2 && args[0] == "get":
		err = get(args[1])
	default:
		err = fmt.Errorf("usage: workload pause | serve ADDR | chat BYTES | get URL")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// pause is process 1 of pods that share their process ids, so it also waits for orphans.
func pause() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

func serve(addr string) error {
	go func() {
		for i := 1; ; i++ {
			fmt.Println("tick", i)
			time.Sleep(time.Second)
		}
	}()
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "node=%s pod=%s peer=%s path=%s\n", os.Getenv("NODE_NAME"), os.Getenv("POD_NAME"), r.RemoteAddr, r.URL.Path)
	})
	http.HandleFunc("/drip", func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			fmt.Fprintln(w, time.Now())
			if err := http.NewResponseController(w).Flush(); err != nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
	http.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		_, _ = io.CopyN(w, rand.NewChaCha8([32]byte{}), n) // who is gone needs no more
	})
	return http.ListenAndServe(addr, nil)
}

// chat writes lines of 1,000 bytes that begin with "line" and a number, ten times a second.
func chat(rate string) error {
	bytesPerSecond, err := strconv.Atoi(rate)
	if err != nil {
		return err
	}
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	out := bufio.NewWriter(os.Stdout)
	for n := 1; ; <-tick.C {
		for range bytesPerSecond / 10 / 1000 {
			fmt.Fprintf(out, "line %-994d\n", n)
			n++
		}
		if err := out.Flush(); err != nil {
			return err
		}
	}
}

func get(url string) error {
	req, err := http.NewRequest(http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	if token, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/token"); err == nil {
		req.Header.Set("Authorization", "Bearer "+string(token))
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	fmt.Println(resp.Status)
	_, err = io.Copy(os.Stdout, resp.Body)
	return err
}
