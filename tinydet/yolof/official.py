"""Published YOLOF detectors: the authors' files (detectron2) and MMDetection's, as checkpoints.

Both are ResNets of Caffe's kind on BGR pixels whose standard deviation is in the first conv.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from tinydet.config import Data, Experiment, Model

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_FIRST = ("backbone.stem.conv1.weight", "backbone.conv1.weight")  # detectron2's, MMDetection's
_SCORES = ("decoder.cls_score.weight", "bbox_head.cls_score.weight")
# Patterns of their names and ours, applied in turn.
_RENAMED = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.bn1."),
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
    (r"(layer\d\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"^neck\.", "encoder."),
    (r"^encoder\.fpn_", "encoder.output_"),
    (r"^encoder\.dilated_encoder_blocks\.", "encoder.blocks."),
    (r"(blocks\.\d+\.conv\d)\.conv\.", r"\1.0."),
    (r"(blocks\.\d+\.conv\d)\.bn\.", r"\1.1."),
    (r"^(decoder|bbox_head)\.", "head."),
    # MMDetection counts conv, norm and activation as one layer.
    (r"_subnet\.(\d+)\.conv\.", lambda m: f"_subnet.{3 * int(m[1])}."),
    (r"_subnet\.(\d+)\.bn\.", lambda m: f"_subnet.{3 * int(m[1]) + 1}."),
    (r"^head\.cls_subnet\.", "head.cls_tower."),
    (r"^head\.bbox_subnet\.", "head.reg_tower."),
    (r"^head\.bbox_pred\.", "head.box_delta."),
    (r"^head\.object_pred\.", "head.objectness."),
)
_WITHOUT_BIAS = re.compile(r"(encoder\.blocks\.\d+\.conv\d|head\.\w+_tower)\.(\d+)\.bias")
_BLOCKS = {6: "resnet50_caffe", 23: "resnet101_caffe"}  # by the blocks of the third stage
# By anchors of a cell, from the authors' configurations.
_FEATURES: dict[int, dict[str, Any]] = {
    5: {"feature": "C5", "dilations": (2, 4, 6, 8), "anchor_scales": (1.0, 2.0, 4.0, 8.0, 16.0)},
    6: {
        "feature": "DC5",
        "dilations": (4, 8, 12, 16),
        "anchor_scales": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        "match_topk": 8,
        "match_pos_ignore": 0.1,
    },
}


def convert_official(content: Any) -> dict[str, Any] | None:
    """Turn a published YOLOF into the content of a checkpoint.

    Args:
        content: what the file holds: a dict with the tensors under "model" (detectron2) or
            "state_dict" (MMDetection), or the tensors themselves.

    Returns:
        A dict with the keys "form", "experiment", "classes" and "model" of a training checkpoint
        (`tinydet.training.checkpoint`); None if the file is something else. Class names are those
        in the file, else COCO's where there are 80, else numbers.

    Raises:
        ValueError: it is a YOLOF with another backbone, encoder or normalization than those that
            are known.
    """
    if not isinstance(content, Mapping):
        return None
    inner = (content.get(key) for key in ("model", "state_dict"))
    theirs = next((value for value in inner if isinstance(value, Mapping)), content)
    if not any(name in theirs for name in _SCORES):
        return None
    first = next((theirs[name] for name in _FIRST if name in theirs), None)
    if first is None or first.shape != (64, 3, 7, 7):
        raise ValueError("this YOLOF's backbone is no ResNet; only ResNet-50 and -101 are known")
    meta = content.get("meta")
    _check_style(meta if isinstance(meta, Mapping) else {})
    tensors = {
        _rename(name): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in theirs.items()
        if name.split(".")[0] in ("backbone", "encoder", "neck", "decoder", "bbox_head")
        # Frozen norms, which ours are too, do not count batches.
        and not re.fullmatch(r"backbone\..*num_batches_tracked", name)
    }
    _absorb_biases(tensors)
    tensors["backbone.conv1.weight"] = _on_rgb(first.float(), theirs)
    model = _config(tensors)
    num_classes = len(tensors["head.cls_score.bias"]) // len(tensors["head.objectness.bias"])
    data = Data(
        root="datasets/coco",
        source="coco",
        train_split="train2017",
        test_split="val2017",
        classes=(),
        image_size=1333,
        short_side=800,
    )
    experiment = Experiment(name="yolof", model=model, data=data)
    return {
        "form": "training",
        "experiment": dataclasses.asdict(experiment),
        "classes": list(_class_names(meta, num_classes)),
        "model": tensors,
        "epoch": 0,
    }


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _absorb_biases(tensors: dict[str, Tensor]) -> None:
    """Remove the biases in front of norms, which ours do not have: in place, the same function."""
    for name in [name for name in tensors if _WITHOUT_BIAS.fullmatch(name)]:
        match = _WITHOUT_BIAS.fullmatch(name)
        assert match is not None
        norm = f"{match[1]}.{int(match[2]) + 1}"
        # The norms' own biases match the pattern too.
        if f"{match[1]}.{match[2]}.running_mean" not in tensors:
            tensors[f"{norm}.running_mean"] = tensors[f"{norm}.running_mean"] - tensors.pop(name)


def _on_rgb(weight: Tensor, theirs: Mapping[str, Tensor]) -> Tensor:
    """Return the first conv (64, 3, 7, 7) for RGB in units of ImageNet's standard deviation."""
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN) * 255
    std = torch.tensor(IMAGENET_DEFAULT_STD) * 255
    their_mean = theirs.get("pixel_mean", mean.flip(0)).float().flatten().flip(0)
    their_std = theirs.get("pixel_std", torch.ones(3)).float().flatten().flip(0)
    if not torch.allclose(their_mean, mean, atol=0.01):
        raise ValueError(
            f"this YOLOF subtracts {their_mean.tolist()} from RGB; only ImageNet's mean is known"
        )
    return weight.flip(1) * (std / their_std).reshape(1, 3, 1, 1)


