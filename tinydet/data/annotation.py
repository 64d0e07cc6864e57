"""One VOC annotation file: the XML as plain values, nothing judged yet."""

from __future__ import annotations

import codecs
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml import DefusedXmlException

_DECLARED = re.compile(rb"""<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]+)["']""")
# Files that claim one of these often hold characters that only its extension has.
_EXTENSIONS = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "cp950",
}


@dataclass
class RawObject:
    """An object as the file states it.

    Attributes:
        name: class name.
        box: (xmin, ymin, xmax, ymax), 1-based inclusive pixels; None if one is missing.
        difficult: mark of being hard to recognise, for `tinydet.data.fields.mark`.
    """

    name: str
    box: tuple[float, float, float, float] | None
    difficult: str


@dataclass
class RawAnnotation:
    """An annotation file as it stands.

    Attributes:
        size: stated (height, width), or None where the file states none.
        objects: in the file's order.
    """

    size: tuple[int, int] | None
    objects: list[RawObject]


def parse_annotation(path: Path) -> RawAnnotation:
    """Read a VOC annotation file, in any encoding that Python knows; the case of tags is all one.

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


def _parse(data: bytes) -> Element:
    """Parse XML; expat does so in few encodings, in all others text that Python has decoded."""
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
    """Return what a file may be encoded in: as declared, and as its first bytes look."""
    looks = json.detect_encoding(data)  # UTF-8, UTF-16 or UTF-32
    declared = _DECLARED.match(data)
    if declared is None:
        return [looks]
    try:
        name = codecs.lookup(declared[1].decode()).name.replace("-", "_")
    except LookupError:
        return [looks]
    return [name, _EXTENSIONS.get(name, name), looks]


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
        values = [_number(frame, key) for key in ("xmin", "ymin", "xmax", "ymax")]
        if None not in values:
            box = tuple(values)
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
