"""VOC annotation files: read as plain, unchecked values, and written; forms of names and flags."""

from __future__ import annotations

import codecs
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

_DECLARED = re.compile(rb"""<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]+)["']""")
# Files that declare one of these often hold characters that only its extension has.
_EXTENSIONS = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "cp950",
}


_YES = {"true", "yes", "y", "t", "on"}
_NO = {"", "false", "no", "n", "f", "off", "none", "null", "unspecified"}
_INVISIBLE = str.maketrans("", "", "\ufeff\u200b")  # byte order mark, zero-width space


@dataclass
class RawObject:
    """An object as the file states it.

    Attributes:
        name: class name.
        box: (xmin, ymin, xmax, ymax), 1-based inclusive pixels; None if one is missing.
        difficult: mark of being hard to recognise, for `parse_flag`.
    """

    name: str
    box: tuple[float, float, float, float] | None
    difficult: str


@dataclass
class RawAnnotation:
    """An annotation file as written.

    Attributes:
        size: stated (height, width), or None where the file states none.
        objects: in the file's order.
    """

    size: tuple[int, int] | None
    objects: list[RawObject]


def parse_annotation(path: Path) -> RawAnnotation:
    """Read a VOC annotation file in any encoding that Python knows; the case of tags is ignored.

    Raises:
        ValueError: the file is not XML, is not a VOC annotation, or declares entities (which could
            expand to gigabytes or name other files).
    """
    try:
        root = _parse(path.read_bytes())
    except DefusedXmlException:
        raise ValueError("declares XML entities, which are refused") from None
    # ValueError, LookupError: an encoding that is not known or not supported.
    except (ParseError, ValueError, LookupError) as error:
        raise ValueError(f"not XML ({error})") from None
    if root.tag.lower() != "annotation":
        raise ValueError(f"not a VOC annotation (root element <{root.tag}>)")
    return RawAnnotation(
        size=_stated_size(_children(root).get("size")),
        objects=[_parse_object(element) for element in root if element.tag.lower() == "object"],
    )


def annotation_xml(
    file_name: str,
    size: tuple[int, int],
    objects: Iterable[tuple[str, Sequence[float], bool]],
) -> bytes:
    """Return the content of a VOC annotation file.

    Args:
        file_name: of the image.
        size: (height, width) of the image.
        objects: class name, box (xmin, ymin, xmax, ymax) in 1-based, inclusive pixels, difficult.
    """
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = file_name
    frame = ElementTree.SubElement(root, "size")
    for key, value in (("width", size[1]), ("height", size[0]), ("depth", 3)):
        ElementTree.SubElement(frame, key).text = str(value)
    for name, box, difficult in objects:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = name
        ElementTree.SubElement(item, "difficult").text = str(int(difficult))
        bounds = ElementTree.SubElement(item, "bndbox")
        for key, side in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, key).text = f"{side:.9g}"
    ElementTree.indent(root)
    return ElementTree.tostring(root)


def class_name(text: str) -> str:
    """Return a class name in the form used for comparison; "" if it has no visible character.

    That is Unicode's composed form (NFC), with words separated by single spaces. Halves of a
    surrogate pair, which JSON and YAML can hold but no file of text, become "?".
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join(unicodedata.normalize("NFC", text).translate(_INVISIBLE).split())


def parse_flag(value: object) -> bool | None:
    """Return the value of a yes-or-no field, given as number, boolean or word; None if unclear.

    Numbers above 0 mean yes; a missing (None) or empty field means no.
    """
    if value in (None, 0, 1):  # fast path: files have millions of them
        return value == 1
    text = str(value).strip().lower()
    if text in _YES or text in _NO:
        return text in _YES
    try:
        number = float(text)
    except ValueError:
        return None
    return number > 0 if number >= 0 else None


def _parse(data: bytes) -> Element:
    """Parse XML; text in an encoding that expat does not support is decoded by Python first."""
    try:
        return defusedxml.ElementTree.fromstring(data)
    except DefusedXmlException:
        raise
    except (ParseError, ValueError, LookupError) as error:
        problem = error
    for encoding in _encodings(data):
        try:
            return defusedxml.ElementTree.fromstring(data.decode(encoding))
        except DefusedXmlException:
            raise
        except (ParseError, ValueError, LookupError):
            continue
    raise problem


def _encodings(data: bytes) -> list[str]:
    """Return possible encodings of a file: as declared, and guessed from its first bytes."""
    guess = json.detect_encoding(data)  # UTF-8, UTF-16 or UTF-32
    declared = _DECLARED.match(data)
    if declared is None:
        return [guess]
    try:
        name = codecs.lookup(declared[1].decode()).name.replace("-", "_")
    except LookupError:
        return [guess]
    return [name, _EXTENSIONS.get(name, name), guess]


def _children(element: Element) -> dict[str, Element]:
    """Return the first direct child of each name, in lower case."""
    return {child.tag.lower(): child for child in reversed(element)}


def _text(children: dict[str, Element], name: str) -> str:
    return (children[name].text or "").strip() if name in children else ""


def _stated_size(element: Element | None) -> tuple[int, int] | None:
    if element is None:
        return None
    height, width = (_number(_children(element), key) for key in ("height", "width"))
    if height is None or width is None:
        return None
    return int(height), int(width)


def _parse_object(element: Element) -> RawObject:
    # Only direct children: an object's <part>s have names and boxes too.
    children = _children(element)
    box = None
    if "bndbox" in children:
        frame = _children(children["bndbox"])
        xmin, ymin, xmax, ymax = (_number(frame, k) for k in ("xmin", "ymin", "xmax", "ymax"))
        if xmin is not None and ymin is not None and xmax is not None and ymax is not None:
            box = (xmin, ymin, xmax, ymax)
    return RawObject(
        name=_text(children, "name"),
        box=box,
        difficult=_text(children, "difficult"),
    )


def _number(children: dict[str, Element], key: str) -> float | None:
    try:
        value = float(_text(children, key))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
