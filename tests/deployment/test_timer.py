import pytest
import torch

from tinydet.deployment import timer
from tinydet.deployment.timer import CudaClock, WallClock, clock_for, measure, peak_flops


class _FakeClock:
    """Time passes only in the fake detector; marks cannot be read before `wait`."""

    name = "fake"

    def __init__(self):
        self.time, self.waited, self.waits = 0.0, 0.0, 0

    def mark(self):
        return self.time

    def wait(self):
        self.waited, self.waits = self.time, self.waits + 1

    def elapsed(self, start, end):
        assert end <= self.waited, "read before the queue was waited for"
        return end - start


class _FakeDetector:
    def __init__(self, clock, log, name, forwards, selection):
        self.clock, self.log, self.name = clock, log, name
        self.forwards, self.selection, self.calls = forwards, selection, 0

    def __call__(self, images):
        self.clock.time += self.forwards[self.calls % len(self.forwards)]
        self.calls += 1
        self.log.append((self.name, len(images)))
        return images, images

    def select(self, logits, deltas, image_size):
        assert logits is deltas
        assert image_size == (32, 64)
        self.clock.time += self.selection


def _batches(*sizes):
    return [torch.zeros(n, 3, 32, 64, dtype=torch.uint8) for n in sizes]


def test_measure__exact_figures(every_step_said):
    clock, log = _FakeClock(), []
    # Three batches warm up, so the fourth figure is the first that is timed: 8, 10, 10 ... 100.
    fast = _FakeDetector(clock, log, "fast", [1, 1, 1, 8, *[10] * 18, 100], 2.0)
    slow = _FakeDetector(clock, log, "slow", [40], 10.0)
    timings = measure({"fast": fast, "slow": slow}, _batches(2), 40, clock=clock)
    said = [line.split(", ")[0] for line in every_step_said()]
    assert said == [f"timing: {images}/80 images" for images in (20, 40, 60, 80)]
    timing = timings["fast"]
    assert timing.images == 40
    assert timing.latencies == [10, *[12] * 18, 102]
    assert timing.median == 12
    assert timing.p95 == 12  # the 19th of 20
    assert timing.forward == 10
    assert timing.postprocessing == 2
    assert timing.images_per_second == pytest.approx(1000 * 40 / (10 + 18 * 12 + 102))
    assert timings["slow"].images_per_second == pytest.approx(40)
    assert timings["slow"].median == timings["slow"].p95 == 50


def test_measure__candidates_take_turns_and_the_clock_waits_once_a_chunk():
    clock, log = _FakeClock(), []
    candidates = {name: _FakeDetector(clock, log, name, [1], 1) for name in "ab"}
    measure(candidates, _batches(1), 25, clock=clock)
    names = "".join(name for name, _ in log[6:])
    assert names == "a" * 10 + "b" * 10 + "a" * 10 + "b" * 10 + "a" * 5 + "b" * 5
    assert clock.waits == 2 * 3 + 6  # after each warm-up batch, and after each turn


def test_measure__cycles_through_batches_of_different_sizes():
    clock, log = _FakeClock(), []
    timings = measure(
        {"a": _FakeDetector(clock, log, "a", [1], 1)}, _batches(1, 2, 3), 13, clock=clock
    )
    assert [n for _, n in log[3:]] == [1, 2, 3, 1, 2, 3, 1]
    assert timings["a"].images == 13


def test_measure__time_limit_is_the_same_for_all_candidates():
    clock, log = _FakeClock(), []
    candidates = {name: _FakeDetector(clock, log, name, [1000], 0) for name in "ab"}
    timings = measure(candidates, _batches(1), 2000, 45, clock)
    # A batch takes a second: one of each form to warm up, then turns of one batch. 2 + 2 * 22 = 46.
    assert [t.images for t in timings.values()] == [22, 22]


def test_measure__turns_last_about_a_second():
    clock, log = _FakeClock(), []
    candidates = {name: _FakeDetector(clock, log, name, [300], 0) for name in "ab"}
    measure(candidates, _batches(1), 5, clock=clock)
    assert "".join(name for name, _ in log[6:]) == "aaabbbaabb"


def test_measure__refuses_nothing():
    with pytest.raises(ValueError, match="nothing to time"):
        measure({}, _batches(1), 0)


def test_wall_clock():
    clock = WallClock(torch.device("cpu"))
    assert clock.elapsed(1.0, 1.25) == 250
    assert clock.elapsed(clock.mark(), clock.mark()) >= 0


def test_clock_for():
    assert isinstance(clock_for(torch.device("cpu")), WallClock)
    assert isinstance(clock_for(torch.device("cuda:0")), CudaClock)


def test_an_apple_gpu_is_waited_for_at_each_mark(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    clock = clock_for(torch.device("mps"))
    assert clock.name == "wall clock"
    assert clock.elapsed(clock.mark(), clock.mark()) >= 0
    assert len(waited) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_clock():
    clock = CudaClock(torch.device("cuda"))
    start = clock.mark()
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        x = x @ x
    end = clock.mark()
    clock.wait()
    assert clock.elapsed(start, end) > 0.1


def test_peak_flops__is_that_of_the_fastest_size_and_growth_stops(monkeypatch):
    """A made-up machine: 1 TFLOP/s up to 512, then 2% of that, so that 1024 takes long enough."""
    sides = []

    def milliseconds(a, b):
        sides.append(len(a))
        assert a.shape == b.shape == (len(a), len(a))
        assert a.dtype == torch.bfloat16
        return 1000 * 2 * len(a) ** 3 / (1e12 if len(a) <= 512 else 2e10)

    monkeypatch.setattr(timer, "_product_ms", milliseconds)
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(1e12)
    assert max(sides) == 1024
