"""Time detectors side by side: forward pass and post-processing, no data loading.

With CUDA the times are its events, read after one synchronization per turn, so that timing itself
does not stall the GPU. Elsewhere it is the wall clock: the events of Apple's GPUs may hang or
report wrong times (github.com/pytorch/pytorch, number 196395). Candidates take turns of a few
batches each, so that a machine that slows down affects all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tinydet.progress import Progress
from tinydet.training.device import synchronize

_TURN_BATCHES = 10  # most batches that a candidate runs in a turn
_TURN_SECONDS = 1.0  # slow candidates have shorter turns and less warm-up
_WARM_UP = 3  # most batches of each candidate that are not timed
_MATRIX_SIDES = (256, 512, 1024, 2048, 4096, 8192)
_MATRIX_REPEATS = 5
_MATRIX_MS = 20.0  # a product that takes this long is large enough


class Candidate(Protocol):
    """A detector to time: a `Detector`, compiled or not, or a `SplitOnnxDetector`."""

    def __call__(self, images: Tensor) -> tuple[Any, Any]:
        """Run the network on (B, 3, H, W) uint8 images."""

    def select(self, cls_logits: Any, deltas: Any, image_size: tuple[int, int]) -> Any:
        """Select detections from what the network returned."""


class Clock(Protocol):
    """Marks points in time and later measures how far they are apart."""

    name: str

    def mark(self) -> Any:
        """Return the current point in time."""

    def wait(self) -> None:
        """Wait until all marked points have passed."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two marks; call `wait` before."""


class WallClock:
    """Wall clock, for work on a CPU, or on a device that is waited for at each mark."""

    name = "wall clock"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> float:
        """Return seconds, once all queued work is done."""
        synchronize(self._device)
        return time.perf_counter()

    def wait(self) -> None:
        """Do nothing: `mark` has waited."""

    def elapsed(self, start: float, end: float) -> float:
        """Return milliseconds."""
        return (end - start) * 1000


class CudaClock:
    """CUDA events, recorded by the GPU as it reaches them."""

    name = "CUDA events"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Record an event behind the work queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait for all queued work."""
        synchronize(self._device)

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return milliseconds."""
        return start.elapsed_time(end)


def clock_for(device: torch.device) -> Clock:
    """Return the right clock for work on a device."""
    return CudaClock(device) if device.type == "cuda" else WallClock(device)


@dataclass
class Timing:
    """Times of one candidate.

    Attributes:
        images: number of images timed.
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
        """95th percentile of a batch's milliseconds (nearest rank)."""
        rank = -(-95 * len(self.latencies) // 100)
        return sorted(self.latencies)[rank - 1]

    @property
    def spread(self) -> float:
        """Interquartile range of a batch's milliseconds; 0 for a single batch."""
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
    candidates: Mapping[str, Candidate],
    batches: Sequence[Tensor],
    images: int,
    time_limit: float | None = None,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time detectors in turns, on the same batches.

    Args:
        candidates: in eval mode on their device, by name.
        batches: (B, 3, H, W) uint8 on that device; repeated from the start as often as needed.
        images: number of images to time with each candidate; the last batch may exceed it.
        time_limit: seconds after which no further turn starts; at least one always does.
        clock: None is the right one for the batches' device.

    Returns:
        The times of each candidate; if the limit was reached, of fewer images, equally many each.
    """
    if images < 1 or not batches:
        raise ValueError(f"--images {images}: nothing to time; give at least 1")
    clock = clock or clock_for(batches[0].device)
    begin = clock.mark()
    slowest = max(_warm_up(candidate, batches, clock) for candidate in candidates.values())
    turn = max(1, min(_TURN_BATCHES, int(_TURN_SECONDS / slowest) if slowest else _TURN_BATCHES))
    timings = {name: Timing() for name in candidates}
    done = position = 0
    left = f"left, at most {time_limit:g} s in all" if time_limit else "left"
    with Progress("timing", images * len(candidates), "images", left=left) as progress:
        while done < images:
            chunk: list[Tensor] = []
            in_chunk = 0
            while len(chunk) < turn and done + in_chunk < images:
                chunk.append(batches[(position + len(chunk)) % len(batches)])
                in_chunk += len(chunk[-1])
            for name, candidate in candidates.items():
                marks = [_run(candidate, batch, clock) for batch in chunk]
                clock.wait()
                timing = timings[name]
                timing.images += in_chunk
                timing.forwards += [clock.elapsed(start, middle) for start, middle, _ in marks]
                timing.latencies += [clock.elapsed(start, end) for start, _, end in marks]
                progress.advance(in_chunk)
            done += in_chunk
            position += len(chunk)
            if time_limit is not None and clock.elapsed(begin, marks[-1][-1]) >= 1000 * time_limit:
                break
    return timings


def _warm_up(candidate: Candidate, batches: Sequence[Tensor], clock: Clock) -> float:
    """Run a candidate untimed for at most a turn and return the seconds its last batch took."""
    begin = clock.mark()
    for i in range(_WARM_UP):
        start, _, end = _run(candidate, batches[i % len(batches)], clock)
        clock.wait()
        if clock.elapsed(begin, end) >= 1000 * _TURN_SECONDS:
            break
    return clock.elapsed(start, end) / 1000


def _run(candidate: Candidate, images: Tensor, clock: Clock) -> tuple[Any, Any, Any]:
    start = clock.mark()
    cls_logits, deltas = candidate(images)
    middle = clock.mark()
    candidate.select(cls_logits, deltas, (images.shape[-2], images.shape[-1]))
    return start, middle, clock.mark()


def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return the operations per second of the fastest of some products of square matrices.

    An addition and a multiplication are one operation each. The matrices grow only until a product
    takes a while: large ones would keep a device without fast units for the dtype busy for minutes.

    Raises:
        RuntimeError: the device cannot multiply matrices of this dtype.
    """
    peak = 0.0
    for side in _MATRIX_SIDES:
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        milliseconds = min(_product_ms(a, b) for _ in range(_MATRIX_REPEATS))
        peak = max(peak, 2 * side**3 / (milliseconds / 1000))
        if milliseconds > _MATRIX_MS:
            break
    return peak


def _product_ms(a: Tensor, b: Tensor) -> float:
    clock = clock_for(a.device)
    start = clock.mark()
    _ = a @ b
    end = clock.mark()
    clock.wait()
    return clock.elapsed(start, end)
