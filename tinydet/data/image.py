"""Image files: their headers, and decoding to uint8 RGB."""

from __future__ import annotations

import glob
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffTags import TAGS_V2
from torch import Tensor

from tinydet.memory import machine_memory

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
# Of files with several images, as GIF has, the first one is read.
_OTHER_SUFFIXES = (".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".avif")
IMAGE_SUFFIXES = JPEG_SUFFIXES + _OTHER_SUFFIXES
DRAWN = "_detections"  # ends the names of images with drawn detections
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_BYTES_PER_PIXEL = 8  # pillow's pixels and our copy of them
_TIFF = {tag.name: number for number, tag in TAGS_V2.items()}
_DARKEST = 16  # of 255: an image within the lowest sixteenth of the range looks black


@dataclass
class ImageInfo:
    """The header of an image file.

    Attributes:
        size: (height, width) of the stored pixels.
        mode: pillow's mode, e.g. "RGB", "L", "CMYK".
        orientation: EXIF orientation, 1 (as stored) to 8.
    """

    size: tuple[int, int]
    mode: str
    orientation: int

    @property
    def rotated_size(self) -> tuple[int, int]:
        """(height, width) after the EXIF orientation is applied."""
        return self.size[::-1] if self.orientation in _TRANSPOSED else self.size


def probe_image(path: Path) -> ImageInfo:
    """Read an image file's header, and check that the file is complete.

    Decoding every file of a large set would take minutes. A file that ends with its format's end
    marker is taken as complete; others are decoded, and so are images of more than 8 bits, which
    `read_image` may refuse for their values.

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
    """Open an image without pillow's warnings, of odd EXIF blocks for instance.

    Pillow's limit of 179 megapixels is replaced by half of the machine's memory.
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
    """Return the image files of names, each once: files, folders and patterns like a/*.jpg.

    Args:
        names: a folder means the images directly in it, except images with drawn detections.

    Raises:
        ValueError: a name matches no image.
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
            problem = "no file matches this pattern"
        if not files:
            raise ValueError(f"{name}: {problem}")
        found.update(dict.fromkeys(files))
    return list(found)


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it and with slashes, sorted.

    Links to folders are followed, but for those to a folder that the link itself is in.
    """
    found: list[str] = []
    # By folder: where it and those above it really are.
    above = {str(folder): {os.path.realpath(folder)}}
    for parent, folders, names in os.walk(folder, followlinks=True):
        paths = {name: os.path.join(parent, name) for name in folders}
        real = {name: os.path.realpath(path) for name, path in paths.items()}
        folders[:] = [name for name in folders if real[name] not in above[parent]]
        above |= {paths[name]: {*above[parent], real[name]} for name in folders}
        found += [os.path.join(parent, name) for name in names]
    return sorted(Path(path).relative_to(folder).as_posix() for path in found)


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
        path: JPEG, PNG or anything else pillow reads; see `rgb_pixels` for the conversion of
            other colours than RGB and other depths than 8 bits.
        orientation: apply the EXIF orientation.
        reduction: 2, 4 or 8 decodes a JPEG file at that fraction of its size (libjpeg computes
            a smaller inverse DCT of each block); other formats are decoded at full size.

    Returns:
        (3, H, W) uint8 RGB. A reduced image's sides are rounded up: pixel x of it covers
        [x * reduction, (x + 1) * reduction) of the whole, at the right and bottom perhaps a little
        beyond its edge.

    Raises:
        ValueError: the file cannot be decoded, or its values cannot be converted to 8 bits.
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
    except UnidentifiedImageError:  # its message has an address of memory
        raise ValueError(f"{path}: cannot be decoded (not an image of a known format)") from None
    # Pillow's readers raise many types on broken files (SyntaxError and struct.error among them).
    except Exception as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has more than 8 bits per sample."""
    tiles = getattr(image, "tile", ())  # of files only
    raw_modes = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in tiles]
    return image.mode[0] in "IF" or any("16" in str(mode) for mode in raw_modes)


def rgb_pixels(image: Image.Image, data: bytes, deep: bool) -> np.ndarray:
    """Return the pixels as an array (H, W, 3) uint8.

    Pillow drops alpha and converts colours. It clips grey of more than 8 bits, which is scaled here
    instead: integers by the range that the file states (a TIFF's BitsPerSample and SampleFormat, a
    PNG's sBIT) or else that of their type, negative ones to black; floats from the range 0 to 1.

    Args:
        image: opened by pillow.
        data: the file.
        deep: result of `is_deep`.

    Raises:
        ValueError: floats outside 0 to 1, or more than 8 bits with values so small that the result
            would be nearly black.
    """
    inverted = False
    if image.mode[0] in "IF":
        tags = getattr(image, "tag_v2", {})
        inverted = tags.get(_TIFF["PhotometricInterpretation"]) == 0
        values = np.asarray(image)
        image = Image.fromarray(
            _from_floats(values) if image.mode == "F" else _from_integers(values, image, tags, data)
        )
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    if deep and pixels.max() <= _DARKEST:
        raise ValueError(
            "it has more than 8 bits and uses only the lowest: it would be nearly black; "
            "scale its values to the range of their type"
        )
    return 255 - pixels if inverted else pixels


def _from_floats(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"its values go from {low:g} to {high:g}; floats have to be from 0 to 1")
    return np.rint(values * 255).astype(np.uint8)


def _from_integers(values: np.ndarray, image: Image.Image, tags: dict, data: bytes) -> np.ndarray:
    bits = 31 if image.mode == "I" else 16
    if image.format == "TIFF":
        (bits, *_), (kind, *_) = tags[_TIFF["BitsPerSample"]], tags.get(_TIFF["SampleFormat"], (1,))
        bits -= kind == 2  # the sign
        if bits == 32:
            values = values.view(np.uint32)  # pillow has no such mode
    elif image.format == "PNG":
        bits = _bits_of_png(data, int(values.max()))
    elif image.format == "PPM":
        bits = 16
    return (np.maximum(values, 0) >> (bits - 8)).astype(np.uint8)


def _bits_of_png(data: bytes, largest: int) -> int:
    """Return the significant bits of the stored values.

    By the standard, samples with fewer significant bits are scaled to 16; but many programs state
    12 bits and store 0 to 4095.
    """
    found = data.find(b"sBIT", 0, data.find(b"IDAT"))
    bits = data[found + 4] if found > 0 else 16
    return bits if 8 < bits < 16 and largest < 2**bits else 16
