// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"time"
)

// maxSkew is how far our clock may be from the API server's for certificates to be made by it. What is signed begins an hour early.
const maxSkew = 30 * time.Minute

func checkSkew(ahead time.Duration) error {
	if ahead.Abs() <= maxSkew {
		return nil
	}
	return fmt.Errorf("this machine's clock is %v off the API server's: nothing is signed by it", ahead.Round(time.Second))
}

// Skew measures how far this machine's clock is from the API server's, by the Date of what it answers.
type Skew struct {
	ahead atomic.Int64
	now   func() time.Time // nil: time.Now
}

// Ahead is how far our clock is ahead, negative if it is behind, by the last answer.
func (s *Skew) Ahead() time.Duration { return time.Duration(s.ahead.Load()) }

// Wrap has the answers that come through a transport looked at, see rest.Config.Wrap.
func (s *Skew) Wrap(next http.RoundTripper) http.RoundTripper { return &skewed{s, next} }

type skewed struct {
	*Skew
	next http.RoundTripper
}

func (s *skewed) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := s.next.RoundTrip(r)
	if err != nil {
		return resp, err
	}
	if date, bad := http.ParseTime(resp.Header.Get("Date")); bad == nil {
		now := time.Now
		if s.now != nil {
			now = s.now
		}
		s.ahead.Store(int64(now().Sub(date)))
	}
	return resp, nil
}
