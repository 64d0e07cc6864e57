"""A detector of synthetic shapes, from ImageNet weights: trained in minutes on two CPU cores.

bash tools/quickstart.sh

Nothing is downloaded: the images are rendered, and the weights come with the installation.
"""

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train

experiment = Experiment(
    model=Model(
        backbone="tf_efficientnet_lite0",
        weights="imagenet",
        freeze_stages=3,
        feature="C4",
        encoder_channels=96,
        encoder_mid_channels=48,
        dilations=(1, 2, 3, 4),
        cls_convs=1,
        reg_convs=2,
        nms_iou=0.4,
    ),
    data=Data(
        root="datasets/shapes",
        source="shapes",
        classes=(),
        image_size=160,
        augment=Augment(hflip=0.5, vflip=0.5, shift=0.5, max_shift=16, scale=(0.8, 1.25)),
        cache_mb=100,
    ),
    optim=Optim(
        optimizer="adamw",
        lr=5e-3,
        backbone_lr_factor=1 / 3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_iters=100,
        clip_norm=10.0,
        base_batch=8,
    ),
    train=Train(epochs=6, batch_size=8, ema_decay=0.99, eval_every=3),
)
