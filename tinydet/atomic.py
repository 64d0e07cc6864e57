"""Files that are whole or not there, whenever the process dies, and where they may be written."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write; at the end it takes the place of `path`.

    After an error `path` is as it was. Its folder is made.

    Args:
        path: the file; the one to write is in the same folder and has the same ending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # Else a power cut could leave the new name without content.
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by UTF-8, whatever the system's encoding is."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create_text(path: Path, text: str) -> None:
    """Write a UTF-8 file unless it is there: of several processes', the first content stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of two machines may have the same number.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # A disk without hard links.
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def creating_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; at the end it gets the name `path`, after an error it is removed.

    Raises:
        FileExistsError: `path` is there and is not an empty folder, at the start or at the end.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: is there already; remove it, or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError as error:
            raise FileExistsError(f"{path}: was made by another process meanwhile") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def warn_on_oserror(path: Path) -> Iterator[None]:
    """Log a failure to write a file as a warning instead of raising it.

    For what a long run writes on its way: a full disk can be cleared while training continues.
    """
    try:
        yield
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", path, error.strerror or error)


def check_out(out: Path | None, sources: Sequence[Path] = (), endings: Sequence[str] = ()) -> None:
    """Check the option --out, the name of a file to write, before the work.

    Args:
        out: None, the default, is right.
        sources: files that are read, which it must not replace.
        endings: one of which the name must have; none is any.

    Raises:
        ValueError: the file cannot be written there, or is one of the sources.
    """
    if out is None:
        return
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; name a file in it")
    if endings and out.suffix.lower() not in endings:
        raise ValueError(f"--out {out}: end the name in {' or '.join(endings)}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    for source in sources:
        if out.exists() and source.exists() and out.samefile(source):
            raise ValueError(f"--out {out}: is {source} itself, which is read; name another file")
