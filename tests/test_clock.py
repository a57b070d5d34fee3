"""Clocks: laps go to the part that ended, nothing is counted twice or waited for, events are used again."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.clock import EVALUATION_PARTS, PARTS, EventClock, StepClock, TimeSplit


@pytest.fixture
def seconds(monkeypatch):
    """The host's clock, set by hand."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


# ---- the host's clock ------------------------------------------------------------------------------------------------


def test_laps_go_to_the_part_that_has_ended(seconds):
    clock = StepClock()
    for part, took in (("forward", 2.0), ("loss", 0.5), ("forward", 1.0)):
        seconds[0] += took
        clock.lap(part)
    seconds[0] += 4
    with clock.part("save"):
        seconds[0] += 0.25
    seconds[0] += 8
    clock.count(16)
    clock.count(4)
    split = clock.split()
    assert split.parts == dict.fromkeys(PARTS, 0.0) | {"forward": 3.0, "loss": 0.5, "save": 0.25}
    assert (split.wall, split.rest, split.images) == (15.75, 12.0, 20)


def test_a_split_begins_where_the_last_one_ended(seconds):
    clock = StepClock()
    seconds[0] += 1
    clock.lap("forward")
    first = clock.split()
    seconds[0] += 2
    clock.skip()
    seconds[0] += 3
    clock.lap("backward")
    second = clock.split()
    assert (first.wall, first.parts["forward"], second.parts["forward"]) == (1, 1, 0)
    assert (second.wall, second.parts["backward"], second.rest) == (5, 3, 2)
    both = first + second
    assert (both.wall, both.parts["forward"], both.parts["backward"]) == (6, 1, 3)


def test_what_is_no_part_is_refused():
    with pytest.raises(KeyError):
        StepClock().lap("lunch")


def test_a_clock_may_have_parts_of_its_own(seconds):
    clock = StepClock(EVALUATION_PARTS)
    with clock.part("nms"):
        seconds[0] += 2
    assert clock.split().parts == {"load": 0, "network": 0, "nms": 2}


def test_speed_leaves_evaluation_and_saving_out():
    parts = dict.fromkeys(PARTS, 1.0) | {"evaluate": 50.0, "save": 50.0}
    assert TimeSplit(wall=200, parts=parts, images=60).images_per_s == pytest.approx(10)


# ---- a device's clock ------------------------------------------------------------------------------------------------


class Device:
    """Does what is queued in order, and is told how far it has come. Time is counted in ms."""

    def __init__(self):
        self.host = self.queued_until = self.now = 0.0
        self.events: list[Event] = []
        self.waits = 0

    def queue(self, ms: float) -> None:
        """The host hands over work; the device begins it when it is free and the host is there."""
        self.queued_until = max(self.queued_until, self.host) + ms

    def event(self) -> "Event":
        self.events.append(Event(self))
        return self.events[-1]


class Event:
    """As a torch.cuda.Event; what torch refuses fails here too."""

    def __init__(self, device: Device):
        self.device, self.at = device, None

    def record(self, stream):
        assert stream == "the stream"
        self.device.queued_until = self.at = max(self.device.queued_until, self.device.host)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self):
        self.device.waits += 1
        self.device.host = self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "not finished yet"
        return end.at - self.at


@pytest.fixture
def device():
    return Device()


def clock_of(device: Device) -> EventClock:
    return EventClock(device.event, lambda: "the stream")


def test_laps_are_what_the_device_took_and_not_when_the_host_queued_it(device):
    clock = clock_of(device)
    for _ in range(3):  # the host runs ahead: waiting for data costs the device nothing
        with clock.part("data_wait"):
            device.host += 5
        for part, ms in (("forward", 20), ("backward", 40)):
            device.queue(ms)
            clock.lap(part)
    parts = clock.split().parts
    assert parts == dict.fromkeys(PARTS, 0.0) | {"data_wait": 0.005, "forward": 0.06, "backward": 0.12}


def test_a_device_that_is_kept_waiting_for_data_says_so(device):
    clock = clock_of(device)
    for _ in range(4):
        with clock.part("data_wait"):
            device.host += 100
        device.queue(10)
        clock.lap("forward")
    parts = clock.split().parts
    assert parts["data_wait"] == pytest.approx(0.1 + 3 * 0.09)
    assert parts["forward"] == pytest.approx(0.04)


def test_events_are_read_without_waiting_and_used_again(device):
    clock = clock_of(device)
    for _ in range(10_000):
        for part in PARTS:
            device.queue(1)
            clock.lap(part)
        device.now = device.queued_until - 20  # the device follows
    assert device.waits == 0
    assert len(device.events) < 200
    parts = clock.split().parts
    assert device.waits == 1
    assert list(parts.values()) == pytest.approx([10.0] * len(PARTS))


def test_a_split_is_complete_and_the_next_one_new(device):
    clock = clock_of(device)
    for expected in (1.0, 2.0):
        device.queue(1000 * expected)
        clock.lap("forward")
        assert clock.split().parts["forward"] == expected


@given(
    st.lists(
        st.tuples(st.sampled_from([*PARTS, None]), st.integers(0, 50), st.integers(0, 50), st.integers(0, 60)),
        max_size=300,
    )
)
def test_laps_equal_their_slow_twin_however_far_the_device_is(steps):
    """The twin keeps every event and reads all of them at the end."""
    device, plain = Device(), Device()
    clock = clock_of(device)
    marks = [(None, plain.event())]
    marks[0][1].record("the stream")
    for part, host_ms, device_ms, progress_ms in steps:
        for one in (device, plain):
            one.host += host_ms
            one.queue(device_ms)
        (clock.skip if part is None else lambda part=part: clock.lap(part))()
        marks.append((part, plain.event()))
        marks[-1][1].record("the stream")
        device.now = min(device.now + progress_ms, device.queued_until)
    plain.now = float("inf")
    expected = dict.fromkeys([*PARTS, None], 0.0)
    for (_, begin), (part, end) in pairwise(marks):
        expected[part] += begin.elapsed_time(end) / 1000
    del expected[None]
    assert clock.split().parts == pytest.approx(expected)


def test_time_on_the_wall_is_the_hosts_on_every_device(device, seconds):
    clock = clock_of(device)
    seconds[0] += 7
    split = clock.split()
    assert (split.wall, split.rest) == (7, 7)


def test_a_share_is_of_the_time_since_the_last_split(seconds):
    clock = StepClock()
    seconds[0] += 3
    clock.lap("data_wait")
    seconds[0] += 1
    clock.lap("forward")
    assert clock.share("data_wait") == 0.75
    clock.split()
    seconds[0] += 1
    assert clock.share("data_wait") == 0
