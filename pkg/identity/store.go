// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Files are the paths of what a Store loads. All are PEM, except the deny file.
type Files struct {
	CA   string // certificates of the CAs to believe
	Cert string // our certificate, then its intermediates if there are any
	Key  string // its key, mode 0600 or stricter
	Deny string // deny file (see the package comment); empty: nobody is denied
}

// Validate names all missing paths.
func (f Files) Validate() error {
	var errs []error
	for _, p := range []struct{ what, path string }{{"CA bundle", f.CA}, {"certificate", f.Cert}, {"key", f.Key}} {
		if p.path == "" {
			errs = append(errs, fmt.Errorf("no path for the %s", p.what))
		}
	}
	return errors.Join(errs...)
}

// Options of a Store. Role is required.
type Options struct {
	Role  Role             // what our own certificate must say
	Late  string           // our name, if the certificate and the CA bundle may come after Open; see Present
	Poll  time.Duration    // how often Run looks at the files; default 5 s
	Clock func() time.Time // default time.Now
	Log   *slog.Logger     // default: silent
}

// Store holds who we are and whom we believe. All methods may be called from several goroutines.
type Store struct {
	role Role
	poll time.Duration
	now  func() time.Time
	log  *slog.Logger

	mu   sync.Mutex // held while loading; guards sets
	sets []*fileSet

	state atomic.Pointer[state]
}

// state is what is in force. It is never changed, only replaced.
type state struct {
	bundle
	leafSet
	deny denyList

	trusted error         // nil, or why our own bundle does not believe our own leaf
	changed chan struct{} // closed when this state has been replaced
}

// Open loads all files. A problem with one of them is a *FileError, possibly joined with others. Our own certificate must
// be one that our own bundle believes; the deny file is not asked about ourselves. With Options.Late neither has to be there yet, or to be
// of use: until then no handshake succeeds.
func Open(files Files, o Options) (*Store, error) {
	if o.Role != RoleAgent && o.Role != RoleServer {
		return nil, fmt.Errorf("open identity: unknown role %q", o.Role)
	}
	if err := files.Validate(); err != nil {
		return nil, err
	}
	s := &Store{role: o.Role, poll: o.Poll, now: o.Clock, log: slog.New(slog.DiscardHandler), sets: fileSets(files)}
	if s.poll <= 0 {
		s.poll = 5 * time.Second
	}
	if s.now == nil {
		s.now = time.Now
	}
	// An empty pool from the start: to x509, no pool means the system's.
	s.state.Store(&state{
		bundle: bundle{roots: x509.NewCertPool()}, leafSet: leafSet{self: Peer{Name: o.Late, Role: o.Role}}, changed: make(chan struct{}),
	})
	if err := s.load(true); err != nil && !s.bearable(o) {
		return nil, err
	}
	if err := s.state.Load().trusted; err != nil && o.Late == "" {
		return nil, &FileError{What: "certificate", Path: files.Cert, Err: err,
			hint: fmt.Sprintf("check that %s is the bundle of the CA that issued it", files.CA)}
	}
	if o.Log != nil {
		s.log = o.Log // only now: the caller reports what went wrong in here
	}
	return s, nil
}

// bearable says whether all that could not be loaded may come later.
func (s *Store) bearable(o Options) bool {
	return o.Late != "" && !slices.ContainsFunc(s.sets, func(set *fileSet) bool { return set.err != nil && set.stats.Set == "deny" })
}

// Present takes a certificate and its key, in PEM, in place of the files. It stays in force until the files say something else than they do
// now: who renews certificates writes them there, and presents them for the case that the disk is full. One that is refused changes nothing.
func (s *Store) Present(cert, key []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	data, trial := [][]byte{cert, key}, *s.state.Load()
	for _, set := range s.sets {
		if set.stats.Set != "leaf" {
			continue
		}
		if err := set.parse(&trial, s, data); err != nil {
			return err
		}
		_, set.beside, _ = set.readFiles() // that they cannot be read is why it is presented
		set.presented = data
	}
	_ = s.loadLocked(false) // what is wrong with other files is logged and counted
	return nil
}

