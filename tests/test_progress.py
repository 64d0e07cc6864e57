"""What a terminal, a pipe and a second process see of a long task."""

import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import rich

from tinydet.progress import Progress

_ROOT = Path(__file__).resolve().parents[1]
_TOOL = """
import argparse, sys
from tinydet.cli import run
from tinydet.progress import Progress
def main(args):
    with Progress("waiting", 3, "lines", interval=0) as progress:
        while sys.stdin.readline():
            progress.advance()
run(main, argparse.ArgumentParser())
"""


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return _Clock()


def test_a_line_every_30_seconds_with_the_time_left(clock, said):
    with Progress("evaluating", 100, "images", clock=clock) as progress:
        for _ in range(29):
            clock.now += 1
            progress.advance()
        assert said() == []
        clock.now += 1
        progress.advance()
        clock.now += 29
        progress.advance(10)
        assert said() == ["evaluating: 30/100 images, 70 s left"]
        clock.now += 301
        progress.advance(50)
        progress.advance(0)
        # 90 images took 360 s.
        assert said()[1:] == ["evaluating: 90/100 images, 40 s left"]
        clock.now += 30
        progress.advance(10)
    assert said()[2:] == ["evaluating: 100/100 images"]


def test_a_task_within_30_seconds_says_nothing(clock, said):
    with Progress("evaluating", 3, "images", clock=clock) as progress:
        for _ in range(3):
            clock.now += 9.9
            progress.advance()
    assert said() == []


def test_units_of_another_time_and_pauses_do_not_count_in_the_estimate(clock, said):
    with Progress("training", 100, "steps", done=40, left="to go", clock=clock) as progress:
        clock.now += 1000
        progress.pause()
        clock.now += 600
        progress.advance(10)
        clock.now += 5000
        progress.pause()
        clock.now += 600
        progress.status = "fast"
        progress.advance(10)
    # 20 steps took 1200 s.
    assert said() == [
        "training: 50/100 steps, 50 min to go",
        "training: 60/100 steps, fast, 40 min to go",
    ]


@pytest.mark.parametrize(("seconds", "left"), [(99, "99 s"), (5900, "98 min"), (9000, "2.5 h")])
def test_the_time_left_in_words(clock, said, seconds, left):
    with Progress("waiting", 2, "turns", clock=clock) as progress:
        clock.now += seconds
        progress.advance()
    assert said() == [f"waiting: 1/2 turns, {left} left"]


def test_an_unknown_total(clock, said):
    with Progress("drawing", 0, "frames", clock=clock) as progress:
        clock.now += 40
        progress.advance(7)
    assert said() == ["drawing: 7 frames"]


def test_other_processes_than_the_first_have_no_bar(clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with _Terminal() as screen, Progress("training", 2, "steps", clock=clock) as progress:
        clock.now += 60
        progress.advance()
        assert screen() == []


def _pipe(**environment):
    return subprocess.Popen(
        [sys.executable, "-c", _TOOL],
        cwd=_ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_other_processes_than_the_first_have_no_lines():
    with _pipe(RANK="1") as tool:
        assert tool.communicate("\n\n") == ("", None)
    assert tool.returncode == 0


def test_lines_reach_a_pipe_at_once_and_without_codes():
    # Continuous integration asks for colours like this.
    with _pipe(FORCE_COLOR="1", TTY_COMPATIBLE="1", TERM="xterm") as tool:
        for number in (1, 2):
            tool.stdin.write("\n")
            tool.stdin.flush()
            line = tool.stdout.readline()  # waits until the line is there
            assert re.fullmatch(rf"waiting: {number}/3 lines, \d+ s left\n", line)
        rest, _ = tool.communicate()
    assert (rest, tool.returncode) == ("", 0)


class _Terminal:
    """A terminal as standard output; call it for the lines that are on it."""

    def __enter__(self):
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.patch, self.written = pytest.MonkeyPatch(), b""
        self.patch.setenv("TERM", "xterm")
        self.patch.setenv("COLUMNS", "100")
        self.patch.setattr(rich, "_console", None)
        self.patch.setattr(sys, "stdout", open(slave, "w", encoding="utf-8"))
        return self

    def __exit__(self, *_):
        sys.stdout.close()
        self.patch.undo()
        os.close(self.master)

    def __call__(self):
        sys.stdout.flush()
        with suppress(BlockingIOError):
            while part := os.read(self.master, 65536):
                self.written += part
        lines, row, column = [""], 0, 0
        for code, count, command, letter in re.findall(
            r"(\x1b\[([?\d;]*)([A-Za-z]))|(.)", self.written.decode(), re.DOTALL
        ):
            if command == "A":
                row -= int(count or 1)
            elif command == "K":
                lines[row] = ""
            elif letter == "\r":
                column = 0
            elif letter == "\n":
                row += 1
                lines += [""] * (row - len(lines) + 1)
            elif not code:
                lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
                column += 1
        return [" ".join(re.sub("[━╸╺]+", "|", line).split()) for line in lines if line.strip()]


def test_a_terminal_has_a_bar_that_vanishes_and_no_lines(clock, said):
    threads = threading.active_count()
    with _Terminal() as screen:
        with Progress("evaluating [a]", 100, "images", clock=clock) as progress:
            assert screen() == ["evaluating [a] | 0/100 images"]
            for _ in range(10):
                clock.now += 30
                progress.advance(5)
                progress.say()
            # Loader processes are forked now: no thread may hold a lock.
            assert threading.active_count() == threads
            sys.stdout.write("a line of the program\n")
            bar = "evaluating [a] | 50/100 images, 5 min left"
            assert screen() == ["a line of the program", bar]
        sys.stdout.write("the end\n")
        assert screen() == ["a line of the program", "the end"]
    assert said() == []


def test_tasks_within_a_task_have_their_bars_below(clock):
    with _Terminal() as screen:
        with Progress("comparing", 6, "runs", clock=clock) as runs:
            for run in range(2):
                with Progress("epoch 1/2", 8, "steps", clock=clock) as steps:
                    clock.now += 1
                    steps.advance()
                    with Progress("evaluating", 9, "images", clock=clock) as images:
                        clock.now += 1
                        images.advance()
                        assert [line.split(" | ")[0] for line in screen()] == [
                            "comparing",
                            "epoch 1/2",
                            "evaluating",
                        ]
                        assert screen()[1:] == [
                            "epoch 1/2 | 1/8 steps, 7 s left",
                            "evaluating | 1/9 images, 8 s left",
                        ]
                    clock.now += 1
                    steps.advance()
                    assert len(screen()) == 2
                clock.now += 9
                runs.advance()
                left = 12 * (5 - run)
                assert screen() == [f"comparing | {run + 1}/6 runs, {left} s left"]
        assert screen() == []


def test_an_error_leaves_a_clean_terminal(clock):
    with _Terminal() as screen:
        stdout = sys.stdout
        with (
            pytest.raises(ValueError, match="wrong"),
            Progress("outer", 2, "steps", clock=clock),
            Progress("inner", 2, "steps", clock=clock),
        ):
            raise ValueError("wrong")
        assert screen() == []
        assert sys.stdout is stdout
        shown, hidden = (screen.written.rfind(f"\x1b[?25{end}".encode()) for end in "hl")
        assert shown > hidden  # the cursor
