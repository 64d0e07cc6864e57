"""Fonts that cover the letters of a text: matplotlib's DejaVu Sans, or a system font.

DejaVu Sans has Latin, Greek and Cyrillic letters. For all others (猫) the fonts installed on the
computer are searched, once for each set of letters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ImageFont

logger = logging.getLogger(__name__)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return a font of `size` pixels that has all letters of a text, else DejaVu Sans."""
    return _opened(_file_with(_beyond_ascii(text)) or _dejavu(), size)


def drawable(text: str) -> str:
    """Return a text as one line, with "?" for letters that cannot be drawn."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if _file_with(_beyond_ascii(text)):
        return text
    known = _letters_of(_dejavu())
    return "".join(c if ord(c) in known else "?" for c in text)


@cache
def class_names(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names to write on boxes: class names, or numbers if no font has their letters.

    Classes that are written as numbers are logged once.
    """
    unknown = [name for name in classes if not _file_with(_beyond_ascii(name))]
    if unknown:
        logger.warning(
            "no installed font has the letters of %s: pictures show the numbers of these classes, "
            "counted from 0; install a font that has them (for Chinese, Japanese and Korean: Noto "
            "Sans CJK)",
            ", ".join(unknown),
        )
    return tuple(str(k) if name in unknown else name for k, name in enumerate(classes))


def font_families(texts: Iterable[str]) -> list[str]:
    """Return matplotlib's `font.family` with fonts for the letters of all texts."""
    import matplotlib as mpl
    from matplotlib import font_manager

    families = [*mpl.rcParams["font.family"], "DejaVu Sans"]
    for text in texts:
        file = _file_with(_beyond_ascii(text))
        if file and file != _dejavu():
            font_manager.fontManager.addfont(file)
            families.append(font_manager.FontProperties(fname=file).get_name())
    return list(dict.fromkeys(families))


def _beyond_ascii(text: str) -> frozenset[str]:
    return frozenset(c for c in text if c.isprintable() and not c.isascii())


@cache
def _file_with(letters: frozenset[str]) -> str | None:
    """Return the first font file that has these letters and all of ASCII, or None."""
    wanted = [*range(0x20, 0x7F), *map(ord, letters)]
    if np.isin(wanted, _letters_of(_dejavu())).all():
        return _dejavu()
    return next((f for f in _system_fonts() if np.isin(wanted, _letters_of(f)).all()), None)


@cache
def _dejavu() -> str:
    import matplotlib as mpl

    return str(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def _system_fonts() -> Sequence[str]:
    """Return the files of the installed fonts, regular ones first."""
    from matplotlib import font_manager

    # Apple's LastResort claims every letter, and draws a box for each.
    files = [f for f in font_manager.findSystemFonts() if "lastresort" not in f.lower()]
    return sorted(files, key=lambda f: ("regular" not in Path(f).name.lower(), f))


@cache
def _letters_of(file: str) -> np.ndarray:
    """Return the code points that a font file has glyphs for; none if the file is unusable."""
    from matplotlib.ft2font import FT2Font

    try:
        _opened(file, 12)  # Some system fonts come in fixed sizes only.
        return np.fromiter(FT2Font(file).get_charmap(), np.int64)
    except (OSError, RuntimeError):
        return np.zeros(0, np.int64)


@cache
def _opened(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
