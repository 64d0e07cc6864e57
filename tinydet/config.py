"""What an experiment is: frozen dataclasses with a unit and a default that trains for every field.

An experiment file builds `experiment = Experiment(...)`; `tinydet.experiment_file` loads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


class ConfigError(ValueError):
    """A field, value or experiment file is wrong; the message says which and what to do."""


@dataclass(frozen=True)
class Model:
    """The detector: YOLOF (arXiv 2103.09460) on one feature map of a timm backbone.

    Attributes:
        backbone: a timm model name that works with `features_only=True` and images of any size.
        weights: "imagenet" (the installed weight package for this backbone, else timm's hub),
            "random", or the path of a state-dict file or of a detector's checkpoint (.pth, .pt,
            .safetensors).
        freeze_norms: the backbone's batch norms keep their statistics, weights and biases, as in
            the reference recipe on COCO.
        freeze_stages: what runs before the backbone's n-th feature map (as timm counts its maps)
            keeps its weights, norms and their statistics, and no gradient is computed there; 0
            trains all. A ResNet's 1 is the stem and 2 its first stage too, as in the reference
            recipe on COCO: detectron2 numbers them alike (`FREEZE_AT`), MMDetection from the stem
            on (`frozen_stages=1`). Ideas have to name places behind them.
        activation: an activation function of `tinydet.layers` in place of the backbone's own.
        activation_where: the activations that change, by patterns of their names, such as
            "blocks.4 blocks.5"; empty is all.
        attention: an attention layer of `tinydet.layers` added to the backbone.
        attention_place: "se" (in place of each squeeze-and-excitation or other channel attention),
            "block" (after each block) or "stage" (after each stage).
        attention_where: the places that change, by patterns of their names; empty is all.
        expand: training-time branches that the backbone's convs grow once its weights are loaded,
            "none" or a block of `tinydet.reparam.expand`; folding takes them away again.
        expand_where: the convs that grow, by kernel size, kind and name, such as "3x3 depthwise" or
            "blocks.4" (see `tinydet.reparam.expand`); empty is every conv the block can grow on.
        feature: "C5" (stride 32), "DC5" (the last stage dilated to stride 16) or "C4" (stride 16;
            cheap, far better on small objects: the last stage is not even built).
        encoder_channels: channels of the dilated encoder and of the head.
        encoder_mid_channels: channels inside the encoder's residual blocks.
        dilations: one residual block for each entry, with that dilation.
        cls_convs: convs in the head's classification tower.
        reg_convs: convs in the head's regression tower.
        anchor_scales: square anchors have sides of `scale * stride` pixels.
        match_topk: nearest predictions and nearest anchors taken as positives for each box.
        match_pos_ignore: a match whose anchor's IoU with its box is below this is ignored.
        match_neg_ignore: an unmatched prediction whose IoU with any box is above this is ignored.
        center_clamp: a prediction's centre moves at most this many pixels from its anchor's.
        score_threshold: detections with a lower score are dropped.
        nms_iou: IoU above which the lower-scored detection of the same class is dropped.
        candidates: detections kept before non-maximum suppression, the best over all classes.
        max_detections: detections kept for an image.
    """

    backbone: str = "rexnet_100"
    weights: str = "imagenet"
    freeze_norms: bool = False
    freeze_stages: int = 0
    activation: Literal["none", "acon-a", "acon-b", "acon-c", "meta-acon"] = "none"
    activation_where: str = ""
    attention: Literal["none", "coord"] = "none"
    attention_place: Literal["se", "block", "stage"] = "block"
    attention_where: str = ""
    expand: Literal["none", "repvgg", "acnet", "dbb", "mobileone", "large-kernel"] = "none"
    expand_where: str = ""
    feature: Literal["C5", "DC5", "C4"] = "C5"
    encoder_channels: int = 512
    encoder_mid_channels: int = 128
    dilations: tuple[int, ...] = (2, 4, 6, 8)
    cls_convs: int = 2
    reg_convs: int = 4
    anchor_scales: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    match_topk: int = 4
    match_pos_ignore: float = 0.15
    match_neg_ignore: float = 0.7
    center_clamp: float = 32.0
    score_threshold: float = 0.05
    nms_iou: float = 0.6
    candidates: int = 1000
    max_detections: int = 100


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image.

    An image is resized, flipped, placed (shifted, cropped, padded) and recoloured; with `mosaic`
    four such images share a canvas. The canvas is warped by `rotate`, `shear`, `translate` and
    `zoom`, and with `mixup` blended with another made the same way. A box that is cut at an edge
    on the way is dropped once less than 20 % of its area, or of a side less than a pixel, is left.

    Attributes:
        color_jitter: brightness, contrast and saturation vary by up to this fraction; 0 is off.
        hue: the hue varies by up to this fraction of the colour circle, at most 0.5.
        scale: the image is resized by a factor drawn from this range (in log space), then cropped
            or padded to size; (1, 1) is off.
        hflip: probability of a left-right flip.
        vflip: probability of an upside-down flip.
        shift: probability of YOLOF's random shift.
        max_shift: furthest shift in pixels, along each axis.
        multiscale: each batch's image size is drawn from this range of factors and rounded to
            whole strides of 32; (1, 1) is off.
        hsv: the hue varies by up to the first fraction of the colour circle, saturation and value
            by up to the other two fractions of themselves; YOLO's are (0.015, 0.7, 0.4).
        mosaic: probability of four images side by side, at half to full size each, in place of one.
        mixup: probability that a picture is blended with another, in shares of 0.4 to 0.6, objects
            and all.
        rotate: largest rotation in degrees, either way. Boxes are those around the turned corners,
            and so looser the larger the angle.
        shear: largest shear in degrees, along each axis.
        translate: largest translation, as a fraction of the picture's sides.
        zoom: the picture is scaled about its middle by a factor drawn from this range (in log
            space), after all else has been placed; (1, 1) is off.
        plain_epochs: this many epochs at the end are without mosaic, mixup, warp and hsv, so that
            training ends on pictures such as are evaluated.
    """

    color_jitter: float = 0.0
    hue: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.5
    vflip: float = 0.0
    shift: float = 0.5
    max_shift: int = 32
    multiscale: tuple[float, float] = (1.0, 1.0)
    hsv: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mosaic: float = 0.0
    mixup: float = 0.0
    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    plain_epochs: int = 0


