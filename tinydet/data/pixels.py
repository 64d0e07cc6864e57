"""Pixels of an opened image file as 8-bit RGB, whatever depth they are stored in."""

from __future__ import annotations

import numpy as np
from PIL import Image
from PIL.TiffTags import TAGS_V2

_TIFF = {tag.name: number for number, tag in TAGS_V2.items()}
_DARKEST = 16  # of 255: the lowest sixteenth of a range is black to anyone who looks


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has more than 8 bits a sample."""
    raw_modes = [tile[3][0] if isinstance(tile[3], tuple) else tile[3] for tile in image.tile]
    return image.mode[0] in "IF" or any("16" in str(mode) for mode in raw_modes)


def rgb_pixels(image: Image.Image, data: bytes, deep: bool) -> np.ndarray:
    """Return the pixels as an array (H, W, 3) uint8.

    Alpha is dropped and colours are converted by pillow. It clips grey of more than 8 bits, so
    these are scaled here: integers from the range that the file states (a TIFF's BitsPerSample and
    SampleFormat, a PNG's sBIT) or that their type has, negative ones being black; floats from 0 to
    1.

    Args:
        image: opened by pillow.
        data: the file.
        deep: what `is_deep` said.

    Raises:
        ValueError: floats beyond 0 and 1, or more than 8 bits of which the image uses so few that
            it would come out nearly black.
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
            "of its more than 8 bits only the lowest are used: it would be nearly black; "
            "scale its values to their type's range"
        )
    return 255 - pixels if inverted else pixels


def _from_floats(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"its values go from {low:g} to {high:g}; floats from 0 to 1 are read")
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
    """Return the significant bits: by the standard samples fill 16 all the same, if not as stored.

    Many programs state 12 bits and store 0 to 4095.
    """
    found = data.find(b"sBIT", 0, data.find(b"IDAT"))
    bits = data[found + 4] if found > 0 else 16
    return bits if 8 < bits < 16 and largest < 2**bits else 16
