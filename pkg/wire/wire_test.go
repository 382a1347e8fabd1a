// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"bytes"
	"encoding"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// reader reads any message as an interface value, so that one test serves them all.
type reader func(io.Reader) (encoding.BinaryAppender, error)

func as[M encoding.BinaryAppender](read func(io.Reader) (M, error)) reader {
	return func(r io.Reader) (encoding.BinaryAppender, error) { m, err := read(r); return m, err }
}

var readers = map[Type]reader{
	TypeLogin:      as(ReadLogin),
	TypeLoginReply: as(ReadLoginReply),
	TypeHeader:     as(ReadHeader),
	TypeReply:      as(ReadReply),
	TypeNotice:     as(ReadNotice),
	TypeNames:      as(ReadNames),
}

func write1(w io.Writer, m encoding.BinaryAppender) error {
	switch m := m.(type) {
	case Login:
		return WriteLogin(w, m)
	case LoginReply:
		return WriteLoginReply(w, m)
	case Header:
		return WriteHeader(w, m)
	case Reply:
		return WriteReply(w, m)
	case Notice:
		return WriteNotice(w, m)
	case Names:
		return WriteNames(w, m)
	}
	panic("no such message")
}

// golden holds the bytes of every message as they were when the format was decided. A change here is a change of the
// protocol: it needs a version, or an option.
var golden = []struct {
	name string
	msg  encoding.BinaryAppender
	hex  string
}{
	{"login", Login{MinVersion: 1, MaxVersion: 3, Instance: [16]byte{0xa0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xaf}, Index: 2, Software: "edge-tunnel 0.1"},
		"0100 0027 0001 0003 a00102030405060708090a0b0c0d0eaf 0002 01 0f 656467652d74756e6e656c20302e31"},
	{"login without options", Login{MinVersion: 1, MaxVersion: 1},
		"0100 0016 0001 0001 00000000000000000000000000000000 0000"},
	{"login reply", LoginReply{Version: 1, Servers: 3, KeepAlive: 5 * time.Second, ServerID: "cloud-1"},
		"0200 0015 0001 0003 00000000 00001388 01 07 636c6f75642d31"},
	{"login reply, duplicate", LoginReply{Status: LoginDuplicateIdentity, RetryAfter: time.Minute, ServerID: "s", Message: "été"},
		"0204 0016 0000 0000 0000ea60 00000000 01 01 73 02 05 c3a974c3a9"},
	{"header, IPv4", Header{Kind: KindConnect, Trace: 0x0102030405060708, Dst: netip.MustParseAddrPort("10.99.0.5:10250"), Src: netip.MustParseAddrPort("192.0.2.1:40000")},
		"0301 002c 0102030405060708 00000000000000000000ffff0a630005 280a 00000000000000000000ffffc0000201 9c40"},
	{"header, IPv6, peer, source unknown", Header{Kind: KindConnect, Trace: 1, Dst: netip.MustParseAddrPort("[2001:db8::5]:22"), Node: "edge-1"},
		"0301 0034 0000000000000001 20010db8000000000000000000000005 0016 00000000000000000000000000000000 0000 01 06 656467652d31"},
	{"header, notice", Header{Kind: KindNotice}, "0302 0000"},
	{"header, query", Header{Kind: KindQuery}, "0303 0000"},
	{"names", Names{"edge-1", "b"}, "0600 0009 06 656467652d31 01 62"},
	{"names, none", Names(nil), "0600 0000"},
	{"reply, ok", Reply{}, "0400 0000"},
	{"reply, refused", Reply{Status: StatusRefused, Message: "closed"}, "0401 0008 01 06 636c6f736564"},
	{"notice, drain", Notice{Kind: NoticeDrain, ClosesIn: 2 * time.Second}, "0501 0004 000007d0"},
	{"notice, drain, why", Notice{Kind: NoticeDrain, ClosesIn: 1, Message: "upgrade"}, "0501 000d 00000001 01 07 75706772616465"},
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGoldenBytes(t *testing.T) {
	for _, g := range golden {
		t.Run(g.name, func(t *testing.T) {
			want := unhex(t, g.hex)
			var w countingWriter
			if err := write1(&w, g.msg); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(w.Bytes(), want) {
				t.Errorf("encoded\n%x, want\n%x", w.Bytes(), want)
			}
			if w.calls != 1 {
				t.Errorf("%d Write calls, want 1", w.calls)
			}
			prefixed, err := g.msg.AppendBinary([]byte("before"))
			if err != nil || !bytes.Equal(prefixed, append([]byte("before"), want...)) {
				t.Errorf("AppendBinary behind other bytes: %x, %v", prefixed, err)
			}

			// One byte at a time, with more behind it: the reader must come to the same message and leave the rest.
			r := strings.NewReader(string(want) + "the rest")
			got, err := readers[Type(want[0])](iotest.OneByteReader(r))
			if err != nil {
				t.Fatal(err)
			}
			msg := g.msg
			if n, ok := msg.(Notice); ok && n.ClosesIn == 1 {
				n.ClosesIn = time.Millisecond // rounded up
				msg = n
			}
			if !reflect.DeepEqual(got, msg) {
				t.Errorf("decoded %+v, want %+v", got, msg)
			}
			if rest, _ := io.ReadAll(r); string(rest) != "the rest" {
				t.Errorf("left %q in the reader", rest)
			}
		})
	}
}

type countingWriter struct {
	bytes.Buffer
	calls int
}

func (w *countingWriter) Write(b []byte) (int, error) { w.calls++; return w.Buffer.Write(b) }

func TestCutOff(t *testing.T) {
	for _, g := range golden {
		b := unhex(t, g.hex)
		for n := range b {
			_, err := readers[Type(b[0])](bytes.NewReader(b[:n]))
			want := io.ErrUnexpectedEOF
			if n == 0 {
				want = io.EOF
			}
			if err != want {
				t.Errorf("%s cut to %d bytes: %v, want %v", g.name, n, err, want)
			}
		}
	}
}

func TestConnectionErrorsPass(t *testing.T) {
	for typ, read := range readers {
		if _, err := read(iotest.ErrReader(net.ErrClosed)); err != net.ErrClosed {
			t.Errorf("%v: %v", typ, err)
		}
	}
	if err := WriteReply(failingWriter{}, Reply{}); err != os.ErrDeadlineExceeded {
		t.Errorf("write: %v", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, os.ErrDeadlineExceeded }

const (
	zeros16 = "00000000000000000000000000000000"
	login1  = "0001 0001" + zeros16 + "0000"
	reply1  = "0001 0001 00000000 00000000"
	dst1    = "0000000000000001 00000000000000000000ffff0a630005 280a"
	conn1   = dst1 + zeros16 + "0000"
)

func TestMalformed(t *testing.T) {
	for _, c := range []struct {
		name string
		typ  Type
		hex  string
		want Problem
	}{
		{"a TLS hello", TypeLogin, "16030100", WrongType},
		{"an HTTP request", TypeLogin, hex.EncodeToString([]byte("GET / HTTP/1.1\r\n\r\n")), WrongType},
		{"reply instead of login", TypeLogin, "0400 0000", WrongType},
		{"header instead of reply", TypeReply, "0301 002c", WrongType},
		{"length over the limit", TypeLogin, "0100 0401", TooLong},
		{"length at its greatest", TypeHeader, "0301 ffff", TooLong},
		{"reserved byte", TypeLogin, "0180 0016" + login1, ReservedBits},
		{"short login", TypeLogin, "0100 0015 0001 0001" + zeros16 + "00", TooShort},
		{"short login reply", TypeLoginReply, "0200 000b 0001 0001 00000000 000000", TooShort},
		{"short header", TypeHeader, "0301 0002 0000", TooShort},
		{"empty header", TypeHeader, "0301 0000", TooShort},
		{"short notice", TypeNotice, "0501 0003 000000", TooShort},
		{"version 0", TypeLogin, "0100 0016 0000 0001" + zeros16 + "0000", BadVersion},
		{"versions reversed", TypeLogin, "0100 0016 0003 0002" + zeros16 + "0000", BadVersion},
		{"ok without a version", TypeLoginReply, "0200 000f 0000 0001 00000000 00000000 010173", BadVersion},
		{"refused with a version", TypeLoginReply, "0201 000f 0001 0001 00000000 00000000 010173", BadVersion},
		{"no server id", TypeLoginReply, "0200 000c" + reply1, BadName},
		{"retry in a month", TypeLoginReply, "0200 000f 0001 0001 9fffffff 00000000 010173", BadTime},
		{"rare pings", TypeLoginReply, "0200 000f 0001 0001 00000000 00002711 010173", BadTime},
		{"drain in a month", TypeNotice, "0501 0004 9fffffff", BadTime},
		{"kind 0", TypeHeader, "0300 002c" + conn1, UnknownKind},
		{"kind 4", TypeHeader, "0304 0000", UnknownKind},
		{"names with a code", TypeNames, "0601 0000", ReservedBits},
		{"empty name", TypeNames, "0600 0001 00", BadName},
		{"name cut off", TypeNames, "0600 0002 0261", TooShort},
		{"name with a space", TypeNames, "0600 0002 0120", BadName},
		{"name of 254 bytes", TypeNames, "0600 00ff fe" + strings.Repeat("61", 254), BadName},
		{"port 0", TypeHeader, "0301 002c 0000000000000001 00000000000000000000ffff0a630005 0000" + zeros16 + "0000", BadAddress},
		{"half an option", TypeReply, "0400 0001 01", BadOption},
		{"empty option", TypeReply, "0400 0002 0100", BadOption},
		{"option cut off", TypeReply, "0400 0003 010261", BadOption},
		{"tag 0", TypeReply, "0400 0003 000161", BadOption},
		{"option twice", TypeReply, "0400 0006 010161 010162", BadOption},
		{"options out of order", TypeLoginReply, "0200 0012 0001 0001 00000000 00000000 020161 010173", BadOption},
		{"critical option", TypeReply, "0400 0003 800161", UnknownOption},
		{"critical option on a notice header", TypeHeader, "0302 0003 810161", UnknownOption},
		{"node with a newline", TypeHeader, "0301 002f" + conn1 + "01010a", BadName},
		{"node with a space", TypeHeader, "0301 002f" + conn1 + "010120", BadName},
		{"node of 254 bytes", TypeHeader, "0301 012c" + conn1 + "01fe" + strings.Repeat("61", 254), BadName},
		{"text with an escape", TypeReply, "0400 0003 01011b", BadText},
		{"text that is not UTF-8", TypeReply, "0400 0003 0101ff", BadText},
		{"software of 65 bytes", TypeLogin, "0100 0059" + login1 + "0141" + strings.Repeat("61", 65), BadText},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := readers[c.typ](bytes.NewReader(unhex(t, c.hex)))
			var e *Error
			if !errors.As(err, &e) || e.Problem != c.want || e.Message != c.typ || e.Reason() != string(c.want) {
				t.Fatalf("%+v, error %v, want %v", got, err, c.want)
			}
			if !reflect.ValueOf(got).IsZero() {
				t.Errorf("a bad message came out as %+v", got)
			}
		})
	}
}

func TestUnknownOptionsAreSkipped(t *testing.T) {
	got, err := ReadHeader(bytes.NewReader(unhex(t, "0301 0037"+conn1+"01 01 61"+"02 03 010203"+"7f 01 ff")))
	if want := (Header{Kind: KindConnect, Trace: 1, Dst: netip.MustParseAddrPort("10.99.0.5:10250"), Node: "a"}); err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

func TestUnknownCodesAreKept(t *testing.T) {
	if p, err := ReadReply(bytes.NewReader(unhex(t, "04ff 0000"))); err != nil || p.Status != 255 || p.Status.Retryable() || p.Status.String() != "unknown" {
		t.Errorf("reply: %+v, %v", p, err)
	}
	if n, err := ReadNotice(bytes.NewReader(unhex(t, "05ff 0004 00000000"))); err != nil || n.Kind != 255 || n.Kind.String() != "unknown" {
		t.Errorf("notice: %+v, %v", n, err)
	}
	if l, err := ReadLoginReply(bytes.NewReader(unhex(t, "02ff 000f 0000 0001 00000000 00000000 010173"))); err != nil || l.Status != 255 || l.Status.String() != "unknown" {
		t.Errorf("login reply: %+v, %v", l, err)
	}
}

func TestWillNotEncode(t *testing.T) {
	dst := netip.MustParseAddrPort("10.0.0.1:1")
	zoned := netip.MustParseAddrPort("[fe80::1%eth0]:1")
	for _, c := range []struct {
		msg  encoding.BinaryAppender
		want Problem
	}{
		{Login{}, BadVersion},
		{Login{MinVersion: 2, MaxVersion: 1}, BadVersion},
		{LoginReply{ServerID: "s"}, BadVersion},
		{LoginReply{ServerID: "s", Status: LoginDenied, Version: 1}, BadVersion},
		{LoginReply{Version: 1}, BadName},
		{LoginReply{Version: 1, ServerID: "a b"}, BadName},
		{LoginReply{Version: 1, ServerID: "s", RetryAfter: -1}, BadTime},
		{LoginReply{Version: 1, ServerID: "s", RetryAfter: MaxRetryAfter + 1}, BadTime},
		{LoginReply{Version: 1, ServerID: "s", KeepAlive: KeepAlive + 1}, BadTime},
		{Notice{Kind: NoticeDrain, ClosesIn: -1}, BadTime},
		{Header{Dst: dst}, UnknownKind},
		{Header{Kind: 9, Dst: dst}, UnknownKind},
		{Header{Kind: KindConnect}, BadAddress},
		{Header{Kind: KindConnect, Dst: netip.AddrPortFrom(dst.Addr(), 0)}, BadAddress},
		{Header{Kind: KindConnect, Dst: zoned}, BadAddress},
		{Header{Kind: KindConnect, Dst: dst, Src: zoned}, BadAddress},
		{Header{Kind: KindConnect, Dst: dst, Node: strings.Repeat("a", MaxName+1)}, BadName},
		{Header{Kind: KindConnect, Dst: dst, Node: "ä"}, BadName},
		{Names{""}, BadName},
		{Names{strings.Repeat("a", MaxName+1)}, BadName},
		{Names(slices.Repeat([]string{"1234567"}, maxBody/8+1)), TooLong},
	} {
		b, err := c.msg.AppendBinary([]byte("before"))
		var e *Error
		if !errors.As(err, &e) || e.Problem != c.want {
			t.Errorf("%+v: %v, want %v", c.msg, err, c.want)
		}
		if string(b) != "before" {
			t.Errorf("%+v: left %q behind", c.msg, b)
		}
		var w countingWriter
		if err := write1(&w, c.msg); err == nil || w.calls != 0 {
			t.Errorf("%+v: written, %v", c.msg, err)
		}
	}
}

func TestLargestMessagesFit(t *testing.T) {
	name, text := strings.Repeat("n", MaxName), strings.Repeat("€", MaxText)
	ap := netip.MustParseAddrPort("[2001:db8::1]:65535")
	for _, m := range []encoding.BinaryAppender{
		Login{MinVersion: 1, MaxVersion: 65535, Index: 65535, Software: text},
		LoginReply{Status: LoginInternal, Servers: 65535, RetryAfter: MaxRetryAfter, KeepAlive: KeepAlive, ServerID: name, Message: text},
		Header{Kind: KindConnect, Trace: 1<<64 - 1, Dst: ap, Src: ap, Node: name},
		Reply{Status: 255, Message: text},
		Notice{Kind: 255, ClosesIn: MaxClosesIn, Message: text},
		Names(slices.Repeat([]string{"1234567"}, maxBody/8)),
	} {
		b, err := m.AppendBinary(nil)
		if err != nil || len(b) > MaxMessage {
			t.Errorf("%T: %d bytes, %v", m, len(b), err)
			continue
		}
		if _, err := readers[Type(b[0])](bytes.NewReader(b)); err != nil {
			t.Errorf("%T: %v", m, err)
		}
	}
}

func TestTextIsCleaned(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"dial tcp 10.0.0.1:22: connection refused", "dial tcp 10.0.0.1:22: connection refused"},
		{"two\nlines\tand \x1b[31mred", "two lines and  [31mred"},
		{"not \xff UTF-8", "not ? UTF-8"},
		{"\u202eoverride", " override"},
		{strings.Repeat("a", 300), strings.Repeat("a", 255)},
		{strings.Repeat("é", 200), strings.Repeat("é", 127)},
		{strings.Repeat("€", 200), strings.Repeat("€", 85)},
	} {
		b, _ := Reply{Message: c.in}.AppendBinary(nil)
		p, err := ReadReply(bytes.NewReader(b))
		if err != nil || p.Message != c.want {
			t.Errorf("%q came out as %q, %v", c.in, p.Message, err)
		}
	}
}