@dataclass(frozen=True)
class Data:
    """A data set's folder and how it is read.

    The layout is VOC's (`Annotations/ ImageSets/Main/ JPEGImages/`), or with `source="coco"` that
    of COCO (`annotations/instances_<split>.json` and the images in `<split>/`).

    Attributes:
        root: the folder.
        source: where the data comes from when the folder is not there: "voc07" offers the
            download, "shapes" renders the synthetic set, "folder" and "coco" are errors.
        train_split: name of the split trained on, as in `ImageSets/Main/<split>.txt`; COCO's are
            "train2017" and "val2017".
        test_split: name of the split evaluated on.
        classes: class names in label order; empty reads them from the annotations, sorted (COCO's:
            in the order of the category ids).
        image_size: longer side of the network's input in pixels.
        keep_ratio: keep the aspect ratio and pad to whole strides; False stretches to a square.
        short_side: with `keep_ratio`, the shorter side is at most this many pixels; 0 is no bound.
            800 beside an `image_size` of 1333 is the usual rule on COCO.
        augment: random changes of training images.
        workers: loader processes; -1 chooses from the machine's cores.
        reduced_jpeg: JPEG files much larger than training ever needs them (8/3 of it and more) are
            decoded at a half, quarter or eighth of their size, which is several times faster.
            Evaluation always decodes whole images.
        cache_mb: megabytes (2**20 bytes) of memory, of each training process and shared by its
            loader processes, for decoded training images; 0 is off.
    """

    root: str = "datasets/VOCdevkit/VOC2007"
    source: Literal["voc07", "shapes", "folder", "coco"] = "voc07"
    train_split: str = "trainval"
    test_split: str = "test"
    classes: tuple[str, ...] = VOC_CLASSES
    image_size: int = 512
    keep_ratio: bool = True
    short_side: int = 0
    augment: Augment = field(default_factory=Augment)
    workers: int = -1
    reduced_jpeg: bool = True
    cache_mb: int = 0


@dataclass(frozen=True)
class Optim:
    """The optimiser and its schedule; rates and iterations are for `base_batch` images a step.

    Attributes:
        optimizer: "sgd" (momentum) or "adamw".
        lr: peak learning rate.
        backbone_lr_factor: the backbone's learning rate is `lr` times this.
        momentum: SGD's momentum, or AdamW's first beta.
        weight_decay: of weights with two dimensions or more. Norms, biases and other vectors do not
            decay; in YOLOF's original code biases do.
        schedule: "step" (times `gamma` at `milestones`) or "cosine" (to zero at the end).
        milestones: fractions of the run at which the step schedule drops.
        gamma: factor of each drop.
        warmup_iters: iterations of linear warm-up from `warmup_factor * lr`.
        warmup_factor: fraction of the rate at the first iteration.
        clip_norm: largest norm of the gradient; 0 is off.
        base_batch: the total batch that `lr` and `warmup_iters` are stated for.
        scale_with_batch: scale `lr` by total batch / `base_batch`, `warmup_iters` by its inverse.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.03
    backbone_lr_factor: float = 1 / 3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (8 / 12, 11 / 12)
    gamma: float = 0.1
    warmup_iters: int = 1500
    warmup_factor: float = 0.00066667
    clip_norm: float = 0.0
    base_batch: int = 16
    scale_with_batch: bool = True


@dataclass(frozen=True)
class Train:
    """The training run.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step and process.
        accumulate: batches whose gradients are summed for one optimiser step.
        dtype: of the forward pass (autocast); "auto" times the choices on a CPU, and is float16
            with loss scaling on a GPU. On a CPU depthwise convs stay in float32: their bfloat16
            backward pass is several times slower.
        memory_format: "auto" times both on a CPU, and is channels_last on a GPU.
        compile: generate code for the network with torch.compile: about a minute at the start, then
            faster steps. Needs a C++ compiler.
        sync_norms: batch norms use the statistics of all processes' images; for GPUs alone.
        ema_decay: decay of the averaged weights, the ones evaluated and shipped; 0 is off.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        save_minutes: minutes between writes of last.pt within an epoch, beside the one at its end;
            0 writes after every step.
        keep_every: epochs between checkpoints that stay, `epoch_0010.pt` and so on; 0 keeps none.
        max_bad_steps: the run stops after this many steps in a row whose loss or gradient is NaN or
            infinite; each such step is skipped.
        eval_batch_size: images a step of evaluation.
        seed: seeds weights, order of images and augmentation.
        device: "auto" is the first GPU, else the CPU.
    """

    epochs: int = 12
    batch_size: int = 16
    accumulate: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    compile: bool = False
    sync_norms: bool = False
    ema_decay: float = 0.0
    eval_every: int = 1
    save_minutes: float = 5.0
    keep_every: int = 0
    max_bad_steps: int = 5
    eval_batch_size: int = 16
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the outcome of a run.

    Attributes:
        name: names the folder `runs/<name>/`; empty takes the experiment file's name.
        model: the detector.
        data: the data set and its augmentation.
        optim: the optimiser and its schedule.
        train: length, batch, precision, evaluation.
    """

    name: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
