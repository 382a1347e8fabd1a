// SPDX-License-Identifier: Apache-2.0

package linkemu

import (
	"encoding/binary"
	"errors"
	"math"
	"os"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Lower bounds are strict, because a packet is never early. A busy machine makes everything late: what is too late to be
// right is told apart by seconds.
const late = 5 * time.Second

// rig is a link between two pairs of datagram sockets, which give and take one frame at a time as TAP devices do.
type rig struct {
	t *testing.T
	*Link
	near, far *os.File
}

func newRig(t *testing.T, s Settings) *rig {
	t.Helper()
	near, nearEnd := pair(t)
	far, farEnd := pair(t)
	link, err := New(nearEnd, farEnd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(link.Close(), near.Close(), far.Close()); err != nil {
			t.Error(err)
		}
	})
	r := &rig{t, link, near, far}
	r.change(s)
	return r
}

func pair(t *testing.T) (*os.File, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "test"), os.NewFile(uintptr(fds[1]), "link")
}

func (r *rig) change(s Settings) {
	r.t.Helper()
	if err := r.Set(s); err != nil {
		r.t.Fatal(err)
	}
}

// send sends a packet with a payload of size bytes and a number in it.
func (r *rig) send(from *os.File, number, size int) {
	r.t.Helper()
	frame := make([]byte, headerLen+size)
	binary.BigEndian.PutUint16(frame[headerLen-2:], unix.ETH_P_IP)
	binary.BigEndian.PutUint32(frame[headerLen:], uint32(number))
	if _, err := from.Write(frame); err != nil {
		r.t.Fatal(err)
	}
}

// receive returns the numbers that arrive until one of them is last, or until the wait is over.
func (r *rig) receive(at *os.File, last int, wait time.Duration) (numbers []int) {
	r.t.Helper()
	if err := at.SetReadDeadline(time.Now().Add(wait)); err != nil {
		r.t.Fatal(err)
	}
	frame := make([]byte, frameSpace)
	for {
		n, err := at.Read(frame)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return numbers
		}
		if err != nil || n < headerLen+4 {
			r.t.Fatalf("%d bytes, %v", n, err)
		}
		number := int(binary.BigEndian.Uint32(frame[headerLen:]))
		numbers = append(numbers, number)
		if number == last {
			return numbers
		}
	}
}

// burst sends that many packets up at once and returns those that arrived, in this order. Once the link has all of them, its
// settings no longer matter to them: it becomes a wire, so that one last packet marks the end.
func (r *rig) burst(count, size int) []int {
	r.t.Helper()
	got := make(chan []int)
	go func() { got <- r.receive(r.far, count, time.Minute) }()
	for i := range count {
		r.send(r.near, i, size)
	}
	r.await(func() bool { return r.Up.Stats().Received >= uint64(count) })
	r.change(Settings{})
	r.send(r.near, count, size)
	numbers := <-got
	if n := len(numbers); n == 0 || numbers[n-1] != count {
		r.t.Fatalf("the last packet did not arrive: %v", numbers)
	}
	return numbers[:len(numbers)-1]
}

func (r *rig) await(done func() bool) {
	r.t.Helper()
	for end := time.Now().Add(late); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("up %+v, down %+v", r.Up.Stats(), r.Down.Stats())
		}
	}
}

func TestDelayOfEachDirection(t *testing.T) {
	r := newRig(t, Settings{})
	if err := errors.Join(r.Up.Set(Settings{Delay: 30 * time.Millisecond}), r.Down.Set(Settings{Delay: 50 * time.Millisecond})); err != nil {
		t.Fatal(err)
	}
	least := time.Hour
	for i := range 10 {
		begin := time.Now()
		r.send(r.near, i, 100)
		if got := r.receive(r.far, i, late); len(got) != 1 || time.Since(begin) < 30*time.Millisecond {
			t.Fatalf("packet %d: %v after %v", i, got, time.Since(begin))
		}
		begin2 := time.Now()
		r.send(r.far, i, 100)
		if got := r.receive(r.near, i, late); len(got) != 1 || time.Since(begin2) < 50*time.Millisecond {
			t.Fatalf("answer %d: %v after %v", i, got, time.Since(begin2))
		}
		least = min(least, time.Since(begin))
	}
	t.Logf("80 ms of delay: the best round trip of 10 took %v", least)
	if least > 80*time.Millisecond+late {
		t.Errorf("the best round trip took %v", least)
	}
}

