// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
)

// archive writes an initramfs: a cpio archive in the "newc" format, the only one that the kernel reads. Every file belongs to
// root, and parent folders are made as they are needed. After an error everything is a no-op; close returns it.
type archive struct {
	w     *bufio.Writer
	err   error
	inode uint32
	made  map[string]bool
}

// Types of a file, as in the upper bits of st_mode.
const (
	typeFolder = 0o040000
	typeChar   = 0o020000
	typeFile   = 0o100000
	typeLink   = 0o120000
)

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), made: map[string]bool{}}
}

// file adds an ordinary file; name is absolute.
func (a *archive) file(name string, permissions uint32, content []byte) {
	a.entry(name, typeFile|permissions, 0, 0, content)
}

// folder adds a folder, if it is not there yet.
func (a *archive) folder(name string) {
	if name = path.Clean(name); name == "/" || a.made[name] {
		return
	}
	a.entry(name, typeFolder|0o755, 0, 0, nil)
	a.made[name] = true
}

func (a *archive) symlink(name, target string) {
	a.entry(name, typeLink|0o777, 0, 0, []byte(target))
}

// device adds a character device.
func (a *archive) device(name string, major, minor uint32) {
	a.entry(name, typeChar|0o600, major, minor, nil)
}

// close ends the archive. It does not close the writer below.
func (a *archive) close() error {
	a.record("TRAILER!!!", 0, 0, 0, nil)
	if a.err != nil {
		return fmt.Errorf("write initramfs: %w", a.err)
	}
	return a.w.Flush()
}

func (a *archive) entry(name string, mode, major, minor uint32, content []byte) {
	if !path.IsAbs(name) {
		a.err = errors.Join(a.err, fmt.Errorf("%q is not an absolute name", name))
		return
	}
	name = path.Clean(name)
	a.folder(path.Dir(name))
	a.inode++
	a.record(strings.TrimPrefix(name, "/"), mode, major, minor, content)
}

// record is thirteen numbers of eight hexadecimal digits, the name with its NUL, and the content, each part padded to four bytes.
func (a *archive) record(name string, mode, major, minor uint32, content []byte) {
	if a.err != nil {
		return
	}
	if uint64(len(content)) > math.MaxUint32 {
		a.err = errors.New(name + " has more than 4 GiB")
		return
	}
	const links, header = 1, 110
	a.printf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.inode, mode, 0 /* uid */, 0 /* gid */, links, 0 /* time */, len(content), 0, 0, major, minor, len(name)+1, 0)
	a.printf("%s\x00%s", name, padding(header+len(name)+1))
	if a.err == nil {
		_, a.err = a.w.Write(content)
	}
	a.printf("%s", padding(len(content)))
}

func (a *archive) printf(format string, args ...any) {
	if a.err == nil {
		_, a.err = fmt.Fprintf(a.w, format, args...)
	}
}

func padding(n int) string { return "\x00\x00\x00"[:(4-n%4)%4] }
