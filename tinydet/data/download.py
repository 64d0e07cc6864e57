"""Download of PASCAL VOC 2007: resumed, checked, unpacked safely.

Run as `python -m tinydet.data.download [--root DIR]`; `tools/download_voc07.sh` does that.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

logger = logging.getLogger(__name__)

OFFICIAL_HOST = "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"
MIRROR_HOST = "https://pjreddie.com/media/files/"

_TIMEOUT = 30  # seconds without any answer
_BLOCK = 1 << 20


class DownloadError(OSError):
    """The data could not be fetched or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """A tar file to fetch.

    Attributes:
        name: file name, the same on every host.
        md5: checksum in hex. It guards against damage and tampering on the way as well as MD5
            can; no stronger sums are published for these files.
        split: a split that is there once the archive is unpacked.
    """

    name: str
    md5: str
    split: str


VOC07_ARCHIVES = (
    Archive("VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64", "trainval"),
    Archive("VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f", "test"),
)


def download_voc07(
    root: str | Path = "datasets",
    *,
    hosts: Sequence[str] = (OFFICIAL_HOST, MIRROR_HOST),
    archives: Sequence[Archive] = VOC07_ARCHIVES,
) -> Path:
    """Fetch and unpack PASCAL VOC 2007 (0.9 GB), unless it is there already.

    An archive that lies in `root` is used, so it can be put there by hand; a partial download is
    continued. Archives are deleted once they are unpacked.

    Args:
        root: folder in which `VOCdevkit/VOC2007` is made.
        hosts: addresses to try in turn, each ending in "/".
        archives: what to fetch.

    Returns:
        The folder `VOCdevkit/VOC2007`.

    Raises:
        DownloadError: no host can be reached, a file is damaged, or the disk is full.
    """
    root = Path(root)
    target = root / "VOCdevkit" / "VOC2007"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            if _is_unpacked(target, archive.split):
                continue
            path = root / archive.name
            if not path.is_file():
                _fetch(archive, path, hosts)
            elif md5_of(path) != archive.md5:
                raise DownloadError(f"{path}: wrong checksum; delete it and run again")
            logger.info("unpacking %s", path)
            unpack(path, root)
            if not _is_unpacked(target, archive.split):
                raise DownloadError(f"{path}: holds no VOCdevkit/VOC2007 split {archive.split!r}")
            path.unlink()
    except DownloadError:
        raise
    except OSError as error:
        raise DownloadError(f"{root}: cannot write the data set ({error})") from error
    return target


def _is_unpacked(target: Path, split: str) -> bool:
    return (target / "ImageSets" / "Main" / f"{split}.txt").is_file()


def _fetch(archive: Archive, path: Path, hosts: Sequence[str]) -> None:
    """Download an archive to `path` from the first host that has it whole."""
    partial = path.with_name(path.name + ".part")
    failures = []
    for host in hosts:
        try:
            _download(host + archive.name, partial)
        except DownloadError:
            raise
        except (http.client.HTTPException, OSError) as error:  # URLError is an OSError
            failures.append(f"{host}: {getattr(error, 'reason', None) or error}")
            continue
        if md5_of(partial) == archive.md5:
            partial.replace(path)
            return
        partial.unlink()
        failures.append(f"{host}: wrong checksum")
    raise DownloadError(
        f"cannot download {archive.name} ({'; '.join(failures)}); "
        f"fetch {hosts[0]}{archive.name} by hand, put it into {path.parent}/ and run this again"
    )


def _download(url: str, partial: Path) -> None:
    """Download a file, continuing what is there of it already.

    Raises:
        OSError, http.client.HTTPException: the network or the server failed.
        DownloadError: the file cannot be written; another host would not help.
    """
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        # "Range not satisfiable": all of it is here; the checksum tells whether it is right.
        if error.code == 416:
            return
        raise
    with response:
        # A server that knows no ranges answers 200 with the whole file.
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with _progress() as progress:
            task = progress.add_task(url.rpartition("/")[2], total=total, completed=start)
            _truncate(partial, start)
            while block := response.read(_BLOCK):
                _append(partial, block)
                progress.advance(task, len(block))
        if total is not None and partial.stat().st_size != total:
            raise http.client.IncompleteRead(b"", total - partial.stat().st_size)


def _truncate(path: Path, length: int) -> None:
    _append(path, b"")  # makes it, if need be
    os.truncate(path, length)


def _append(path: Path, block: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(block)
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written ({error.strerror})") from error


def _progress() -> Progress:
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def md5_of(path: Path) -> str:
    """Return the MD5 checksum of a file in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar file of plain files and folders into `folder`.

    It is unpacked aside and then moved file by file, so that `ImageSets`, which says that the
    images are there, comes last.

    Raises:
        DownloadError: it is no tar file, or holds a link, a device or a path that leads outside.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
        try:
            with tarfile.open(archive, "r:") as tar:
                for member in tar:
                    if not (member.isfile() or member.isdir()):
                        raise DownloadError(f"{archive}: {member.name} is a link or device")
                    tar.extract(member, temporary, filter="data")
        except tarfile.TarError as error:
            raise DownloadError(f"{archive}: cannot be unpacked ({error})") from error
        files = [path for path in Path(temporary).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: ("ImageSets" in path.parts, path)):
            destination = folder / path.relative_to(temporary)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, destination)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Download PASCAL VOC 2007 (0.9 GB).")
    parser.add_argument("--root", default="datasets", help="folder for VOCdevkit/VOC2007")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        target = download_voc07(options.root)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run it again to continue\n")
        return 130
    except DownloadError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stderr.write(f"PASCAL VOC 2007 is in {target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
