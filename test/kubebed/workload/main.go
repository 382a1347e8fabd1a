// SPDX-License-Identifier: Apache-2.0

// Command workload is what runs in the test bed's pods, beside a busybox.
//
//	workload pause           waits until it is told to end: a pod's sandbox
//	workload serve ADDR      logs a line a second, and tells each HTTP client which node, pod and peer it met
//	workload get URL         fetches, with the pod's token if it has one
package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
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
	case len(args) == 2 && args[0] == "get":
		err = get(args[1])
	default:
		err = fmt.Errorf("usage: workload pause | serve ADDR | get URL")
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
	return http.ListenAndServe(addr, nil)
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
