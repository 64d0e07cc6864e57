"""Where runs live: `runs/<experiment>/<n>/`."""

from __future__ import annotations

from pathlib import Path

from tinydet.training.checkpoint import CheckpointError

RUNS = Path("runs")


def new_run_dir(name: str, root: Path = RUNS) -> Path:
    """Create and return the next free `root/<name>/<n>/`."""
    parent = root / name
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:  # Another run was quicker.
            continue
        return parent / str(number)


def newest_to_resume(name: str, root: Path = RUNS) -> Path:
    """Return the last.pt of the newest run of an experiment, for `checkpoint.read_last`.

    Where the run died between two renamings there is only the one before it.

    Raises:
        CheckpointError: no run of it can be gone on with.
    """
    found = newest_checkpoint(root, "last*.pt", name)
    return found.with_name("last.pt")


def newest_checkpoint(root: Path = RUNS, file_name: str = "best.pt", name: str = "*") -> Path:
    """Return the newest run's checkpoint.

    Args:
        root: the folder of runs.
        file_name: "best.pt" and "last.pt" are written by training, "deploy.pt" by folding.
        name: only runs of this experiment.

    Raises:
        CheckpointError: there is none.
    """
    found = list(root.glob(f"{name}/*/{file_name}"))
    if not found:
        makes = "deploy/reparam.py" if file_name == "deploy.pt" else "tools/train.py EXPERIMENT"
        raise CheckpointError(
            f"{root}/{name}/*/{file_name}: no run has one yet; make it with `python {makes}`, "
            "or name a checkpoint"
        )
    return max(found, key=lambda path: path.stat().st_mtime)
