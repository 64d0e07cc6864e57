"""HTML and SVG from nested calls: whatever is not made here is text, and is escaped."""

from __future__ import annotations

import html
import re
from typing import Any

# What a browser would drop, or let reorder the text around it: control characters, the marks of
# bidirectional text, and halves of surrogate pairs.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_VOID = ("br", "circle", "img", "line", "meta", "path", "rect")


class Markup(str):
    """HTML that is safe as it stands: `element` makes it, and nothing that was read does."""


def element(name: str, *children: Any, **attributes: Any) -> Markup:
    """Return an element.

    Args:
        name: of the tag.
        children: `Markup` is kept, None left out, anything else is text.
        attributes: `class_` is "class", `aria_label` "aria-label"; None and False are left out, and
            True is an attribute without a value.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{text(value)}"')
    opening = f"<{' '.join(parts)}>"
    if name in _VOID:
        return Markup(opening if name in ("br", "img", "meta") else f"{opening[:-1]}/>")
    return Markup(f"{opening}{join(children)}</{name}>")


def join(children: Any) -> Markup:
    """Return the children one after another, as `element` takes them."""
    return Markup("".join(text(child) for child in children if child is not None))


def text(value: Any) -> Markup:
    """Return a value as text, escaped for content and for quoted attributes; in ASCII.

    Characters outside ASCII become references, so that the page is right in any encoding.
    """
    if isinstance(value, Markup):
        return value
    safe = html.escape(_UNPRINTABLE.sub("\ufffd", str(value)))
    return Markup(safe.encode("ascii", "xmlcharrefreplace").decode())


def clip(value: Any, length: int) -> str:
    """Return text of at most `length` characters, with an ellipsis in the place of its middle."""
    value = str(value)
    if len(value) <= length:
        return value
    half = (length - 1) // 2
    return f"{value[: length - 1 - half]}…{value[len(value) - half :]}"
