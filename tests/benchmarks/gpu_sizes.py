"""How much each part of the GPU benchmark does: on a GPU, and in small on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tinydet.config import Model


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts.

    Attributes:
        loss_steps: training steps compared with the CPU's.
        loss_batch: images in each.
        loss_pixels: side of these images.
        kill_epochs: epochs of the training that is killed.
        train_models: detectors whose training is timed, by name.
        train_dtypes: that they are trained in.
        train_batch: images in a batch.
        train_pixels: side of these images.
        train_steps: timed in each turn.
        train_turns: of the loop and the bare step.
        networks: timm's networks whose forward pass is timed.
        pixels: side of their input.
        detector: the detector whose forward pass, selection and ONNX file are timed.
        detector_pixels: side of its input.
        dtypes: of all forward passes.
        batches: batch sizes.
        runs: timed runs of each.
        compiled: networks that are also timed compiled, in the largest batch.
    """

    loss_steps: int = 50
    loss_batch: int = 8
    loss_pixels: int = 160
    kill_epochs: int = 12
    train_models: Mapping[str, Model] = field(
        default_factory=lambda: {
            "ResNet-18": Model(backbone="resnet18", weights="random"),
            "EfficientNet-Lite0": Model(backbone="efficientnet_lite0", weights="random"),
        }
    )
    train_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    train_batch: int = 32
    train_pixels: int = 512
    train_steps: int = 10
    train_turns: int = 2
    networks: tuple[str, ...] = ("repvgg_a0", "efficientnet_lite0")
    pixels: int = 224
    detector: Model = field(default_factory=lambda: Model(backbone="resnet50", weights="random"))
    detector_pixels: int = 640
    dtypes: tuple[str, ...] = ("float32", "float16")
    batches: tuple[int, ...] = (1, 32)
    runs: int = 20
    compiled: tuple[str, ...] = ("repvgg_a0",)


_TINY = Model(
    backbone="test_resnet",
    weights="random",
    encoder_channels=16,
    encoder_mid_channels=8,
    dilations=(2,),
    cls_convs=1,
    reg_convs=1,
)
SMALL = Sizes(
    loss_steps=3,
    loss_batch=2,
    loss_pixels=96,
    kill_epochs=4,
    train_models={"tiny": _TINY},
    train_dtypes=("float32", "bfloat16"),
    train_batch=2,
    train_pixels=96,
    train_steps=2,
    train_turns=1,
    networks=("test_resnet",),
    pixels=64,
    detector=_TINY,
    detector_pixels=64,
    dtypes=("float32", "bfloat16"),
    batches=(1, 2),
    runs=2,
    compiled=(),
)