// Whatever is split fits into messages, and nothing is lost.
func TestSplitNames(t *testing.T) {
	for _, size := range []int{1, 7, 100, MaxName} {
		for _, n := range []int{0, 1, 3, 4, 5, 128, 129, 1000} {
			var got []string
			for _, list := range SplitNames(slices.Repeat([]string{strings.Repeat("n", size)}, n)) {
				if _, err := list.AppendBinary(nil); err != nil || len(list) == 0 {
					t.Fatalf("%d names of %d bytes: a list of %d, %v", n, size, len(list), err)
				}
				got = append(got, list...)
			}
			if len(got) != n {
				t.Errorf("%d names of %d bytes came out as %d", n, size, len(got))
			}
		}
	}
}

func TestPick(t *testing.T) {
	for _, c := range []struct {
		min, max, lowest, highest, want uint16
		ok                              bool
	}{
		{1, 1, 1, 1, 1, true},
		{1, 5, 1, 3, 3, true},
		{2, 3, 1, 9, 3, true},
		{2, 3, 3, 9, 3, true},
		{1, 2, 3, 9, 0, false},
		{4, 9, 1, 3, 0, false},
	} {
		v, ok := Login{MinVersion: c.min, MaxVersion: c.max}.Pick(c.lowest, c.highest)
		if ok != c.ok || v != c.want {
			t.Errorf("[%d %d] with [%d %d]: %d, %v", c.min, c.max, c.lowest, c.highest, v, ok)
		}
	}
}

