// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strconv"
	"strings"
	"time"
)

// Lines of guest/init.sh begin with mark; everything else on the serial line is output of the kernel or of the present job:
//
//	@vmtest boot RELEASE
//	@vmtest start JOB
//	@vmtest end JOB STATUS SECONDS
//	@vmtest tainted NUMBER
//	@vmtest done
const mark = "@vmtest "

const (
	maxLine   = 64 << 10 // longer lines are cut into pieces
	maxLast   = 4 << 10
	maxOutput = 4 << 20 // what is kept of one job's output; the log has the rest
)

// console reads the serial line as it is written: an io.Writer that never fails. It has no goroutine and no lock; read
// its fields after the last Write.
type console struct {
	onEnd func(jobResult) // called for each job that ended; may be nil

	release string // what booted, empty when nothing did
	jobs    []jobResult
	taint   uint64
	done    bool // the guest came to its own end

	rest []byte // of a line that has not ended
	last []byte // the end of what was printed outside of jobs
	open bool   // the last job is running
}

// jobResult is what one job printed and how it ended. Its tests are told apart by the lines of "go test -v", which shell jobs print too.
type jobResult struct {
	name    string
	output  []byte // at most maxOutput
	ended   bool
	status  int
	took    time.Duration
	passed  int
	failed  []string
	skipped []string
}

// ok says whether a job ended well and tested anything at all.
func (j jobResult) ok() bool {
	return j.ended && j.status == 0 && len(j.failed) == 0 && j.passed > 0
}

func (c *console) Write(p []byte) (int, error) {
	c.rest = append(c.rest, p...)
	for {
		end := bytes.IndexByte(c.rest, '\n')
		switch {
		case end >= 0 && end <= maxLine:
			c.line(string(bytes.TrimRight(c.rest[:end], "\r")))
			c.rest = c.rest[end+1:]
		case len(c.rest) > maxLine:
			c.line(string(c.rest[:maxLine]))
			c.rest = c.rest[maxLine:]
		default:
			return len(p), nil
		}
	}
}

func (c *console) line(line string) {
	if words, ok := strings.CutPrefix(line, mark); ok {
		c.event(strings.Fields(words))
		return
	}
	if c.open {
		c.jobs[len(c.jobs)-1].add(line)
		return
	}
	c.last = append(append(c.last, line...), '\n')
	c.last = c.last[max(0, len(c.last)-maxLast):]
}

// event takes a line of the guest's. What it cannot read it leaves: then the job has no end, which is a failure.
func (c *console) event(words []string) {
	if len(words) == 0 {
		return
	}
	switch {
	case words[0] == "boot" && len(words) == 2:
		c.release = words[1]
	case words[0] == "start" && len(words) == 2:
		c.jobs = append(c.jobs, jobResult{name: words[1]})
		c.open = true
	case words[0] == "end" && len(words) == 4:
		c.end(words[1], words[2], words[3])
	case words[0] == "tainted" && len(words) == 2:
		c.taint, _ = strconv.ParseUint(words[1], 10, 64)
	case words[0] == "done":
		c.done = true
	}
}

func (c *console) end(name, status, seconds string) {
	if !c.open || c.jobs[len(c.jobs)-1].name != name {
		return
	}
	code, err := strconv.Atoi(status)
	if err != nil {
		return
	}
	took, err := strconv.ParseUint(seconds, 10, 32)
	if err != nil {
		return
	}
	j := &c.jobs[len(c.jobs)-1]
	j.ended, j.status, j.took = true, code, time.Duration(took)*time.Second
	c.open = false
	if c.onEnd != nil {
		c.onEnd(*j)
	}
}

func (j *jobResult) add(line string) {
	if len(j.output)+len(line) < maxOutput {
		j.output = append(append(j.output, line...), '\n')
	}
	verdict, ok := strings.CutPrefix(strings.TrimLeft(line, " "), "--- ")
	if !ok {
		return
	}
	verdict, name, ok := strings.Cut(verdict, ": ")
	if !ok {
		return
	}
	name, _, _ = strings.Cut(name, " (")
	switch verdict {
	case "PASS":
		j.passed++
	case "FAIL":
		j.failed = append(j.failed, name)
	case "SKIP":
		j.skipped = append(j.skipped, name)
	}
}

// brokenKernel names what the kernel complained of: a warning or worse with a stack trace (bits 9 and 7 of its taint).
func (c *console) brokenKernel() string {
	switch {
	case c.taint&(1<<7) != 0:
		return "the kernel crashed (oops)"
	case c.taint&(1<<9) != 0:
		return "the kernel printed a warning"
	}
	return ""
}
