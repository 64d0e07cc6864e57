"""How fast a detector is: forward pass and post-processing, no data loading.

On a GPU the times are CUDA events, read after one synchronisation for each chunk of batches, so
that timing itself does not hold the GPU up. On a CPU it is a wall clock. The forms that are
compared take turns, chunk by chunk: a machine that slows down slows them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tinydet.yolof.detector import Detector

_CHUNK = 10  # most batches a form runs before it is the next one's turn
_WARM_UP = 3  # most batches of each form that are not timed
_COLUMNS = (
    *("   img/s", "median ms", "  p95 ms", "spread ms", "forward ms", "  post ms"),
    *("G mult-adds", "GFLOP/s", "of peak"),
)
_TURN_SECONDS = 1.0  # a form that is slow has shorter turns and less warm-up


class Form(Protocol):
    """What is timed: a `Detector`, compiled or not, or an `OnnxForm`."""

    def __call__(self, images: Tensor) -> tuple[Any, Any]:
        """Run the network on (B, 3, H, W) uint8 images."""

    def select(self, logits: Any, deltas: Any, image_size: tuple[int, int]) -> Any:
        """Select detections from what the network returned."""


class Clock(Protocol):
    """Marks points in time, and tells later how far they are apart."""

    name: str

    def mark(self) -> Any:
        """Return the present point in time."""

    def wait(self) -> None:
        """Wait until all marked points have passed."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two marks; after `wait`."""


class WallClock:
    """Time as the user lives it; right for work that is done when the call returns."""

    name = "wall clock"

    def mark(self) -> float:
        """Return seconds."""
        return time.perf_counter()

    def wait(self) -> None:
        """Do nothing: a call on a CPU returns when it is done."""

    def elapsed(self, start: float, end: float) -> float:
        """Return milliseconds."""
        return (end - start) * 1000


class CudaClock:
    """Events in a GPU's queue of work: the queue itself notes when it passes them."""

    name = "CUDA events"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Put an event behind the work queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait for the whole queue."""
        torch.cuda.synchronize(self._device)

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return milliseconds."""
        return start.elapsed_time(end)


def clock_for(device: torch.device) -> Clock:
    """Return the clock that is right for a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


@dataclass
class Timing:
    """Times of one form of a detector.

    Attributes:
        images: images timed.
        latencies: milliseconds of each batch, forward and post-processing.
        forwards: milliseconds of each batch's forward pass alone.
    """

    images: int = 0
    latencies: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Images divided by the time spent on them."""
        total = sum(self.latencies)
        return 1000 * self.images / total if total else 0.0

    @property
    def median(self) -> float:
        """Median milliseconds of a batch."""
        return statistics.median(self.latencies)

    @property
    def p95(self) -> float:
        """Milliseconds in which 95% of the batches were done (nearest rank)."""
        rank = -(-95 * len(self.latencies) // 100)
        return sorted(self.latencies)[rank - 1]

    @property
    def spread(self) -> float:
        """Interquartile range of a batch's milliseconds; 0 of a single one."""
        if len(self.latencies) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.latencies, n=4, method="inclusive")
        return high - low

    @property
    def forward(self) -> float:
        """Median milliseconds of a batch's forward pass."""
        return statistics.median(self.forwards)

    @property
    def postprocessing(self) -> float:
        """Median milliseconds of a batch's decoding and selection."""
        pairs = zip(self.latencies, self.forwards, strict=True)
        return statistics.median(latency - forward for latency, forward in pairs)


@torch.inference_mode()
def measure(
    forms: Mapping[str, Form],
    batches: Sequence[Tensor],
    images: int,
    clock: Clock,
    time_limit: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Timing]:
    """Time forms of a detector in turns, on the same batches.

    Args:
        forms: in eval mode on their device, by name.
        batches: (B, 3, H, W) uint8 on that device; used again from the start when all are through.
        images: to be timed with each form; the last batch may go beyond it.
        clock: what measures.
        time_limit: seconds after which no further chunk is begun; at least one always is.
        now: seconds, for the limit.

    Returns:
        The times of each form; fewer images when the limit was reached, equally many for each.
    """
    if images < 1 or not batches:
        raise ValueError(f"--images {images}: nothing to time; give at least 1")
    begin = now()
    slowest = max(_warm_up(form, batches, clock, now) for form in forms.values())
    turn = max(1, min(_CHUNK, int(_TURN_SECONDS / slowest) if slowest > 0 else _CHUNK))
    timings = {name: Timing() for name in forms}
    done = position = 0
    while done < images:
        chunk, in_chunk = [], 0
        while len(chunk) < turn and done + in_chunk < images:
            chunk.append(batches[(position + len(chunk)) % len(batches)])
            in_chunk += len(chunk[-1])
        for name, form in forms.items():
            marks = [_run(form, batch, clock) for batch in chunk]
            clock.wait()
            timing = timings[name]
            timing.images += in_chunk
            timing.forwards += [clock.elapsed(start, middle) for start, middle, _ in marks]
            timing.latencies += [clock.elapsed(start, end) for start, _, end in marks]
        done += in_chunk
        position += len(chunk)
        if time_limit is not None and now() - begin >= time_limit:
            break
    return timings


def _warm_up(
    form: Form, batches: Sequence[Tensor], clock: Clock, now: Callable[[], float]
) -> float:
    """Run a form untimed, for a turn at most, and return the seconds its last batch took."""
    begin = now()
    for i in range(_WARM_UP):
        start = now()
        _run(form, batches[i % len(batches)], clock)
        clock.wait()
        end = now()
        if end - begin >= _TURN_SECONDS:
            break
    return end - start


def _run(form: Form, images: Tensor, clock: Clock) -> tuple[Any, Any, Any]:
    start = clock.mark()
    logits, deltas = form(images)
    middle = clock.mark()
    form.select(logits, deltas, (images.shape[-2], images.shape[-1]))
    return start, middle, clock.mark()


def table(timings: Mapping[str, Timing], operations: Mapping[str, float], peak: float) -> list[str]:
    """Return the times as lines of text.

    Args:
        timings: by the name of the form.
        operations: of an image, where they are known.
        peak: operations a second that the machine is capable of.
    """
    width = max(len(name) for name in timings)
    lines = [f"{'':{width}}" + "".join(f"{title:>{len(title) + 2}}" for title in _COLUMNS)]
    for name, t in timings.items():
        reached = operations.get(name, 0) * t.images_per_second
        milliseconds = (t.median, t.p95, t.spread, t.forward, t.postprocessing)
        figures = [f"{t.images_per_second:.1f}", *(f"{ms:.2f}" for ms in milliseconds)]
        adds = operations.get(name, 0) / 2e9
        share = [f"{adds:.2f}", f"{reached / 1e9:.1f}", f"{reached / peak:.0%}"]
        figures += share if reached else ["-"] * len(share)
        cells = zip(_COLUMNS, figures, strict=True)
        lines.append(f"{name:{width}}" + "".join(f"{x:>{len(title) + 2}}" for title, x in cells))
    return lines


def precision_problem(detector: Detector, images: Tensor) -> str | None:
    """Return why a detector in half precision cannot run on its device, or None if it can."""
    try:
        with torch.inference_mode():
            detector(images)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
