"""PASCAL VOC 2007 on a CPU: EfficientNet-Lite0 at 256 pixels, its first two stages frozen.

python tools/train.py experiments/voc07_cpu.py --budget 20m

What was tried to find these settings is in experiments/README.md.
"""

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train

experiment = Experiment(
    model=Model(
        backbone="tf_efficientnet_lite0",
        freeze_stages=2,
        feature="P4",
        encoder_channels=256,
        encoder_mid_channels=64,
        cls_convs=1,
        reg_convs=2,
        nms_iou=0.45,
    ),
    data=Data(image_size=256, augment=Augment(hflip=0.5, shift=0.0), cache_mb=2000),
    optim=Optim(
        optimizer="adamw",
        lr=2e-3,
        backbone_lr_factor=0.5,
        weight_decay=0.05,
        schedule="cosine",
        warmup_iters=100,
        clip_norm=10.0,
    ),
    train=Train(epochs=11, batch_size=8, ema_decay=0.998, eval_every=11, eval_batch_size=64),
)
