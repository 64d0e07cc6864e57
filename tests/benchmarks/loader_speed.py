"""Images a second of the training loader alone: python tests/benchmarks/loader_speed.py EXPERIMENT.

python tests/benchmarks/loader_speed.py experiments/custom_voc.py --set data.root=BCCD \\
    --versus data.cache_mb=512

With --versus two settings take turns, so that a busy machine slows both; the ratio is that of their
medians. `--workers 0` decodes in this process, and is the work of one worker without the passing on
of its batches.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from tinydet.cli import add_overrides, run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="a file of experiments/, or experiment.json")
    parser.add_argument("--workers", type=int, default=0, help="loader processes; default 0")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each; default 7")
    parser.add_argument("--seconds", type=float, default=2, help="of each measurement; default 2")
    parser.add_argument(
        "--versus", nargs="+", metavar="NAME=VALUE", help="measure with these --set as well"
    )
    add_overrides(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure one or two loaders in turns, and print."""
    import torch

    torch.set_num_threads(1)  # as in a worker
    settings = [args.set] if args.versus is None else [args.set, [*args.set, *args.versus]]
    overrides = [[*given, f"data.workers={args.workers}"] for given in settings]
    streams = [_batches(args.experiment, given) for given in overrides]
    speeds: list[list[float]] = [[] for _ in streams]
    for stream in streams:
        # A whole epoch first: it starts workers and fills caches.
        for _ in range(next(stream)):
            next(stream)
    for _, (stream, found) in itertools.product(
        range(args.rounds), zip(streams, speeds, strict=True)
    ):
        started, images = time.perf_counter(), 0
        while time.perf_counter() - started < args.seconds:
            images += next(stream)
        found.append(images / (time.perf_counter() - started))
    each = max(1, args.workers)
    for given, found in zip(settings, speeds, strict=True):
        print(
            f"{statistics.median(found) / each:7.1f} img/s a worker "
            f"(from {min(found) / each:.1f} to {max(found) / each:.1f}): {' '.join(given)}"
        )
    if args.versus:
        ratio = statistics.median(speeds[1]) / statistics.median(speeds[0])
        print(f"{ratio:7.2f} times as fast with {' '.join(args.versus)}")


def _batches(experiment: Path, overrides: list[str]) -> Iterator[int]:
    """Yield the number of batches in an epoch, then the size of one batch after another."""
    from tinydet.data.dataset import DetectionDataset, load_split
    from tinydet.data.loader import make_train_loader
    from tinydet.experiment_file import load_experiment

    loaded = load_experiment(experiment, overrides)
    data = loaded.data
    dataset = DetectionDataset(load_split(data, data.train_split))
    loader = make_train_loader(dataset, data, loaded.train.batch_size)
    yield len(loader)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from map(len, loader)


if __name__ == "__main__":
    run(main, _parser())
