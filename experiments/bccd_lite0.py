"""BCCD blood cells: EfficientNet-Lite0, to compare ideas with in minutes on a CPU.

python tools/train.py experiments/bccd_lite0.py --seed 0

The images: github.com/Shenggan/BCCD_Dataset, its folder BCCD in datasets/. 22 epochs are about six
minutes of training on two CPU cores, and so are those of bccd_lite0_*.py, which have one idea more.
Only the last epoch is evaluated: nothing is chosen on the test split.
"""

from dataclasses import replace

from custom_voc import experiment as custom

experiment = replace(
    custom,
    data=replace(custom.data, root="datasets/BCCD", image_size=320),
    train=replace(custom.train, epochs=22, eval_every=22),
)
