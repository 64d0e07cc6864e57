"""What the fields of an annotation mean, in VOC's and in COCO's files."""

from __future__ import annotations

import unicodedata

_YES = {"true", "yes", "y", "t", "on"}
_NO = {"", "false", "no", "n", "f", "off", "none", "null", "unspecified"}
_INVISIBLE = str.maketrans("", "", "\ufeff\u200b")  # byte order mark, zero-width space


def class_name(text: str) -> str:
    """Return a class's name in the form that names are compared in; "" if nothing is to be seen.

    That is Unicode's composed form (NFC), and single blanks only between words.
    """
    return " ".join(unicodedata.normalize("NFC", text).translate(_INVISIBLE).split())


def mark(value: object) -> bool | None:
    """Return what a yes-or-no field says: a number, a boolean or a word, None if it is unclear.

    Numbers above 0 mean yes, a field that is missing (None) or empty means no.
    """
    if value in (None, 0, 1):  # nearly always, and files have millions of them
        return value == 1
    text = str(value).strip().lower()
    if text in _YES or text in _NO:
        return text in _YES
    try:
        number = float(text)
    except ValueError:
        return None
    return number > 0 if number >= 0 else None
