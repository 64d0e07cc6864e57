"""Starts a detector from the weights of another one, whose classes and layers may differ."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinydet.backbones.state_dict import read_content
from tinydet.config import ConfigError, Model
from tinydet.experiment_file import experiment_from_dict
from tinydet.reparam.fold import fold
from tinydet.reparam.unfold import unfold
from tinydet.yolof.detector import Detector
from tinydet.yolof.official import convert_official

Build = Callable[[Model, Sequence[str]], Detector]

logger = logging.getLogger(__name__)

_BACKBONE = "backbone."
_SCORES = "head.cls_score."
_CHECKPOINT = {"form", "experiment", "classes", "model"}
_NO_BRANCHES: dict[str, Any] = {
    "expand": "none",
    "expand_where": "",
    "expand_online": False,
    "expand_scale": 0.0,
}
# What decides the names and shapes of the backbone's tensors.
_BACKBONE_FIELDS = (
    "backbone", "feature", "freeze_norms", "activation", "activation_where", "attention",
    "attention_place", "attention_where", "expand", "expand_where", "expand_online",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedDetector:
    """The weights of a detector, for the start of another one.

    Attributes:
        path: the file they are from.
        tensors: under the names of `Detector`, of the training form.
        classes: class names in label order.
        backbone_name: timm's.
        same_backbone: whether the other detector's backbone has the same activations, attention
            layers and branches; if not, the tensors have no branches.
        norms: names of norms that have no statistics, since they were folded; they compute the
            same function in eval mode only; see `tinydet.reparam.unfold`.
    """

    path: str
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...]
    backbone_name: str
    same_backbone: bool
    norms: tuple[str, ...] = ()

    def backbone(self) -> dict[str, Tensor]:
        """Return the backbone's tensors under their names in it."""
        return {
            name.removeprefix(_BACKBONE): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(_BACKBONE)
        }


def read_trained(config: Model, build: Build) -> TrainedDetector | None:
    """Read the detector that `model.weights` names; None if it names anything else.

    Args:
        config: of the detector to start. The file may be a checkpoint of TinyDet in either form,
            or a published YOLOF (`tinydet.yolof.official`).
        build: builds a detector.

    Raises:
        ConfigError: the file holds a detector that cannot be used.
    """
    if config.weights in ("imagenet", "random"):
        return None
    try:
        content = read_content(Path(config.weights))
    except ValueError:
        return None  # The reader of backbones' files knows more formats, and says what is wrong.
    try:
        content = convert_official(content) or content
        if not isinstance(content, Mapping) or not content.keys() >= _CHECKPOINT:
            return None
        model, classes = experiment_from_dict(content["experiment"]).model, content["classes"]
        same = all(getattr(model, name) == getattr(config, name) for name in _BACKBONE_FIELDS)
        tensors: dict[str, Tensor] = content["model"]
        norms: tuple[str, ...] = ()
        folded = content["form"] == "deploy"
        if folded or (model.expand != "none" and not same):
            if not folded:
                tensors = _fold(model, classes, tensors, build)
            plain = build(replace(model, weights="random", **_NO_BRANCHES), classes).eval()
            same, (tensors, norms) = False, unfold(plain, tensors, _example())
        if not all(isinstance(name, str) for name in classes):
            raise TypeError("its classes are no names")
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("its weights are no tensors")
    except (ValueError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"model.weights={config.weights}: {first_line}") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"model.weights={config.weights}: malformed ({error})") from error
    return TrainedDetector(config.weights, tensors, tuple(classes), model.backbone, same, norms)


def load_trained(detector: Detector, trained: TrainedDetector) -> None:
    """Load what fits of another detector's encoder and head, and of its class scores by name.

    With `same_backbone` its backbone too. A line names what was taken and what stays initial.

    Raises:
        ConfigError: the backbone's tensors are not those of this detector.
    """
    own = detector.state_dict()
    wanted = [name for name in own if not name.startswith((_BACKBONE, _SCORES))]
    given = {n: t for n, t in trained.tensors.items() if n in own and t.shape == own[n].shape}
    taken = {name: given[name] for name in wanted if name in given}
    if trained.same_backbone:
        names = [name for name in own if name.startswith(_BACKBONE)]
        missing = [name for name in names if name not in given]
        if missing:
            raise ConfigError(
                f"model.weights={trained.path}: {len(missing)} of the {len(names)} tensors of the "
                f"backbone are missing or have another shape, e.g. {missing[0]}"
            )
        taken |= {name: given[name] for name in names}
    scores, known = _class_scores(own, trained, detector.classes)
    detector.load_state_dict({**own, **taken, **scores})
    detector.norms_without_statistics = trained.norms
    fitting = sum(name in taken for name in wanted)
    remarks = f"{fitting} of the {len(wanted)} tensors of encoder and head fit"
    if fitting < len(wanted):
        odd = next(name for name in wanted if name not in taken)
        theirs = trained.tensors.get(odd)
        shape = "none" if theirs is None else tuple(theirs.shape)
        remarks += f" (not e.g. {odd}: {tuple(own[odd].shape)} here, {shape} there)"
    new = [name for name in detector.classes if name not in known]
    backbone = "its backbone fits"
    # The tag after the dot names published weights.
    if trained.backbone_name.partition(".")[0] != detector.config.backbone.partition(".")[0]:
        backbone += f", but is {trained.backbone_name}, which may compute something else"
    logger.info(
        f"model.weights={trained.path}: a detector of {len(trained.classes)} classes; {backbone}; "
        f"{remarks}; {len(known)} of {len(detector.classes)} classes keep their scores"
        + (f", not {_some(new)}" if new else "")
    )


def _class_scores(
    own: Mapping[str, Tensor], trained: TrainedDetector, classes: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the class scores' tensors, rows of known classes replaced, and the known classes."""
    known = [name for name in classes if name in trained.classes]
    tensors = {}
    for part in ("weight", "bias"):
        theirs, ours = trained.tensors.get(_SCORES + part), own[_SCORES + part]
        if theirs is None or theirs.shape[1:] != ours.shape[1:]:
            return {}, []
        # Channels are ordered by anchor, then class.
        theirs = theirs.unflatten(0, (-1, len(trained.classes)))
        ours = ours.unflatten(0, (-1, len(classes))).clone()
        if len(theirs) != len(ours):
            return {}, []
        for name in known:
            ours[:, classes.index(name)] = theirs[:, trained.classes.index(name)]
        tensors[_SCORES + part] = ours.flatten(0, 1)
    return tensors, known


def _fold(
    model: Model, classes: Sequence[str], tensors: Mapping[str, Tensor], build: Build
) -> dict[str, Tensor]:
    detector = build(replace(model, weights="random"), classes).eval()
    detector.load_state_dict(tensors)
    return fold(detector, _example())[0].state_dict()


def _example() -> Tensor:
    return torch.zeros(1, 3, 64, 64, dtype=torch.uint8)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