func TestRate(t *testing.T) {
	const count, size = 200, 1000
	r := newRig(t, Settings{Rate: 8e6}) // a packet each millisecond
	got := make(chan []int)
	begin := time.Now()
	go func() { got <- r.receive(r.far, count-1, late) }()
	for i := range count {
		r.send(r.near, i, size)
	}
	numbers := <-got
	took := time.Since(begin)
	t.Logf("200 ms of packets took %v", took)
	if len(numbers) != count || took < 200*time.Millisecond {
		t.Errorf("%d packets arrived in %v", len(numbers), took)
	}
	want := Stats{Received: count, Sent: count, ReceivedBytes: count * size, SentBytes: count * size}
	r.await(func() bool { return r.Up.Stats() == want })
}

func TestQueueDropsTheTail(t *testing.T) {
	const count, size, queue = 100, 1000, 20_000
	begin := time.Now()
	r := newRig(t, Settings{Rate: 8e4, Queue: queue}) // ten packets a second
	numbers := r.burst(count, size)
	// burst has lifted the limits; how long they held bounds what had left the queue meanwhile.
	sent := int(math.Ceil(time.Since(begin).Seconds() * 10))
	if n := len(numbers); n < queue/size || n > queue/size+sent {
		t.Errorf("%d packets passed a queue of %d", n, queue/size)
	}
	if !slices.IsSorted(numbers) || numbers[queue/size-1] != queue/size-1 {
		t.Errorf("not the first ones passed, in order: %v", numbers)
	}
	if s := r.Up.Stats(); s.QueueFull != uint64(count-len(numbers)) || s.Dropped() != s.QueueFull {
		t.Errorf("%d passed: %+v", len(numbers), s)
	}
}

func TestLossIsAsAskedAndRepeatable(t *testing.T) {
	const count, share = 20_000, 0.1
	var before []int
	for range 2 {
		r := newRig(t, Settings{Loss: share, Seed: 7})
		numbers := r.burst(count, 100)
		lost := count - len(numbers)
		if deviation := math.Sqrt(count * share * (1 - share)); math.Abs(float64(lost)-count*share) > 4*deviation {
			t.Errorf("%d of %d were lost", lost, count)
		}
		if s := r.Up.Stats(); s.Lost != uint64(lost) || s.Dropped() != s.Lost {
			t.Errorf("%d lost: %+v", lost, s)
		}
		if before != nil && !slices.Equal(before, numbers) {
			t.Error("the same seed lost others")
		}
		before = numbers
	}
}

func TestOnlyIPIsLost(t *testing.T) {
	r := newRig(t, Settings{Loss: 1})
	frame := make([]byte, headerLen+28)
	binary.BigEndian.PutUint16(frame[headerLen-2:], unix.ETH_P_ARP)
	if _, err := r.near.Write(frame); err != nil {
		t.Fatal(err)
	}
	if got := r.receive(r.far, 0, late); len(got) != 1 {
		t.Error("an ARP request was lost")
	}
	r.send(r.near, 1, 100)
	r.await(func() bool { return r.Up.Stats().Lost == 1 })
}

