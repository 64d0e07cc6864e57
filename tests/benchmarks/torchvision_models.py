"""torchvision's models for the folding benchmarks: classifiers, detectors, segmentation, video.

A name is torchvision's own after "torchvision/".
"""

from __future__ import annotations

from typing import Any

import torch
from random_weights import randomise
from timm_models import seed_of
from torch import Tensor, nn
from torchvision.models import get_model, get_model_builder, list_models

PREFIX = "torchvision/"
_FRAMES = 4  # of a video
_KINDS = ("detection", "segmentation", "video", "optical_flow")
_PROPOSALS = 50
_DETECTIONS = 20  # of an image


def names() -> list[str]:
    """Return the names of all models but the quantized ones."""
    return [PREFIX + name for name in list_models() if not name.startswith("quantized")]


def family_of(name: str) -> str:
    """Return the name of the torchvision module that defines a model, after "torchvision/"."""
    return PREFIX + _module(name).rpartition(".")[2]


def build_model(name: str, side: int) -> nn.Module:
    """Return a model in eval mode, float32, with weights that only its name decides.

    Args:
        name: torchvision's name after "torchvision/".
        side: of the input in pixels; a detector resizes its input to it.
    """
    options: dict[str, Any] = {"weights": None}
    if _kind(name) in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if name.endswith(("googlenet", "inception_v3")):
        options["init_weights"] = False  # Theirs takes long.
    if "rcnn" in name:
        options["rpn_post_nms_top_n_test"] = _PROPOSALS  # Of 1000, the heads take most of the time.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(name))
        model = get_model(name.removeprefix(PREFIX), **options)
    if _kind(name) == "detection":
        _show_all_detections(model, side)
    randomise(model.eval(), seed_of(name))
    return model


def example_inputs(name: str, batch: int, height: int, width: int) -> tuple[Any, ...]:
    """Return a model's positional arguments: float32 noise that only the arguments decide.

    Images (batch, 3, height, width), two of them for optical flow, a list of images for a detector,
    or videos (batch, 3, 4, height, width).
    """
    generator = torch.Generator().manual_seed(seed_of(name) + 1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    match _kind(name):
        case "detection":
            return ([noise(3, height, width) for _ in range(batch)],)
        case "video":
            return (noise(batch, 3, _FRAMES, height, width),)
        case "optical_flow":
            return noise(batch, 3, height, width), noise(batch, 3, height, width)
    return (noise(batch, 3, height, width),)


def _show_all_detections(detector: Any, side: int) -> None:
    """Let a detector with random weights find something, in images of this side."""
    heads = getattr(detector, "roi_heads", detector)
    heads.score_thresh = 0.0
    heads.detections_per_img = _DETECTIONS
    detector.transform.min_size, detector.transform.max_size = (side,), 2 * side


def _kind(name: str) -> str:
    return next((kind for kind in _KINDS if f".{kind}." in _module(name)), "")


def _module(name: str) -> str:
    return get_model_builder(name.removeprefix(PREFIX)).__module__
