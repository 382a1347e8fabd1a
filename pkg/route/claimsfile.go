// SPDX-License-Identifier: Apache-2.0

package route

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

const (
	claimsFileName    = "targets.json"
	claimsFileVersion = 1
	maxClaimsFile     = 64 << 20 // bytes
)

// claimsFile is the stored form of a [Known]. Methods must not be called at the same time.
//
// It is JSON with one node a line, so that people can read it, diff it and, with the server stopped, edit it:
//
//	{"version":1,"nodes":[
//	{"node":"edge-1","addrs":["10.99.1.10","2001:db8:1::10"]}
//	]}
type claimsFile struct {
	dir     string
	corrupt bool // the file could not be set aside yet; it must not be overwritten before it is
}

type storedClaims struct {
	Version int           `json:"version"`
	Nodes   []storedClaim `json:"nodes"`
}

type storedClaim struct {
	Node  string       `json:"node"`
	Addrs []netip.Addr `json:"addrs"`
}

// CorruptError says that the stored claims cannot be understood.
type CorruptError struct {
	KeptAs string // where the file is now; empty if it could not be renamed
	Err    error
}

func (e *CorruptError) Error() string {
	if e.KeptAs == "" {
		return fmt.Sprintf("stored targets are corrupt and could not be set aside: %v", e.Err)
	}
	return fmt.Sprintf("stored targets are corrupt (kept as %s): %v", e.KeptAs, e.Err)
}

func (e *CorruptError) Unwrap() error { return e.Err }

func (f *claimsFile) path() string { return filepath.Join(f.dir, claimsFileName) }

// read returns the stored claims, or fs.ErrNotExist, a *CorruptError after setting the file aside, or what the system says.
func (f *claimsFile) read() ([]Claim, error) {
	file, err := os.Open(f.path())
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxClaimsFile+1))
	if err != nil {
		return nil, err
	}
	claims, err := decodeClaims(data)
	if err != nil {
		kept, asideErr := f.setAside()
		if asideErr != nil {
			err = fmt.Errorf("%w; set aside: %w", err, asideErr)
		}
		return nil, &CorruptError{KeptAs: kept, Err: err}
	}
	return claims, nil
}

// setAside renames a corrupt file, for people to look at. Each gets a name of its own, and there is at most one a start.
func (f *claimsFile) setAside() (keptAs string, err error) {
	f.corrupt = true
	keptAs = f.path() + ".corrupt-" + time.Now().UTC().Format("20060102T150405.000000000Z")
	if err := os.Rename(f.path(), keptAs); err != nil {
		return "", err
	}
	f.corrupt = false
	return keptAs, nil
}

// write replaces the file: after a crash at any moment there is the old one or the new one, whole.
func (f *claimsFile) write(claims []Claim) error {
	if f.corrupt {
		if _, err := f.setAside(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set corrupt file aside: %w", err)
		}
		f.corrupt = false
	}
	temp := filepath.Join(f.dir, "."+claimsFileName+".new") // a fixed name: what a crash leaves behind is one file
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeSynced(temp, claims); err != nil {
		_ = os.Remove(temp) // a full disk must not also keep half a file; the error that counts is the first
		return err
	}
	if err := os.Rename(temp, f.path()); err != nil {
		return err
	}
	return syncDir(f.dir)
}

func writeSynced(path string, claims []Claim) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(file, 1<<16)
	err = encodeClaims(w, claims)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// syncDir makes a rename in the folder durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func encodeClaims(w io.Writer, claims []Claim) error {
	if _, err := fmt.Fprintf(w, `{"version":%d,"nodes":[`, claimsFileVersion); err != nil {
		return err
	}
	for i, c := range claims {
		line, err := json.Marshal(storedClaim(c))
		if err != nil {
			return err
		}
		sep := ",\n"
		if i == 0 {
			sep = "\n"
		}
		if _, err := fmt.Fprintf(w, "%s%s", sep, line); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, "\n]}\n")
	return err
}

// decodeClaims understands all of the file or refuses all of it: what is left of half a file would look like nodes that were
// forgotten, and their addresses would go direct.
func decodeClaims(data []byte) ([]Claim, error) {
	if len(data) > maxClaimsFile {
		return nil, fmt.Errorf("more than %d bytes", maxClaimsFile)
	}
	// The version first, alone: a later one may have fields that this one does not know.
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, err
	}
	if head.Version != claimsFileVersion {
		return nil, fmt.Errorf("version %d, this program reads %d", head.Version, claimsFileVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var stored storedClaims
	if err := dec.Decode(&stored); err != nil {
		return nil, err
	}
	if len(stored.Nodes) > MaxNodes {
		return nil, fmt.Errorf("%d nodes, more than %d", len(stored.Nodes), MaxNodes)
	}
	claims := make([]Claim, 0, len(stored.Nodes))
	seen := make(map[string]struct{}, len(stored.Nodes))
	addrs := 0
	for _, s := range stored.Nodes {
		c, err := normalize(Claim(s))
		if err != nil {
			return nil, err
		}
		if _, dup := seen[c.Node]; dup {
			return nil, fmt.Errorf("node %q stands there twice", c.Node)
		}
		seen[c.Node] = struct{}{}
		if addrs += len(c.Addrs); addrs > MaxAddrs {
			return nil, fmt.Errorf("more than %d addresses", MaxAddrs)
		}
		claims = append(claims, c)
	}
	return claims, nil
}