// TestStatusNames holds the labels: dashboards are built on them.
func TestStatusNames(t *testing.T) {
	var login, status []string
	for s := range LoginStatus(10) {
		login = append(login, s.String())
	}
	for s := range Status(12) {
		name := s.String()
		if s.Retryable() {
			name += "!"
		}
		status = append(status, name)
	}
	if got, want := strings.Join(login, " "), "ok denied version_unsupported bad_request duplicate_identity already_connected overloaded draining internal unknown"; got != want {
		t.Errorf("login statuses %s, want %s", got, want)
	}
	if got, want := strings.Join(status, " "), "ok refused timed_out unreachable not_allowed not_owner! no_tunnel! draining! overloaded bad_request internal unknown"; got != want {
		t.Errorf("statuses %s, want %s", got, want)
	}
}

// fuzz checks what must hold for any input: no panic, nothing read beyond the message, and whatever is accepted can be
// written, reads back as the same, and is written the same way again.
func fuzz(f *testing.F, typ Type) {
	for _, g := range golden {
		if b := unhex(f, g.hex); Type(b[0]) == typ {
			f.Add(b)
		}
	}
	read := readers[typ]
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		m, err := read(r)
		used := len(b) - r.Len()
		if used > MaxMessage {
			t.Fatalf("read %d bytes", used)
		}
		if err != nil {
			var e *Error
			if !errors.As(err, &e) && err != io.EOF && err != io.ErrUnexpectedEOF {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if want := headLen + int(binary.BigEndian.Uint16(b[2:])); used != want {
			t.Fatalf("read %d bytes of a message of %d", used, want)
		}
		first, err := m.AppendBinary(nil)
		if err != nil {
			t.Fatalf("accepted %+v, but cannot write it: %v", m, err)
		}
		again, err := read(bytes.NewReader(first))
		if err != nil || !reflect.DeepEqual(again, m) {
			t.Fatalf("%+v reads back as %+v, %v", m, again, err)
		}
		if len(first) == used && !bytes.Equal(first, b[:used]) && typ != TypeHeader {
			t.Fatalf("two encodings of %+v: %x and %x", m, first, b[:used])
		}
	})
}

