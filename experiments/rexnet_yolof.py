"""YOLOF on ReXNet-1.0, trained on PASCAL VOC 2007 trainval, evaluated on test.

python tools/train.py experiments/rexnet_yolof.py

The recipe is for a few thousand images and was found in small (experiments/README.md, PASCAL VOC
2007 on a CPU). The paper's is that of the COCO experiments and of the defaults.
"""

from tinydet.config import Augment, Data, Experiment, Model, Optim, Train

experiment = Experiment(
    model=Model(
        freeze_norms=True,
        feature="P4",
        encoder_channels=256,
        encoder_mid_channels=64,
        cls_convs=1,
        reg_convs=2,
        match_topk=8,
        nms_iou=0.45,
    ),
    data=Data(augment=Augment(color_jitter=0.3, scale=(0.7, 1.4), hflip=0.5, shift=0.5)),
    optim=Optim(
        optimizer="adamw",
        lr=2e-3,
        backbone_lr_factor=0.25,
        weight_decay=0.05,
        schedule="cosine",
        warmup_iters=100,
        clip_norm=10.0,
    ),
    train=Train(epochs=30, ema_decay=0.998, eval_every=5),
)
