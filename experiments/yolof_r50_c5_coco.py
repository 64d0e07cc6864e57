"""YOLOF-R50-C5 as in the paper (arXiv 2103.09460), COCO 2017, "1x".

python tools/train.py experiments/yolof_r50_c5_coco.py

The values are those of the authors' code (github.com/chensnathan/YOLOF), which differs in: weights
(Caffe's ResNet-50, which strides in the 1x1 convs, on BGR pixels); weight decay of biases; 22500
steps of 64 images (here 12 epochs, 22179 steps); images without objects are left out; boxes are
kept however little of them is left after a shift; the area freed by a shift is black, and padding
has the mean colour (here both are grey).
"""

from tinydet.config import Data, Experiment, Model, Optim, Train

experiment = Experiment(
    model=Model(backbone="resnet50.tv_in1k", freeze_norms=True, freeze_stages=2),
    data=Data(
        root="datasets/coco",
        source="coco",
        train_split="train2017",
        test_split="val2017",
        classes=(),
        image_size=1333,
        short_side=800,
    ),
    optim=Optim(
        lr=0.12,
        base_batch=64,
        backbone_lr_factor=0.334,
        milestones=(15000 / 22500, 20000 / 22500),
    ),
    train=Train(epochs=12, batch_size=8),
)