// Reload loads all files now. A file set that cannot be loaded keeps its last good state; the error joins one *FileError for
// each of those.
func (s *Store) Reload() error { return s.load(true) }

// Run looks at the files until ctx ends, then returns nil. It compares what is in the files, not their times and inodes, so
// that symlink swaps, renames and edits in place within one clock tick are all seen.
func (s *Store) Run(ctx context.Context) error {
	tick := time.NewTicker(s.poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			_ = s.load(false) // logged and counted
		}
	}
}

// Changed returns a channel that is closed when the CA bundle, the leaf or the deny file has been replaced. To miss no change,
// get the channel first, then judge the live connections with Peer, then wait.
func (s *Store) Changed() <-chan struct{} { return s.state.Load().changed }

// Self describes our own certificate. NotAfter is the leaf's own. The name never changes while a Store lives.
func (s *Store) Self() Peer { return s.state.Load().self }

// Stats is a snapshot for metrics and status pages.
type Stats struct {
	Self        Peer
	Untrusted   string   // why our own bundle does not believe our own certificate; empty if it does
	CAs         []CAInfo // in the order of the file
	DenyEntries int
	Sets        []SetStats // "ca", "leaf", and "deny" if there is a deny file
}

// SetStats tells how loading one file set went.
type SetStats struct {
	Set      string // "ca", "leaf" or "deny"
	Loads    uint64 // how often new contents came into force, the first time included
	Failures uint64 // failed loads; one that Run keeps seeing counts once
	Error    string // why the last good state is kept; empty if the files are in force
}

// Stats returns a snapshot.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.state.Load()
	out := Stats{Self: st.self, CAs: st.infos, DenyEntries: st.deny.len()}
	if st.trusted != nil {
		out.Untrusted = st.trusted.Error()
	}
	for _, set := range s.sets {
		stats := set.stats
		if set.err != nil {
			stats.Error = set.err.Error()
		}
		out.Sets = append(out.Sets, stats)
	}
	return out
}

// load looks at all file sets and puts what has changed into force, all at once. Unless forced, only changed and failing
// sets are parsed again (a failing one because time alone may cure it), and a failure that is already known is not reported.
func (s *Store) load(force bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loadLocked(force)
}

func (s *Store) loadLocked(force bool) error {
	old := s.state.Load()
	next := *old
	var errs []error
	changed := false
	for _, set := range s.sets {
		applied, err := set.load(&next, s, force)
		if err != nil {
			errs = append(errs, err)
		}
		changed = changed || applied
	}
	if !changed {
		return errors.Join(errs...)
	}
	next.trusted = next.trustSelf(s.now())
	next.changed = make(chan struct{})
	s.state.Store(&next)
	close(old.changed)
	if next.trusted != nil {
		s.log.Warn("own certificate is not believed by own CA bundle", "error", next.trusted)
	}
	return errors.Join(errs...)
}

// trustSelf judges our own chain by our own bundle, as another process with the same bundle would. That a clock is
// behind is nothing to report here, see parseLeaf.
func (st *state) trustSelf(now time.Time) error {
	if st.leaf == nil {
		return nil // Open is about to fail
	}
	if begin := st.leaf.Leaf.NotBefore; now.Before(begin) {
		now = begin
	}
	_, err := verifyChain(st.chain, st.roots, now)
	return err
}

// fileSet is a group of files that are replaced together. Guarded by Store.mu.
type fileSet struct {
	files []source
	parse func(next *state, s *Store, data [][]byte) error // fills its part of next, or leaves it alone
	pause func()                                           // the moment between two reads, see settle

	presented [][]byte // in place of the files, see Store.Present
	beside    contents // what the files were then

	seen    contents // what the last load found
	applied contents // what is in force
	err     error    // of the last load
	stats   SetStats
}

