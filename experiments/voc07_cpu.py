"""PASCAL VOC 2007 on a CPU: EfficientNet-Lite0 at 256 pixels, its first two stages frozen.

python tools/train.py experiments/voc07_cpu.py --budget 20m

What was tried to find these settings is in experiments/README.md.
"""

from dataclasses import replace

from rexnet_yolof import experiment as plain

experiment = replace(
    plain,
    model=replace(plain.model, backbone="tf_efficientnet_lite0", freeze_stages=2),
    data=replace(plain.data, image_size=256, cache_mb=2000),
    train=replace(plain.train, epochs=15, batch_size=8, eval_every=15, eval_batch_size=64),
)
