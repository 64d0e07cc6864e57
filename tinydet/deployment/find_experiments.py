"""Experiment files by their names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from pathlib import Path


def find_experiments(patterns: Sequence[str], folder: Path = Path("experiments")) -> list[Path]:
    """Return the experiment files that patterns name, sorted.

    Args:
        patterns: files, or names of experiments with wildcards; none is all of the folder.
        folder: of experiments.

    Raises:
        ValueError: a pattern names nothing, or the folder holds no experiment.
    """
    files = sorted(folder.glob("*.py"))
    if not files and not patterns:
        raise ValueError(f"{folder}: no experiments there; go to the project's folder, or name one")
    found = set(files if not patterns else ())
    for pattern in patterns:
        path = Path(pattern)
        named = [path] if path.is_file() else []
        named = named or [file for file in files if fnmatch.fnmatch(file.stem, pattern)]
        if not named:
            near = difflib.get_close_matches(path.stem, [file.stem for file in files], 1)
            hint = f"; did you mean {folder / near[0]}.py?" if near else ""
            raise ValueError(f"{pattern}: no such experiment in {folder}{hint}")
        found.update(named)
    return sorted(found)
