"""Image files: what the header says, and decoding to uint8 RGB."""

from __future__ import annotations

import glob
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tinydet.data.pixels import is_deep, rgb_pixels
from tinydet.memory import machine_memory

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
# Of files with several images, as GIF has, the first one is read.
_OTHER_SUFFIXES = (".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".avif")
IMAGE_SUFFIXES = JPEG_SUFFIXES + _OTHER_SUFFIXES
DRAWN = "_detections"  # ends the name of a file in which what was found is drawn
_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_BYTES_PER_PIXEL = 8  # pillow's pixels and our copy of them


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
    format's end marker is taken as whole; any other is decoded to find out, and so are images of
    more than 8 bits, whose pixels decide whether `read_image` refuses them.

    Raises:
        ValueError: not an image, truncated, too large for the memory, or refused for its values.
    """
    try:
        with _opened(path) as image:
            file_format, deep = image.format, is_deep(image)
            width, height = image.size
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            info = ImageInfo((height, width), image.mode, orientation)
    except Exception as error:  # of many types, as in `read_image`
        reason = error if isinstance(error, ValueError) else type(error).__name__
        raise ValueError(f"not a readable image ({reason})") from None
    if info.orientation not in range(1, 9):
        info.orientation = 1
    if deep or not _ends_well(path, file_format or ""):
        read_image(path)
    return info


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image, without warnings of odd EXIF blocks and the like.

    Pillow warns of images of more than 89 megapixels and refuses twice that; here it is half of the
    machine's memory that they may take.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(source) as image:
                width, height = image.size
                if width * height * _BYTES_PER_PIXEL > machine_memory() / 2:
                    raise ValueError(f"{width}x{height} pixels are too many for the memory")
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


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
        path: JPEG, PNG or anything else pillow reads; see `rgb_pixels` for how colours other than
            RGB, and depths other than 8 bits, are converted.
        orientation: turn the image as its EXIF orientation says.
        reduction: 2, 4 or 8 decodes a JPEG file at that fraction of its size (libjpeg computes
            fewer points of each block's inverse DCT); files of other formats are decoded whole.

    Returns:
        (3, H, W) uint8 RGB. A reduced image's sides are rounded up: pixel x of it covers
        [x * reduction, (x + 1) * reduction) of the whole, at the right and bottom perhaps a little
        beyond its edge.

    Raises:
        ValueError: the file cannot be decoded, or not be shown truthfully in 8 bits.
        FileNotFoundError: there is no such file.
    """
    data = path.read_bytes()
    try:
        with _opened(io.BytesIO(data)) as image:
            deep = is_deep(image)
            if reduction > 1:
                width, height = image.size
                image.draft(None, (width // reduction, height // reduction))
            if orientation:
                ImageOps.exif_transpose(image, in_place=True)
            pixels = rgb_pixels(image, data, deep)
    except UnidentifiedImageError:  # Its message has the address of the buffer read from.
        raise ValueError(f"{path}: cannot be decoded (not an image of a known format)") from None
    # Pillow's readers raise many types on broken files (SyntaxError and struct.error among them).
    except Exception as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
