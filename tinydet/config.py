"""What an experiment is: groups of fields, each with a type, bounds, a default and a description.

An experiment file builds `experiment = Experiment(...)`; `tinydet.experiment_file` loads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tinydet import checked
from tinydet.checked import Checked, ConfigError, option

__all__ = ["VOC_CLASSES", "Augment", "ConfigError", "Data", "Experiment", "Model", "Optim", "Train"]

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class Model(Checked, path="model"):
    """The detector: YOLOF (arXiv 2103.09460) on one feature map of a timm backbone.

    `freeze_stages` counts feature maps as timm does: a ResNet's 1 is the stem, and 2 includes its
    first stage, as in the reference recipe on COCO. detectron2's `FREEZE_AT` counts alike;
    MMDetection's `frozen_stages=1` is 2 here. New activations, attention layers and branches
    have to be placed behind the frozen stages.
    """

    backbone: str = option(
        "rexnet_100", "timm model that supports `features_only=True` and images of any size"
    )
    weights: str = option(
        "imagenet",
        '"imagenet" (the installed weight package of the backbone, else timm\'s hub), "random", or '
        "a file: a state dict (.pth, .safetensors), or a detector's checkpoint to start from",
    )
    freeze_norms: bool = option(
        False, "freeze statistics, weights and biases of the backbone's batch norms"
    )
    freeze_stages: int = option(
        0,
        "freeze everything before the backbone's n-th feature map, norm statistics included; no "
        "gradient is computed there; 0 trains all",
        at_least=0,
        at_most=5,
    )
    activation: Literal["none", "acon-a", "acon-b", "acon-c", "meta-acon"] = option(
        "none", "activation function of `tinydet.layers` that replaces the backbone's own"
    )
    activation_where: str = option(
        "", 'patterns of the activations to replace, such as "blocks.4 blocks.5"; empty is all'
    )
    attention: Literal["none", "coord"] = option(
        "none", "attention layer of `tinydet.layers` added to the backbone"
    )
    attention_place: Literal["se", "block", "stage"] = option(
        "block",
        '"se" (replaces each squeeze-and-excitation or other channel attention), "block" (after '
        'each block) or "stage" (after each stage)',
    )
    attention_where: str = option("", "patterns of the places to change; empty is all")
    expand: Literal[
        "none", "repvgg", "qarepvgg", "acnet", "dbb", "orepa", "mobileone", "large-kernel"
    ] = option(
        "none",
        "block of `tinydet.reparam.expand`, whose branches are added to the backbone's convs for "
        "training, after its weights are loaded; folding removes them",
    )
    expand_where: str = option(
        "",
        'convs to expand, by kernel size, kind and name, such as "3x3 depthwise" or "blocks.4"; '
        "empty is every conv that the block supports",
    )
    expand_online: bool = option(
        False,
        "add the kernels of the branches to the convs' weights, with scales in place of norms, "
        "instead of running the branches beside the convs: a step takes little longer than without",
    )
    expand_scale: float = option(
        0.0,
        "weight of the branches' last norms at the start; 0 keeps the function, online any does",
        at_least=0,
    )
    feature: Literal["C5", "DC5", "C4", "P4"] = option(
        "C5",
        '"C5" (stride 32), "DC5" (last stage dilated to stride 16), "C4" (stride 16, without the '
        'last stage: cheap, good on small objects) or "P4" (C4 with C5 upsampled onto it)',
    )
    encoder_channels: int = option(
        512, "channels of the dilated encoder and of the head", at_least=1
    )
    encoder_mid_channels: int = option(
        128, "channels inside the encoder's residual blocks", at_least=1
    )
    dilations: tuple[int, ...] = option(
        (2, 4, 6, 8), "dilation of each of the encoder's residual blocks", at_least=1
    )
    cls_convs: int = option(2, "convs in the head's classification tower", at_least=0)
    reg_convs: int = option(4, "convs in the head's regression tower", at_least=0)
    anchor_scales: tuple[float, ...] = option(
        (1.0, 2.0, 4.0, 8.0, 16.0),
        "square anchors have sides of scale * stride pixels",
        above=0,
        rule=checked.NOT_EMPTY,
    )
    match_topk: int = option(
        4, "nearest predictions and nearest anchors taken as positives for each box", at_least=1
    )
    match_pos_ignore: float = option(
        0.15,
        "a match is ignored if the IoU of its anchor and its box is lower",
        at_least=0,
        at_most=1,
    )
    match_neg_ignore: float = option(
        0.7,
        "an unmatched prediction is ignored if its IoU with any box is higher",
        at_least=0,
        at_most=1,
    )
    center_clamp: float = option(
        32.0, "furthest distance in pixels of a prediction's centre from its anchor's", at_least=0
    )
    score_threshold: float = option(
        0.05, "detections with a lower score are dropped", at_least=0, at_most=1
    )
    nms_iou: float = option(
        0.6,
        "IoU above which the lower-scored detection of the same class is dropped",
        at_least=0,
        at_most=1,
    )
    candidates: int = option(
        1000, "best detections of all classes kept before non-maximum suppression", at_least=1
    )
    max_detections: int = option(100, "detections kept in an image", at_least=1)


@dataclass(frozen=True)
class Augment(Checked, path="data.augment"):
    """Random changes of a training image.

    An image is resized, flipped, pasted onto a canvas (shifted, cropped, padded) and recoloured;
    with `mosaic`, four such images share a canvas. Then `rotate`, `shear`, `translate` and `zoom`
    transform the canvas, and `mixup` blends it with another one.
    """

    color_jitter: float = option(
        0.0, "largest relative change of brightness, contrast and saturation; 0 is off", at_least=0
    )
    hue: float = option(
        0.0, "largest change of the hue (fraction of the colour circle)", at_least=0, at_most=0.5
    )
    scale: tuple[float, float] = option(
        (1.0, 1.0),
        "range of the factor, drawn in log space, by which an image is resized before it is "
        "cropped or padded; 1,1 is off",
        above=0,
        rule=checked.ASCENDING,
    )
    hflip: float = option(0.5, "probability of a left-right flip", at_least=0, at_most=1)
    vflip: float = option(0.0, "probability of an upside-down flip", at_least=0, at_most=1)
    shift: float = option(0.5, "probability of YOLOF's random shift", at_least=0, at_most=1)
    max_shift: int = option(32, "largest shift along each axis in pixels", at_least=0)
    multiscale: tuple[float, float] = option(
        (1.0, 1.0),
        "range of the factor that is drawn for each batch's image size, which is rounded to a "
        "multiple of 32; 1,1 is off",
        above=0,
        rule=checked.ASCENDING,
    )
    hsv: tuple[float, float, float] = option(
        (0.0, 0.0, 0.0),
        "largest change of the hue (fraction of the colour circle), and largest relative change of "
        "saturation and value; YOLO's are 0.015,0.7,0.4",
        at_least=0,
        at_most=1,
    )
    mosaic: float = option(
        0.0, "probability of a mosaic of four images, at half to full size", at_least=0, at_most=1
    )
    mixup: float = option(
        0.0,
        "probability of blending two pictures, with weights of 0.4 to 0.6, and all their objects",
        at_least=0,
        at_most=1,
    )
    rotate: float = option(
        0.0,
        "largest rotation in degrees; boxes enclose their rotated corners, and so get looser",
        at_least=0,
        at_most=180,
    )
    shear: float = option(0.0, "largest shear along each axis in degrees", at_least=0, at_most=60)
    translate: float = option(
        0.0, "largest translation, as a fraction of the picture's sides", at_least=0, at_most=1
    )
    zoom: tuple[float, float] = option(
        (1.0, 1.0),
        "range of the factor, drawn in log space, by which the finished picture is scaled about "
        "its centre; 1,1 is off",
        above=0,
        rule=checked.ASCENDING,
    )
    plain_epochs: int = option(
        0,
        "epochs at the end without mosaic, mixup, hsv, rotate, shear, translate and zoom, so that "
        "training ends on pictures like those evaluated",
        at_least=0,
    )
    min_visible: float = option(
        0.2,
        "a box cut at an edge is dropped if less than this fraction of its area, or less than a "
        "pixel of a side, is left",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True)
class Data(Checked, path="data"):
    """A data set's folder and how it is read.

    The layout is VOC's (`Annotations/ ImageSets/Main/ JPEGImages/`), COCO's
    (`annotations/instances_<split>.json`, images in `<split>/`) or YOLO's (`data.yaml`, labels).
    """

    root: str = option("datasets/VOCdevkit/VOC2007", "the data set's folder")
    source: Literal["voc07", "shapes", "folder", "coco", "yolo"] = option(
        "voc07",
        'layout and what to do if the folder is missing: VOC\'s ("voc07" offers the download, '
        '"shapes" renders the synthetic set, "folder" is an error), "coco" or "yolo"',
    )
    train_split: str = option(
        "trainval",
        "training split, as in `ImageSets/Main/<split>.txt`; COCO has train2017, YOLO train",
    )
    test_split: str = option("test", "split for evaluation")
    classes: tuple[str, ...] = option(
        VOC_CLASSES,
        "class names in label order; empty takes those of the annotations, sorted (COCO: in the "
        "order of the category ids, YOLO: in that of data.yaml)",
        rule=checked.DISTINCT,
    )
    image_size: int = option(512, "longer side of the network's input in pixels", at_least=32)
    keep_ratio: bool = option(
        True, "keep the aspect ratio and pad to a multiple of 32; false stretches to a square"
    )
    short_side: int = option(
        0,
        "with `keep_ratio`, largest length of the shorter side in pixels; 0 is no limit; usual on "
        "COCO: 800, with an `image_size` of 1333",
        at_least=0,
    )
    augment: Augment = field(
        default_factory=Augment, metadata={"description": "random changes of training images"}
    )
    workers: int = option(
        -1, "loader processes; -1 chooses by the number of CPU cores", at_least=-1
    )
    reduced_jpeg: bool = option(
        True,
        "decode large JPEG files (from 8/3 of the size that training needs) at 1/2, 1/4 or 1/8, "
        "several times faster; evaluation always decodes at full size",
    )
    cache_mb: int = option(
        0,
        "memory for decoded training images, in MB (2**20 bytes) for each training process, shared "
        "by its loader processes; 0 is off",
        at_least=0,
    )


@dataclass(frozen=True)
class Optim(Checked, path="optim"):
    """The optimizer and its schedule.

    Learning rate and warm-up are for `base_batch` images a step. Weights with two or more
    dimensions decay; norms, biases and other vectors do not (in YOLOF's original code biases do).
    """

    optimizer: Literal["sgd", "adamw"] = option("sgd", '"sgd" (with momentum) or "adamw"')
    lr: float = option(0.03, "peak learning rate", above=0)
    backbone_lr_factor: float = option(
        1 / 3, "the backbone's learning rate is `lr` times this", at_least=0
    )
    momentum: float = option(
        0.9, "SGD's momentum, or AdamW's first beta", at_least=0, at_most=0.9999
    )
    weight_decay: float = option(
        1e-4, "weight decay of weights with two or more dimensions", at_least=0
    )
    schedule: Literal["step", "cosine"] = option(
        "step", '"step" (times `gamma` at each of `milestones`) or "cosine" (to zero at the end)'
    )
    milestones: tuple[float, ...] = option(
        (8 / 12, 11 / 12),
        "fractions of the run after which the step schedule lowers the rate",
        at_least=0,
        at_most=1,
    )
    gamma: float = option(0.1, "factor at each milestone", at_least=0, at_most=1)
    warmup_iters: int = option(
        1500, "iterations of linear warm-up, from `warmup_factor * lr`", at_least=0
    )
    warmup_factor: float = option(
        0.00066667, "fraction of the learning rate at the first iteration", at_least=0, at_most=1
    )
    clip_norm: float = option(0.0, "largest norm of the gradient; 0 is off", at_least=0)
    base_batch: int = option(
        16, "total batch size for which `lr` and `warmup_iters` are given", at_least=1
    )
    scale_with_batch: bool = option(
        True, "scale `lr` by total batch / `base_batch`, and `warmup_iters` by its inverse"
    )


@dataclass(frozen=True)
class Train(Checked, path="train"):
    """The training run.

    `dtype="auto"` and `memory_format="auto"` time the choices on a CPU. On a GPU they are bfloat16,
    before NVIDIA's Ampere (compute capability 8.0) float16 with loss scaling, and channels_last; on
    Apple's GPUs float32 and contiguous. On a CPU depthwise convs stay in float32: their bfloat16
    backward pass is several times slower.
    """

    epochs: int = option(12, "passes over the training split", at_least=1)
    batch_size: int = option(16, "images per step and process", at_least=1)
    accumulate: int = option(
        1, "batches whose gradients make one optimizer step, as one large batch", at_least=1
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of the forward pass (autocast)"
    )
    memory_format: Literal["auto", "channels_last", "contiguous"] = option(
        "auto", "memory format of images and weights"
    )
    compile: bool = option(
        False,
        "torch.compile the network: about a minute at the start, then faster steps; needs a C++ "
        "compiler",
    )
    sync_norms: bool = option(
        False, "synchronize the statistics of batch norms between processes; GPUs only"
    )
    ema_decay: float = option(
        0.0,
        "decay of the moving average of the weights, which is evaluated and exported; 0 is off",
        at_least=0,
        at_most=0.999999,
    )
    eval_every: int = option(
        1, "epochs between evaluations; the last epoch is always evaluated", at_least=1
    )
    save_minutes: float = option(
        5.0,
        "minutes between writes of last.pt within an epoch, in addition to its end; 0 writes after "
        "every step",
        at_least=0,
    )
    keep_every: int = option(
        0, "epochs between checkpoints that are kept (epoch_0010.pt, ...); 0 keeps none", at_least=0
    )
    max_bad_steps: int = option(
        5,
        "stop after this many consecutive steps with a non-finite loss or gradient, each of which "
        "is skipped",
        at_least=1,
    )
    eval_batch_size: int = option(16, "images per step of evaluation", at_least=1)
    seed: int = option(
        0, "seed of initial weights, image order and augmentation", at_least=0, at_most=10**9
    )
    device: str = option(
        "auto", '"cpu", "cuda", "cuda:N", "mps" (Apple), or "auto": the first GPU, else the CPU'
    )


@dataclass(frozen=True)
class Experiment(Checked):
    """Everything that decides the outcome of a run."""

    name: str = option(
        "", "name of the folder runs/<name>/; empty takes the file's name", rule=checked.FOLDER_NAME
    )
    model: Model = field(default_factory=Model, metadata={"description": "the detector"})
    data: Data = field(
        default_factory=Data, metadata={"description": "the data set and its augmentation"}
    )
    optim: Optim = field(
        default_factory=Optim, metadata={"description": "the optimizer and its schedule"}
    )
    train: Train = field(
        default_factory=Train, metadata={"description": "length, batch size, precision, evaluation"}
    )
