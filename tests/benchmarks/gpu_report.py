"""The Markdown and JSON files of the GPU benchmark."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_process import Outcome

from tinydet.atomic import write_text
from tinydet.report.table import markdown_table
from tinydet.training.device import pick_device
from tinydet.training.results import write_json
from tinydet.training.session import this_session


def describe_machine(device: str) -> dict[str, str]:
    """Return command, date, card, driver and versions."""
    place = pick_device(device)
    described = this_session(place)
    if place.type == "cuda":
        card = torch.cuda.get_device_properties(place)
        described |= {
            "capability": f"{card.major}.{card.minor}",
            "memory": f"{card.total_memory / 2**30:.0f} GiB",
            "driver": _driver(),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return described


def write_report(
    folder: Path,
    machine: Mapping[str, str],
    titles: Mapping[str, str],
    found: Mapping[str, Outcome],
) -> None:
    """Write gpu.md and gpu.json.

    Args:
        folder: of the files.
        machine: from `describe_machine`.
        titles: of all parts, by name.
        found: of those that have run, by name.
    """
    parts = {name: {"title": titles[name], **asdict(found[name])} for name in found}
    write_json(folder / "gpu.json", {"machine": dict(machine), "parts": parts})
    lines = ["# GPU", "", *(f"- {name}: {value}" for name, value in machine.items())]
    for name, title in titles.items():
        lines += ["", f"## {title}", ""]
        lines += _section(found[name]) if name in found else ["Not run."]
    write_text(folder / "gpu.md", "\n".join(lines) + "\n")


def _section(outcome: Outcome) -> list[str]:
    lines = []
    if outcome.error:
        lines += [f"**Failed**: {outcome.error}", "", "```text", *outcome.output[-15:], "```", ""]
    if outcome.rows:
        header = list(dict.fromkeys(name for row in outcome.rows for name in row))
        rows = [[_cell(row.get(name)) for name in header] for row in outcome.rows]
        right = [i for i, n in enumerate(header) if isinstance(outcome.rows[0].get(n), float)]
        lines += [*markdown_table(header, rows, right), ""]
    return [*lines, f"{outcome.seconds:.0f} s."]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
