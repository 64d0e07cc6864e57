"""Download of PASCAL VOC 2007 by torchvision, which knows addresses and checksums."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tinydet.data.voc import split_names


class DownloadError(OSError):
    """The data could not be downloaded or is damaged; the message says what to do."""


def download_voc07(root: str | Path = "datasets") -> Path:
    """Download and unpack PASCAL VOC 2007 (0.9 GB), unless it is there already.

    An archive that is already in `root`, downloaded by hand for instance, is used if its checksum
    is right. Archives are deleted after unpacking.

    Args:
        root: folder in which `VOCdevkit/VOC2007` is made.

    Returns:
        The folder `VOCdevkit/VOC2007`.

    Raises:
        DownloadError: there is no network, a file is damaged, or the disk is full.
    """
    # Imported late, as it takes seconds.
    from torchvision.datasets.utils import download_and_extract_archive
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    root = Path(root)
    target = root / "VOCdevkit" / "VOC2007"
    for split, key in (("trainval", "2007"), ("test", "2007-test")):
        if split in split_names(target):
            continue
        url, name, md5 = (DATASET_YEAR_DICT[key][part] for part in ("url", "filename", "md5"))
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as unpacked:
                download_and_extract_archive(url, root, unpacked, name, md5)
                _move(Path(unpacked), root)
            (root / name).unlink()
        # torchvision raises RuntimeError for a wrong checksum.
        except (OSError, RuntimeError) as error:
            raise DownloadError(
                f"cannot download {name} ({error}); download {url} by hand, put it into {root}/ "
                "and run this again"
            ) from error
    return target


def _move(source: Path, target: Path) -> None:
    """Merge a folder into another, `ImageSets` last: it marks the data set as complete."""
    for left_out in ("ImageSets", ""):
        shutil.copytree(
            *(source, target),
            ignore=shutil.ignore_patterns(left_out),
            copy_function=shutil.move,
            dirs_exist_ok=True,
        )
