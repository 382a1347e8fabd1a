// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

const maxPEMFile = 1 << 20 // bytes in a CA bundle, certificate or key file

// source is a file to be loaded.
type source struct {
	what    string // as in FileError
	path    string
	limit   int64 // bytes
	private bool  // must not be accessible to anybody but its owner
}

func (s source) fail(err error, hint string) *FileError {
	return &FileError{What: s.what, Path: s.path, Err: withoutPath(err), hint: hint}
}

// read returns the whole file.
func (s source) read() ([]byte, error) {
	// O_NONBLOCK: opening a FIFO by mistake must not hang.
	f, err := os.OpenFile(s.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		hint := ""
		switch {
		case errors.Is(err, fs.ErrNotExist):
			hint = "check the path; tunnelctl pki writes ca.crt, NAME.crt and NAME.key"
		case errors.Is(err, fs.ErrPermission):
			hint = "make it readable for the user that this process runs as"
		}
		return nil, s.fail(err, hint)
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, s.fail(err, "")
	case !st.Mode().IsRegular():
		return nil, s.fail(errors.New("not a regular file"), "give the path of a file")
	case s.private && st.Mode().Perm()&0o077 != 0:
		// An error rather than a warning: a key that others may read is no proof of identity, and nobody reads warnings.
		return nil, s.fail(fmt.Errorf("mode %04o lets others than its owner use it", st.Mode().Perm()),
			fmt.Sprintf("chmod 600 %s (in a Kubernetes volume: defaultMode: 0400, no fsGroup)", s.path))
	}
	data, err := io.ReadAll(io.LimitReader(f, s.limit+1))
	if err != nil {
		return nil, s.fail(err, "")
	}
	if int64(len(data)) > s.limit {
		return nil, s.fail(fmt.Errorf("larger than %d bytes", s.limit), "check that it is the right file")
	}
	return data, nil
}
