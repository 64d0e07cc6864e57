"""How a run was started: command, versions, machine, and git commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import timm
import torch
import torchvision

from tinydet import __version__
from tinydet.training.device import describe_device


def this_session(device: torch.device) -> dict[str, str]:
    """Return the command, versions and machine of this process, as strings to show.

    Args:
        device: where it trains.
    """
    return {
        "command": shlex.join(sys.orig_argv),
        "started": datetime.now().astimezone().isoformat(" ", "seconds"),
        "device": describe_device(device),
        "git": git_state(Path.cwd()),
        "tinydet": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "system": platform.platform(),
    }


def git_state(folder: Path) -> str:
    """Return a folder's git commit and the number of uncommitted files, as a phrase."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return "not a git checkout"
    changes = _git(folder, "status", "--porcelain")
    if changes is None:
        return f"commit {commit}, changes unknown"
    count = len(changes.splitlines())
    return f"commit {commit}, " + (
        f"{count} file{'s'[: count > 1]} changed or new" if count else "clean"
    )


def _git(folder: Path, *arguments: str) -> str | None:
    # Takes no lock, and runs no program that the repository's own settings name.
    options = ["--no-optional-locks", "-c", "core.fsmonitor=false"]
    try:
        done = subprocess.run(
            ["git", *options, *arguments],
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
