"""Provoke each fault that a training has to survive, and print what came of it as a table.

Run from the project's root, as root (two of the faults need a mount of their own):
python tests/benchmarks/faults.py
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from small_run import Training, small_experiment

from tinydet.training.checkpoint import CheckpointError, read_checkpoint

SPOKEN = ("warn", "error", "cannot", "gone", "damaged", "go on", "no number", "stopped", "replaced")

NAMES = ("best", "last", "last.previous", "last.damaged")


@contextmanager
def small_disk(megabytes: float) -> Iterator[Path]:
    """Mount a file system of this size in memory."""
    with tempfile.TemporaryDirectory() as folder:
        size = f"size={int(megabytes * 1024)}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left of a disk."""
    path = disk / "filler"
    with path.open("wb") as file:
        try:
            while True:
                file.write(b"\0" * 65536)
                file.flush()
        except OSError:
            return path


def steps(run: Path) -> int:
    """Return the last step logged."""
    log = run / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def kept(run: Path) -> str:
    """Name the checkpoints of a run that can be read, and where they are in it."""
    found = []
    for path in (run / f"{name}.pt" for name in NAMES if (run / f"{name}.pt").exists()):
        try:
            content = read_checkpoint(path)
            found.append(f"{path.name} (epoch {content['epoch']}, step {content['step']})")
        except CheckpointError:
            found.append(f"{path.name} (not a checkpoint that can be read)")
    batches = len(list(run.glob("bad_step_*.pt")))
    found += [f"{batches} batches"] if batches else []
    return ", ".join(found) or "nothing was there"


