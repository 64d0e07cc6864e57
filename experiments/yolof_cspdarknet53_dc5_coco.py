"""YOLOF on CSPDarknet-53 DC5, COCO 2017: the paper's fastest strong model (arXiv 2103.09460).

python tools/train.py experiments/yolof_cspdarknet53_dc5_coco.py

Eight residual blocks, batch norms that learn, a range of image sizes. Two things of the reference
are not here: mosaic, and LeakyReLU in encoder and head (here ReLU). Its schedule is three times as
long again: --set train.epochs=108.
"""

from dataclasses import replace

from yolof_r50_dc5_coco import experiment as dc5

experiment = replace(
    dc5,
    model=replace(
        dc5.model,
        backbone="cspdarknet53",
        freeze_norms=False,
        dilations=(1, 2, 3, 4, 5, 6, 7, 8),
    ),
    data=replace(
        dc5.data,
        image_size=640,
        short_side=0,
        augment=replace(dc5.data.augment, color_jitter=0.4, hue=0.1, multiscale=(0.5, 1.5)),
    ),
    train=replace(dc5.train, epochs=36),
)
