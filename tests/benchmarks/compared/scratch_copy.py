"""An idea that surely does nothing: the base under another name. See scratch.py."""

from scratch import experiment  # noqa: F401
