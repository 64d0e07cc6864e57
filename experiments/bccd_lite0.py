"""BCCD blood cells with EfficientNet-Lite0: the baseline for comparisons in minutes on a CPU.

python tools/train.py experiments/bccd_lite0.py --seed 0

Put the folder BCCD of github.com/Shenggan/BCCD_Dataset into datasets/. 22 epochs take about six
minutes on two CPU cores, and so do the epochs of bccd_lite0_*.py, which have one modification each.
Only the last epoch is evaluated, so nothing is selected on the test split. All layers learn, as a
modification may be anywhere, and C4 with a narrow encoder keeps steps short.
"""

from dataclasses import replace

from custom_voc import experiment as custom

experiment = replace(
    custom,
    model=replace(
        custom.model,
        freeze_norms=False,
        freeze_stages=0,
        feature="C4",
        encoder_channels=128,
        match_topk=4,
    ),
    data=replace(custom.data, root="datasets/BCCD", image_size=320),
    optim=replace(custom.optim, backbone_lr_factor=0.5),
    train=replace(custom.train, epochs=22, eval_every=22),
)