func TestJitterKeepsTheOrderAndReorderingDoesNot(t *testing.T) {
	r := newRig(t, Settings{Jitter: 5 * time.Millisecond, Seed: 1})
	if numbers := r.burst(500, 100); len(numbers) != 500 || !slices.IsSorted(numbers) {
		t.Errorf("jitter: %v", numbers)
	}

	r = newRig(t, Settings{Reorder: 0.1, ReorderBy: 200 * time.Millisecond, Seed: 1})
	got := make(chan []int)
	go func() { got <- r.receive(r.far, 500, late) }()
	for i := range 500 {
		r.send(r.near, i, 100)
	}
	r.await(func() bool { return r.Up.Stats().Sent == 500 })
	r.change(Settings{})
	r.send(r.near, 500, 100)
	numbers := <-got
	overtaken, highest := 0, -1
	for _, n := range numbers {
		if n < highest {
			overtaken++
		}
		highest = max(highest, n)
	}
	// How many of those held back are overtaken depends on the machine's speed; all of them are held back.
	if len(numbers) != 501 || overtaken == 0 || overtaken > 500*2/10 {
		t.Errorf("%d of %d packets were overtaken", overtaken, len(numbers))
	}
}

func TestOutageAndRecovery(t *testing.T) {
	r := newRig(t, Settings{Delay: time.Hour})
	r.send(r.near, 0, 100)
	r.await(func() bool { return r.Up.Stats().Received == 1 })
	r.SetOutage(true) // loses what is on its way
	r.change(Settings{})
	r.send(r.near, 1, 100)
	r.send(r.far, 1, 100)
	r.await(func() bool { return r.Up.Stats().Outage == 2 && r.Down.Stats().Outage == 1 })
	r.SetOutage(false)
	r.send(r.near, 2, 100)
	r.send(r.far, 2, 100)
	for _, at := range []*os.File{r.near, r.far} {
		if got := r.receive(at, 2, late); !slices.Equal(got, []int{2}) {
			t.Errorf("after the outage: %v", got)
		}
	}
}

func TestSettingsChangeUnderWay(t *testing.T) {
	r := newRig(t, Settings{Rate: 8e4}) // a packet of 1000 bytes takes 100 ms
	r.send(r.near, 0, 1000)
	r.send(r.near, 1, 1000)
	r.await(func() bool { return r.Up.Stats().Received == 2 })
	begin := time.Now()
	r.change(Settings{Rate: 8e6, Delay: 20 * time.Millisecond})
	r.send(r.near, 2, 1000)
	if got := r.receive(r.far, 2, late); !slices.Equal(got, []int{0, 1, 2}) || time.Since(begin) < 20*time.Millisecond {
		t.Errorf("%v after %v", got, time.Since(begin))
	}
}

func TestBadSettings(t *testing.T) {
	r := newRig(t, Settings{Loss: 1})
	for _, s := range []Settings{
		{Rate: -1}, {Queue: -1}, {Delay: -1}, {Jitter: -1}, {ReorderBy: -1}, {Loss: -0.1}, {Loss: 1.1}, {Loss: math.NaN()}, {Reorder: 2},
	} {
		if r.Set(s) == nil {
			t.Errorf("%+v was accepted", s)
		}
	}
	r.send(r.near, 0, 100)
	r.await(func() bool { return r.Up.Stats().Lost == 1 }) // the good ones stay
}

func TestCloseDropsWhatIsOnItsWay(t *testing.T) {
	r := newRig(t, Settings{Delay: time.Hour})
	r.send(r.near, 0, 100)
	r.await(func() bool { return r.Up.Stats().Received == 1 })
	// The rig closes it now, and goleak looks after that.
}

func TestCloseClosesTheDevices(t *testing.T) {
	near, nearEnd := pair(t)
	far, farEnd := pair(t)
	link, err := New(nearEnd, farEnd)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := near.Write(make([]byte, headerLen)); err != nil {
		t.Fatal(err)
	}
	if err := link.Close(); err != nil {
		t.Error(err)
	}
	if _, err := near.Write(make([]byte, headerLen)); err == nil {
		t.Error("the device was left open")
	}
	if err := errors.Join(near.Close(), far.Close()); err != nil {
		t.Error(err)
	}
}
