"""YOLOF on CSPDarknet-53 DC5, COCO 2017, "3x": the paper's fastest strong model (arXiv 2103.09460).

python tools/train.py experiments/yolof_cspdarknet53_dc5_coco.py

It has eight residual blocks, trainable and synchronized batch norms, and stretched square images of
many sizes. The values are those of the authors' code (github.com/chensnathan/YOLOF; their other
code, in cvpods, matches 8 instead of 4). In addition to yolof_r50_c5_coco.py, the authors' code
differs in:

- the backbone: Mish where timm has LeakyReLU, and weights trained with it; norms with an eps of
  1e-4 and a momentum of 0.03 (timm: 1e-5 and 0.1), whose statistics frozen stages update too;
- LeakyReLU (0.1) in encoder and head, here ReLU;
- each side of an image is cropped or padded by up to 30 % before stretching, here not;
- the size factor, 0.8 to 1.2, is drawn for each image, here for each batch in steps of 32 pixels;
- saturation and value are multiplied or divided by up to 1.5, here multiplied by 0.5 to 1.5;
- mosaic tiles meet anywhere but in the outer 20 %, here 25 %, and show images at their full size,
  here at half to full size;
- evaluation at 608 pixels, here as trained: tools/test.py ... --set data.image_size=608.

"9x": --set train.epochs=108 optim.milestones=0.92593,0.97531
"""

from dataclasses import replace

from yolof_r50_dc5_coco import experiment as dc5

from tinydet.config import Augment, Optim

experiment = replace(
    dc5,
    model=replace(
        dc5.model,
        backbone="cspdarknet53",
        freeze_norms=False,
        freeze_stages=3,
        dilations=(1, 2, 3, 4, 5, 6, 7, 8),
        match_topk=4,
    ),
    data=replace(
        dc5.data,
        image_size=640,
        keep_ratio=False,
        short_side=0,
        augment=Augment(hsv=(0.1, 0.5, 0.5), mosaic=0.5, multiscale=(0.8, 1.2)),
    ),
    optim=Optim(
        lr=0.04,
        base_batch=64,
        backbone_lr_factor=1.0,
        milestones=(52500 / 67500, 62500 / 67500),
    ),
    train=replace(dc5.train, epochs=36, sync_norms=True),
)
