"""Any folder in VOC layout; class names are read from its annotations.

python tools/train.py experiments/custom_voc.py --set data.root=FOLDER

The defaults suit a few hundred images on a CPU or any GPU: P4 at stride 16 and 640 pixels find
small objects, and frozen norms and stages make training both faster and better. If objects are
large, data.image_size=416 trains 2.4 times as many epochs in the same time.
"""

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train

experiment = Experiment(
    model=Model(
        backbone="tf_efficientnet_lite0",
        freeze_norms=True,
        freeze_stages=2,
        feature="P4",
        encoder_channels=256,
        encoder_mid_channels=64,
        cls_convs=1,
        reg_convs=2,
        match_topk=8,
    ),
    data=Data(
        root="datasets/custom",
        source="folder",
        classes=(),
        image_size=640,
        augment=Augment(
            color_jitter=0.2, scale=(0.75, 1.33), hflip=0.5, vflip=0.5, shift=0.5, max_shift=16
        ),
        cache_mb=1000,
    ),
    optim=Optim(
        optimizer="adamw",
        lr=2e-3,
        backbone_lr_factor=0.25,
        weight_decay=0.05,
        schedule="cosine",
        warmup_iters=50,
        clip_norm=10.0,
    ),
    train=Train(epochs=26, batch_size=8, ema_decay=0.998, eval_every=2),
)
