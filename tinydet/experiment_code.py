"""The code of an experiment's files: what an experiment's fields do not tell about a run.

A file that only imports and assigns, as most experiments do, is data: what it says is in the
fields. Any other file is code, and its text is hashed.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from tinydet.report.run_folder import read_json
from tinydet.text import read_text

_INSTALLED = {"site-packages", "dist-packages"}


def experiment_code(file: Path) -> str:
    """Return a hash of an experiment file and of the local files it imports; "" if all are data.

    Local files are those beside it, and others that are not installed packages.

    Args:
        file: a Python file; a run's experiment.json has no code.

    Raises:
        ValueError, OSError: a file cannot be read.
    """
    if file.suffix != ".py":
        return ""
    texts: dict[Path, str] = {}
    code = set()
    waiting = [file.resolve()]
    while waiting:
        path = waiting.pop()
        if path in texts:
            continue
        texts[path] = read_text(path)
        tree = ast.parse(texts[path], str(path))
        if not _is_data(tree):
            code.add(texts[path])
        waiting += _imported(tree, path.parent, file.resolve().parent)
    # Neither names nor places count: a copy of an experiment is the same experiment.
    return hashlib.sha256("\0".join(sorted(code)).encode()).hexdigest()[:16] if code else ""


def is_run_of(run: Path, code: str) -> bool:
    """Return whether a run was trained by this code from its start to its end.

    Args:
        run: its folder.
        code: from `experiment_code`. Runs of older versions have no record of it; they pass for
            runs of experiments without code.

    Raises:
        ValueError: the run's sessions.json cannot be read.
    """
    sessions = read_json(run / "sessions.json") or [{}]
    return all(session.get("code", "") == code for session in sessions)


def _is_data(tree: ast.Module) -> bool:
    """Return whether a file only imports, and assigns to names what has no code of its own."""
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # A docstring.
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        if not targets or not all(isinstance(target, ast.Name) for target in targets):
            return False
    return not any(isinstance(node, ast.Lambda) for node in ast.walk(tree))


def _imported(tree: ast.Module, folder: Path, experiments: Path) -> Iterator[Path]:
    """Yield the local files that a file imports; of a package all."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    for name in sorted(names - sys.stdlib_module_names - {"tinydet"}):
        spec = PathFinder.find_spec(name, [str(folder), str(experiments), *sys.path])
        for place in (spec and spec.submodule_search_locations) or ():
            if not _INSTALLED & set(Path(place).parts):
                yield from sorted(Path(place).resolve().rglob("*.py"))
        origin = spec.origin if spec else None
        if origin and origin.endswith(".py") and not _INSTALLED & set(Path(origin).parts):
            yield Path(origin).resolve()
