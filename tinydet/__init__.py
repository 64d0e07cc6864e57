"""TinyDet: a small detection toolkit. YOLOF on any timm backbone, re-parameterized for shipping."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinydet.deployment.predictor import Predictor
    from tinydet.experiment_file import load_experiment
    from tinydet.reparam import expand, fold
    from tinydet.training.loop import train

__all__ = ["Predictor", "expand", "fold", "load_experiment", "train"]
__version__ = "0.1.0"

_MODULES = {
    "Predictor": "tinydet.deployment.predictor",
    "expand": "tinydet.reparam",
    "fold": "tinydet.reparam",
    "load_experiment": "tinydet.experiment_file",
    "train": "tinydet.training.loop",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, and importing tinydet alone does not."""
    if name not in _MODULES:
        raise AttributeError(f"module 'tinydet' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