class Faults:
    """Provokes the faults one after the other; each method prints a row of the table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.experiment = small_experiment(folder, epochs=6, eval_every=3)

    def row(self, fault: str, how: str, training: Training, run: Path) -> None:
        """Wait for the end of a run and print its row."""
        status = training.end()
        if any("Traceback" in line for line in training.output()):
            print("\n".join(training.output()))
        said = [line for line in training.output() if any(word in line for word in SPOKEN)]
        said = [line.replace(str(self.folder), "F").replace("|", "/") for line in said]
        said = list(dict.fromkeys(said))
        more = f"; and {len(said) - 4} such lines" if len(said) > 4 else ""
        sees = "<br>".join(f"`{line}`" for line in said[:3] + said[3:][-1:]) + more
        print(f"| {fault} | {how} | {sees}<br>exit status {status} | {kept(run)} |", flush=True)

    def start(self, run: Path, *arguments: object) -> Training:
        """Start a run."""
        return Training(self.folder, self.experiment, "--work-dir", run, *arguments)

    def trained(self, run: Path) -> Training:
        """Start a run, and wait until it has trained and saved."""
        training = self.start(run)
        training.wait_until(lambda: steps(run) >= 4)
        return training

    def full_disk(self) -> None:
        """The disk fills up, and is cleared or not."""
        for cleared in (True, False):
            with small_disk(40) as disk:
                run = disk / "run"
                training = self.trained(run)
                filler = fill(disk)
                training.wait_until_said("last.pt: cannot be")
                if cleared:
                    filler.unlink()
                after = ", then cleared" if cleared else ", never cleared"
                self.row("full disk", f"a 40 MB tmpfs filled in the run{after}", training, run)
        with small_disk(1) as disk:
            fill(disk).open("r+").truncate(200_000)
            self.row(
                "full disk from the start", "a 1 MB tmpfs", self.start(disk / "run"), disk / "run"
            )

    def read_only(self) -> None:
        """The folder cannot be written to, from the start or from the middle."""
        with small_disk(40) as disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            run = disk / "run"
            self.row("read-only work dir", "a tmpfs mounted ro", self.start(run), run)
        with small_disk(40) as disk:
            run = disk / "run"
            training = self.trained(run)
            subprocess.run(["mount", "--bind", run, run], check=True)
            # Refused while a file in it is being written.
            while subprocess.run(["mount", "-o", "remount,ro,bind", run], check=False).returncode:
                time.sleep(0.01)
            how = "its folder remounted ro in the run"
            self.row("work dir turns read-only", how, training, run)
            subprocess.run(["umount", "-l", run], check=True)

    def vanished(self) -> None:
        """An image, and the whole work dir, are deleted in the run."""
        run = self.folder / "vanished"
        image = sorted((self.folder / "shapes" / "JPEGImages").glob("train*"))[0]
        training = self.trained(run)
        kept_image = shutil.move(image, self.folder)
        self.row("vanished data file", f"{image.name} moved away in the run", training, run)
        shutil.move(kept_image, image)
        run = self.folder / "deleted"
        training = self.trained(run)
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)
        self.row("work dir deleted", "rm -r in the run", training, run)

    def killed_worker(self) -> None:
        """A loader process gets what the kernel sends when memory runs out."""
        run = self.folder / "worker"
        training = self.trained(run)
        training.wait_until((run / "last.previous.pt").is_file)  # `corrupt` needs it
        children = Path(f"/proc/{training.process.pid}/task/{training.process.pid}/children")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        self.row("loader process killed by the OOM killer", "SIGKILL to it", training, run)

    def corrupt(self) -> None:
        """last.pt, then also the one before, have a bit turned over."""
        run = self.folder / "corrupt"
        shutil.copytree(self.folder / "worker", run)
        self._turn_bit(run / "last.pt")
        how = "one bit of it turned over, `--resume`"
        self.row("corrupt last.pt", how, self.start(run, "--resume"), run)
        run = self.folder / "both"
        shutil.copytree(self.folder / "worker", run)
        self._turn_bit(run / "last.pt")
        self._turn_bit(run / "last.previous.pt")
        how = "one bit of each turned over, `--resume`"
        self.row("both corrupt", how, self.start(run, "--resume"), run)

    @staticmethod
    def _turn_bit(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            part = max(archive.infolist(), key=lambda part: part.file_size)
        # Not of the padding between parts, where damage does no harm.
        content = bytearray(path.read_bytes())
        header = content[part.header_offset :]
        name, extra = struct.unpack("<HH", header[26:30])  # lengths of what follows the header
        start = part.header_offset + 30 + name + extra
        content[start + part.file_size // 2] ^= 1
        path.write_bytes(content)

    def signals(self) -> None:
        """SIGTERM and Ctrl-C."""
        for number in (signal.SIGTERM, signal.SIGINT):
            run = self.folder / number.name
            training = self.trained(run)
            training.signal(number)
            self.row(number.name, "sent to the whole process group", training, run)

    def divergence(self) -> None:
        """The loss is no number any more."""
        run = self.folder / "nan"
        training = self.start(run, "--set", "optim.lr=1e30", "optim.optimizer=sgd")
        self.row("loss NaN or infinite", "`optim.lr=1e30`", training, run)

    def crafted(self) -> None:
        """A checkpoint that would run code, in torch's format and in its two old ones."""

        class Bomb:
            def __reduce__(self) -> tuple:
                return os.system, (f"touch {marker}",)

        marker = self.folder / "exploded"
        for name in ("zip", "pickle"):
            run = self.folder / f"crafted-{name}"
            run.mkdir()
            content = {"form": "training", "model": Bomb()}
            if name == "zip":
                torch.save(content, run / "last.pt")
                assert zipfile.is_zipfile(run / "last.pt")
            else:
                (run / "last.pt").write_bytes(pickle.dumps(content))
            training = self.start(run, "--resume")
            self.row(f"crafted last.pt ({name})", "`__reduce__` calls os.system", training, run)
            assert not marker.exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        faults = Faults(Path(temporary))
        print("| fault | how provoked | what the user sees | checkpoints kept |")
        print("| --- | --- | --- | --- |", flush=True)
        if os.geteuid() == 0:
            faults.full_disk()
            faults.read_only()
        else:
            print("| full disk, read-only folder | not provoked: mounting needs root | | |")
        faults.killed_worker()
        faults.corrupt()
        faults.vanished()
        faults.signals()
        faults.divergence()
        faults.crafted()
