// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// folder is the small CA's directory while this issuer has it to itself, among all goroutines and processes.
type folder struct {
	path string
	dir  *os.File
}

// unfinished is the one temporary file; one is enough for the one holder of the lock.
const unfinished = ".unfinished"

// lockFolder waits for the directory. The lock is on the directory itself: there is no lock file to be left behind.
func lockFolder(path string) (*folder, error) {
	fail := func(err error) (*folder, error) {
		return nil, &FileError{What: "CA folder", Path: path, Err: withoutPath(err)}
	}
	dir, err := os.Open(path)
	if err != nil {
		return fail(err)
	}
	for {
		err = syscall.Flock(int(dir.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		dir.Close()
		return fail(err)
	}
	f := &folder{path: path, dir: dir}
	f.sweep()
	return f, nil
}

func (f *folder) unlock() { f.dir.Close() }

// sweep removes what a crashed issuer left, possibly a key.
func (f *folder) sweep() { os.Remove(filepath.Join(f.path, unfinished)) }

// write puts a file in place at once: whoever opens it finds all of the old contents or all of the new ones, also after a
// power failure.
func (f *folder) write(name string, mode fs.FileMode, data []byte) error {
	path, temp := filepath.Join(f.path, name), filepath.Join(f.path, unfinished)
	err := writeNew(temp, mode, data)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err == nil {
		err = f.dir.Sync()
	}
	if err != nil {
		f.sweep()
		return &FileError{What: "file", Path: path, Err: withoutPath(err)}
	}
	return nil
}

func writeNew(path string, mode fs.FileMode, data []byte) error {
	t, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = t.Write(data)
	return errors.Join(err, t.Chmod(mode), t.Sync(), t.Close()) // Chmod: free of the umask
}
