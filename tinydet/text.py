"""Text files that people wrote, on whatever system."""

from __future__ import annotations

import json
from pathlib import Path


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8, or UTF-16 and UTF-32 as tools on Windows write them.

    Raises:
        ValueError: it is none of these; the message names the file and the line.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from None
