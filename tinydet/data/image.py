"""Image files: what the header says, and decoding to uint8 RGB."""

from __future__ import annotations

import glob
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DRAWN = "_detections"  # ends the name of a file in which what was found is drawn
_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass
class ImageInfo:
    """What an image file's header states.

    Attributes:
        size: (height, width) of the stored pixels.
        mode: pillow's mode, e.g. "RGB", "L", "CMYK".
        orientation: EXIF orientation, 1 (as stored) to 8.
    """

    size: tuple[int, int]
    mode: str
    orientation: int

    @property
    def turned_size(self) -> tuple[int, int]:
        """(height, width) after the EXIF orientation is applied."""
        return self.size[::-1] if self.orientation in _TURNED else self.size


def probe_image(path: Path) -> ImageInfo:
    """Read an image file's header, and make sure the file is whole.

    Reading every pixel of every file would take minutes on a large set. A file that ends with its
    format's end marker is taken as whole; any other is decoded to find out.

    Raises:
        ValueError: not an image, or truncated.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # of odd EXIF blocks and very large images
            width, height = image.size
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            info = ImageInfo((height, width), image.mode, orientation)
            file_format = image.format
    except Exception as error:  # of many types, as in `read_image`
        raise ValueError(f"not a readable image ({type(error).__name__})") from None
    if info.orientation not in range(1, 9):
        info.orientation = 1
    if not _ends_well(path, file_format or ""):
        read_image(path)
    return info


def _ends_well(path: Path, file_format: str) -> bool:
    with path.open("rb") as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - 64))
        tail = file.read()
    if file_format == "JPEG":
        # Some cameras pad the file with zeros after the end-of-image marker.
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if file_format == "PNG":
        return b"IEND" in tail
    return False


def find_images(names: Sequence[Path]) -> list[Path]:
    """Return the image files that names mean, each once: files, folders and patterns like a/*.jpg.

    Args:
        names: a folder means the images right in it, without those that drawings were saved as.

    Raises:
        ValueError: a name means none.
    """
    found: dict[Path, None] = {}
    for name in names:
        if name.is_dir():
            files = [file for file in sorted(name.iterdir()) if _is_picture(file)]
            problem = "no images in this folder"
        elif name.exists() or not set("*?[") & set(str(name)):
            files = [name] if name.is_file() else []
            problem = "no such image file"
        else:
            files = [Path(file) for file in sorted(glob.glob(str(name), recursive=True))]
            files = [file for file in files if file.is_file()]
            problem = "no file has a name like that"
        if not files:
            raise ValueError(f"{name}: {problem}")
        found.update(dict.fromkeys(files))
    return list(found)


def _is_picture(file: Path) -> bool:
    return (
        file.suffix.lower() in IMAGE_SUFFIXES
        and not file.stem.endswith(DRAWN)
        and not file.name.startswith(".")
        and file.is_file()
    )


def read_image(path: Path, orientation: bool = False, reduction: int = 1) -> Tensor:
    """Decode an image file.

    With pillow: torchvision's decoders are deprecated since 0.29, and read fewer formats.

    Args:
        path: JPEG, PNG or anything else pillow reads; grey and CMYK are converted.
        orientation: turn the image as its EXIF orientation says.
        reduction: 2, 4 or 8 decodes a JPEG file at that fraction of its size (libjpeg computes
            fewer points of each block's inverse DCT); files of other formats are decoded whole.

    Returns:
        (3, H, W) uint8 RGB. A reduced image's sides are rounded up: pixel x of it covers
        [x * reduction, (x + 1) * reduction) of the whole, at the right and bottom perhaps a little
        beyond its edge.

    Raises:
        ValueError: the file cannot be decoded.
        FileNotFoundError: there is no such file.
    """
    data = path.read_bytes()
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            if reduction > 1:
                width, height = image.size
                image.draft(None, (width // reduction, height // reduction))
            if orientation:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # pillow would clip 16 bits to 8, not scale them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))  # (H, W, 3)
    except UnidentifiedImageError:  # Its message has the address of the buffer read from.
        raise ValueError(f"{path}: cannot be decoded (not an image of a known format)") from None
    # Pillow's readers raise many types on broken files (SyntaxError and struct.error among them).
    except Exception as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