func FuzzReadLogin(f *testing.F)      { fuzz(f, TypeLogin) }
func FuzzReadLoginReply(f *testing.F) { fuzz(f, TypeLoginReply) }
func FuzzReadHeader(f *testing.F)     { fuzz(f, TypeHeader) }
func FuzzReadReply(f *testing.F)      { fuzz(f, TypeReply) }
func FuzzReadNotice(f *testing.F)     { fuzz(f, TypeNotice) }
func FuzzReadNames(f *testing.F)      { fuzz(f, TypeNames) }

func TestAllocs(t *testing.T) {
	h := Header{Kind: KindConnect, Trace: 1, Dst: netip.MustParseAddrPort("10.99.0.5:10250"), Src: netip.MustParseAddrPort("192.0.2.1:40000")}
	buf := make([]byte, 0, 64)
	encoded, _ := h.AppendBinary(nil)
	r := bytes.NewReader(nil)
	if n := testing.AllocsPerRun(100, func() { _, _ = h.AppendBinary(buf) }); n != 0 {
		t.Errorf("encoding a header: %v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { r.Reset(encoded); _, _ = ReadHeader(r) }); n > 1 {
		t.Errorf("reading a header: %v allocations", n)
	}
}

func BenchmarkHeaderAppend(b *testing.B) {
	h := Header{Kind: KindConnect, Trace: 1, Dst: netip.MustParseAddrPort("10.99.0.5:10250"), Src: netip.MustParseAddrPort("192.0.2.1:40000")}
	buf := make([]byte, 0, 64)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.AppendBinary(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHeaderRead(b *testing.B) {
	encoded, _ := Header{Kind: KindConnect, Trace: 1, Dst: netip.MustParseAddrPort("10.99.0.5:10250"), Src: netip.MustParseAddrPort("192.0.2.1:40000")}.AppendBinary(nil)
	r := bytes.NewReader(nil)
	b.ReportAllocs()
	for b.Loop() {
		r.Reset(encoded)
		if _, err := ReadHeader(r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReplyRead(b *testing.B) {
	encoded, _ := Reply{}.AppendBinary(nil)
	r := bytes.NewReader(nil)
	b.ReportAllocs()
	for b.Loop() {
		r.Reset(encoded)
		if _, err := ReadReply(r); err != nil {
			b.Fatal(err)
		}
	}
}
