// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"io"
	"testing"
	"time"
)

func BenchmarkRoundTrip(b *testing.B) {
	for _, k := range kinds {
		b.Run(k.name, func(b *testing.B) {
			r := start(b, k.wrap)
			_ = r.client.SetDeadline(time.Time{})
			_ = r.remote.SetDeadline(time.Time{})
			done := make(chan struct{})
			go func() { defer close(done); _, _ = io.Copy(r.remote, r.remote) }()
			buf := make([]byte, 64)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.client.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(r.client, buf); err != nil {
					b.Fatal(err)
				}
			}
			r.client.Close()
			<-done
			r.remote.Close()
			r.result(b)
		})
	}
}

func BenchmarkBulk(b *testing.B) {
	for _, k := range kinds {
		b.Run(k.name, func(b *testing.B) {
			r := start(b, k.wrap)
			_ = r.client.SetDeadline(time.Time{})
			_ = r.remote.SetDeadline(time.Time{})
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r.remote}, make([]byte, 256<<10))
			}()
			buf := make([]byte, 256<<10)
			b.SetBytes(int64(len(buf)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := r.client.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			r.client.Close()
			<-done
			r.remote.Close()
			r.result(b)
		})
	}
}

func BenchmarkConnection(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		r := start(b, TCP)
		r.client.Close()
		r.remote.Close()
		r.result(b)
	}
}
