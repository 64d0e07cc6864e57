"""One VOC annotation file: the XML as plain values, nothing judged yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import defusedxml.ElementTree
from defusedxml import DefusedXmlException


@dataclass
class RawObject:
    """An object as the file states it.

    Attributes:
        name: class name.
        box: (xmin, ymin, xmax, ymax), 1-based inclusive pixels; None if one is missing.
        difficult: the file marks it as hard to recognise.
    """

    name: str
    box: tuple[float, float, float, float] | None
    difficult: bool


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
    """Read a VOC annotation file.

    Raises:
        ValueError: the file is not XML, is not a VOC annotation, or declares entities (which could
            expand to gigabytes or name other files).
    """
    try:
        root = defusedxml.ElementTree.fromstring(path.read_bytes())
    except DefusedXmlException:
        raise ValueError("declares XML entities, which are refused") from None
    # ValueError, LookupError: an encoding that is not known or not supported.
    except (ParseError, ValueError, LookupError) as error:
        raise ValueError(f"not XML ({error})") from None
    if root.tag != "annotation":
        raise ValueError(f"not a VOC annotation (root element <{root.tag}>)")
    return RawAnnotation(
        size=_stated_size(root.find("size")),
        objects=[_parse_object(element) for element in root.findall("object")],
    )


def _stated_size(element: Element | None) -> tuple[int, int] | None:
    if element is None:
        return None
    height, width = _number(element, "height"), _number(element, "width")
    if height is None or width is None:
        return None
    return int(height), int(width)


def _parse_object(element: Element) -> RawObject:
    # Only direct children: an object's <part>s have names and boxes too.
    frame = element.find("bndbox")
    box = None
    if frame is not None:
        values = [_number(frame, key) for key in ("xmin", "ymin", "xmax", "ymax")]
        if None not in values:
            box = tuple(values)
    return RawObject(
        name=(element.findtext("name") or "").strip(),
        box=box,
        difficult=(element.findtext("difficult") or "").strip().lower() in ("1", "true"),
    )


def _number(element: Element, key: str) -> float | None:
    try:
        value = float(element.findtext(key) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
