"""Where the time of an epoch goes: a clock that books each lap under the part of the work that has just ended.

The surprise: on CUDA the host merely queues work, so there a lap lies between two events in the device's stream and is
read once the device has passed both. No step ever waits for that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

TRAINING_PARTS = ("data_wait", "transfer", "forward", "loss", "backward", "optimizer")
PARTS = (*TRAINING_PARTS, "evaluate", "save")
EVALUATION_PARTS = ("load", "network", "nms")  # of a clock of its own

_READ_AFTER = 64  # marks, some eight batches of them: by then the device has passed the first ones


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """A stretch of time in seconds, and of these what each part took."""

    wall: float
    parts: Mapping[str, float]
    images: int  # trained on, or evaluated, meanwhile

    @property
    def rest(self) -> float:
        """What belongs to no part: pictures, tables, the loop itself."""
        return max(self.wall - sum(self.parts.values()), 0.0)

    @property
    def images_per_s(self) -> float:
        """The speed of training, evaluation and saving left out; of PARTS alone."""
        return self.images / max(sum(self.parts[part] for part in TRAINING_PARTS), 1e-9)

    @property
    def ms_per_image(self) -> dict[str, float]:
        """Milliseconds by part."""
        return {part: 1000 * seconds / max(self.images, 1) for part, seconds in self.parts.items()}

    def __add__(self, other: TimeSplit) -> TimeSplit:
        return TimeSplit(
            wall=self.wall + other.wall,
            parts={part: seconds + other.parts[part] for part, seconds in self.parts.items()},
            images=self.images + other.images,
        )


class StepClock:
    """Adds up laps by the host's clock. Exact where work is done when its call returns, as on the CPU."""

    def __init__(self, parts: Sequence[str] = PARTS) -> None:
        self._parts = parts
        self._begin()
        self.skip()

    def skip(self) -> None:
        """What came since the last mark belongs to no part."""
        self._mark(None)

    def lap(self, part: str) -> None:
        """What came since the last mark was this one of the parts."""
        self._mark(part)

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """The block, and nothing before it, is this one of the parts."""
        self.skip()
        yield
        self.lap(part)

    def count(self, images: int) -> None:
        """So many more images were trained on, or evaluated."""
        self._images += images

    def share(self, part: str) -> float:
        """What a part took of the time since the last split, 0 to 1, as far as it is booked."""
        return self._seconds[part] / max(time.perf_counter() - self._started, 1e-9)

    def split(self) -> TimeSplit:
        """Everything since the last split. On CUDA it waits for the device."""
        self.skip()
        self._settle()
        split = TimeSplit(wall=time.perf_counter() - self._started, parts=self._seconds, images=self._images)
        self._begin()
        return split

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._seconds = dict.fromkeys(self._parts, 0.0)
        self._images = 0

    def _mark(self, part: str | None) -> None:
        now = time.perf_counter()
        if part is not None:
            self._seconds[part] += now - self._since
        self._since = now

    def _settle(self) -> None:
        """Book every lap whose end has been marked."""


class Event(Protocol):
    """What an EventClock needs of torch.cuda.Event."""

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...  # ms


class EventClock(StepClock):
    """Adds up laps by the clock of a device whose work is queued in a stream.

    A lap ends when the device has done what was queued before its mark, or when the host set the mark if that is later.
    So waiting for data is what the device had to wait, and laps still add up to the time on the wall.
    """

    def __init__(
        self, make_event: Callable[[], Event], current_stream: Callable[[], Any], parts: Sequence[str] = PARTS
    ) -> None:
        self._make_event, self._current_stream = make_event, current_stream
        self._marks: deque[tuple[str | None, Event]] = deque()  # not read yet, but for the first: the end of a read one
        self._spare: list[Event] = []  # read, to be recorded anew
        super().__init__(parts)

    def _mark(self, part: str | None) -> None:
        event = self._spare.pop() if self._spare else self._make_event()
        event.record(self._current_stream())
        self._marks.append((part, event))
        if len(self._marks) > _READ_AFTER:
            self._read()

    def _read(self) -> None:
        """Book the laps that the device has finished, without waiting for any other."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            _, begin = self._marks.popleft()
            part, end = self._marks[0]
            if part is not None:
                self._seconds[part] += begin.elapsed_time(end) / 1000
            self._spare.append(begin)

    def _settle(self) -> None:
        self._marks[-1][1].synchronize()
        self._read()
