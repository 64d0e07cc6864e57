"""YOLOF-R50-C5 as in the paper (arXiv 2103.09460), COCO 2017, "1x": 22500 steps of 64 images.

python tools/train.py experiments/yolof_r50_c5_coco.py

The reference also freezes the stem and the first stage, which is not done here.
"""

from tinydet.config import Data, Experiment, Model, Optim, Train

experiment = Experiment(
    model=Model(backbone="resnet50.tv_in1k", freeze_norms=True),
    data=Data(
        root="datasets/coco",
        source="coco",
        train_split="train2017",
        test_split="val2017",
        classes=(),
        image_size=1333,
        short_side=800,
    ),
    optim=Optim(lr=0.12, base_batch=64),
    train=Train(epochs=12, batch_size=8),
)