func fileSets(f Files) []*fileSet {
	ca := source{what: "CA bundle", path: f.CA, limit: maxPEMFile}
	cert := source{what: "certificate", path: f.Cert, limit: maxPEMFile}
	key := source{what: "key", path: f.Key, limit: maxPEMFile, private: true}
	deny := source{what: "deny file", path: f.Deny, limit: maxDenyFile}
	sets := []*fileSet{
		{
			stats: SetStats{Set: "ca"}, files: []source{ca},
			parse: func(next *state, s *Store, data [][]byte) error {
				b, err := parseBundle(data[0], s.now())
				if err != nil {
					return ca.fail(err, "expected is a PEM file of CA certificates, such as the ca.crt of tunnelctl pki init")
				}
				next.bundle = b
				return nil
			},
		},
		{
			stats: SetStats{Set: "leaf"}, files: []source{cert, key},
			parse: func(next *state, s *Store, data [][]byte) error {
				l, err := parseLeaf(cert, key, data[0], data[1], s.role, s.now())
				if err != nil {
					return err
				}
				if old := next.self.Name; old != "" && old != l.self.Name {
					return cert.fail(fmt.Errorf("is for %q, this process runs as %q", l.self.Name, old), "restart to change the name")
				}
				next.leafSet = l
				return nil
			},
		},
	}
	if f.Deny != "" {
		sets = append(sets, &fileSet{
			stats: SetStats{Set: "deny"}, files: []source{deny},
			parse: func(next *state, _ *Store, data [][]byte) error {
				d, err := parseDeny(data[0])
				if err != nil {
					return deny.fail(err, "one node or server name, or serial:HEX, a line; # starts a comment")
				}
				next.deny = d
				return nil
			},
		})
	}
	for _, set := range sets {
		set.pause = func() { time.Sleep(20 * time.Millisecond) }
	}
	return sets
}

// contents is a hash of a set's files; the zero value is that of no files. Hashes, because there is no reason to keep copies
// of a key and of long lists.
type contents [sha256.Size]byte

func contentsOf(data [][]byte) contents {
	h := sha256.New()
	for _, d := range data {
		sum := sha256.Sum256(d)
		h.Write(sum[:])
	}
	return contents(h.Sum(nil))
}

// load brings the set into next. It reports whether next has changed.
func (set *fileSet) load(next *state, s *Store, force bool) (applied bool, err error) {
	data, found, err := set.read()
	if err == nil && !force && set.err == nil && found == set.seen {
		return false, nil
	}
	if err == nil && found != set.applied {
		data, found, err = set.settle(found)
	}
	set.seen = found
	if err == nil {
		err = set.parse(next, s, data)
	}
	known := set.err != nil && err != nil && set.err.Error() == err.Error()
	set.err = err
	if err != nil {
		if force || !known {
			set.stats.Failures++
			s.log.Warn("cannot load, the last good state stays in force", "set", set.stats.Set, "error", err)
		}
		return false, err
	}
	if found == set.applied {
		return false, nil
	}
	set.applied = found
	set.stats.Loads++
	s.log.Info("loaded", "set", set.stats.Set)
	return true, nil
}

func (set *fileSet) read() ([][]byte, contents, error) {
	data, found, err := set.readFiles()
	if set.presented != nil && (err != nil || found == set.beside) {
		return set.presented, contentsOf(set.presented), nil
	}
	set.presented = nil
	return data, found, err
}

func (set *fileSet) readFiles() ([][]byte, contents, error) {
	var all [][]byte
	for _, f := range set.files {
		data, err := f.read()
		if err != nil {
			return nil, contents{}, err
		}
		all = append(all, data)
	}
	return all, contentsOf(all), nil
}

// settle reads until it finds twice in a row, a moment apart, the same: a set read while it was being replaced may be half
// of each, the certificate from before a symlink swap and the key from after it.
func (set *fileSet) settle(before contents) ([][]byte, contents, error) {
	const tries = 10
	for range tries {
		set.pause()
		data, found, err := set.read()
		if err != nil || found == before {
			return data, found, err
		}
		before = found
	}
	return nil, contents{}, set.files[0].fail(errors.New("changes all the time"), "replace it with a rename, once")
}
