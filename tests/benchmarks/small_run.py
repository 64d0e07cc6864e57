"""A training that takes a minute, run by tools/train.py in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train
from tinydet.data.shapes import render_shapes
from tinydet.training.results import write_experiment

_PROGRESS = re.compile(r" left +[-\d:]+\s*$")
TRAIN = Path(__file__).resolve().parents[2] / "tools" / "train.py"


def small_experiment(folder: Path, **train: object) -> Path:
    """Render two dozen images into `folder` and return the file of an experiment on them."""
    root = folder / "shapes"
    if not root.is_dir():
        render_shapes(root, num_train=24, num_test=8, image_size=96, seed=1)
    settings = Train(
        epochs=40,
        batch_size=4,
        dtype="float32",
        memory_format="channels_last",
        ema_decay=0.9,
        eval_every=10,
        save_minutes=0.005,
        device="cpu",
    )
    experiment = Experiment(
        name="small",
        model=Model(
            backbone="mobilenetv3_small_050",
            weights="random",
            encoder_channels=32,
            encoder_mid_channels=16,
            dilations=(2,),
            cls_convs=1,
            reg_convs=1,
        ),
        data=Data(
            root=str(root),
            source="shapes",
            classes=(),
            image_size=96,
            augment=Augment(color_jitter=0.3),
            workers=1,
        ),
        optim=Optim(optimizer="adamw", lr=1e-3, warmup_iters=20, schedule="cosine"),
        train=replace(settings, **train),
    )
    write_experiment(folder, experiment)
    return folder / "experiment.json"


class Training:
    """A process of tools/train.py, with its output in files of `folder`."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.started = time.monotonic()
        self._out, self._err = folder / "stdout.txt", folder / "stderr.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, TRAIN, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"},
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self.process.poll() is None

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> bool:
        """Wait for a condition; returns False if the process ended, or time was up, before."""
        until = time.monotonic() + seconds
        while not condition():
            if not self.is_running or time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def wait_until_said(self, words: str) -> bool:
        """Wait for a line with these words."""
        return self.wait_until(lambda: any(words in line for line in self.output()))

    def signal(self, number: int) -> None:
        """Send a signal to the process and its loader processes."""
        os.killpg(self.process.pid, number)

    def end(self, seconds: float = 300) -> int:
        """Wait for the process and return its exit status."""
        return self.process.wait(timeout=seconds)

    def output(self) -> list[str]:
        """Return the lines it has printed so far, without the progress bar."""
        lines = (self._out.read_text() + self._err.read_text()).splitlines()
        return [line for line in lines if line.strip() and not _PROGRESS.search(line)]
