"""YOLOF-R50-DC5 as in the paper (arXiv 2103.09460), COCO 2017: the last stage dilated to stride 16.

python tools/train.py experiments/yolof_r50_dc5_coco.py

Anchors have sides of 32 to 512 pixels as with C5, and 16; the encoder's receptive fields stay too.
The differences from the authors' code are those of yolof_r50_c5_coco.py.
"""

from dataclasses import replace

from yolof_r50_c5_coco import experiment as c5

experiment = replace(
    c5,
    model=replace(
        c5.model,
        feature="DC5",
        dilations=(4, 8, 12, 16),
        anchor_scales=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        match_topk=8,
        match_pos_ignore=0.1,
    ),
    optim=replace(c5.optim, lr=0.06, base_batch=32, warmup_iters=3000, warmup_factor=0.000334),
)