def _check_style(meta: Mapping[str, Any]) -> None:
    config = str(meta.get("config", meta.get("cfg", "")))
    if config and not re.search(r"style\s*=\s*['\"]caffe['\"]", config):
        raise ValueError(
            "this YOLOF's ResNet is not of Caffe's kind (its configuration has no style='caffe'), "
            "and no other is known"
        )


def _config(tensors: Mapping[str, Tensor]) -> Model:
    anchors = len(tensors["head.objectness.bias"])
    blocks = _count(tensors, r"backbone\.layer3\.\d+\.conv1\.weight")
    dilated = _count(tensors, r"encoder\.blocks\.\d+\.conv1\.0\.weight")
    plain = tensors["backbone.layer1.0.conv2.weight"].shape == (64, 64, 3, 3)
    if blocks not in _BLOCKS or anchors not in _FEATURES or dilated != 4 or not plain:
        raise ValueError(
            f"this YOLOF has {blocks} blocks in its third stage, {anchors} anchors in a cell and "
            f"{dilated} dilated blocks; only ResNet-50 and -101 on C5 and DC5 are known"
        )
    return Model(
        backbone=_BLOCKS[blocks],
        weights="random",
        freeze_norms=True,
        freeze_stages=2,
        encoder_channels=len(tensors["encoder.lateral_conv.weight"]),
        encoder_mid_channels=len(tensors["encoder.blocks.0.conv1.0.weight"]),
        cls_convs=_count(tensors, r"head\.cls_tower\.\d+\.running_mean"),
        reg_convs=_count(tensors, r"head\.reg_tower\.\d+\.running_mean"),
        **_FEATURES[anchors],
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in tensors)


def _class_names(meta: Any, number: int) -> tuple[str, ...]:
    found: Any = None
    if isinstance(meta, Mapping):
        nested = meta.get("dataset_meta")
        found = meta.get("CLASSES", nested.get("classes") if isinstance(nested, Mapping) else None)
    if isinstance(found, (list, tuple)) and len(found) == number:
        return tuple(map(str, found))
    return COCO_CLASSES if number == 80 else tuple(f"class {i}" for i in range(number))
