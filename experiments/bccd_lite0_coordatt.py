"""BCCD with Coordinate Attention after each block, in the same training time as bccd_lite0.py.

python tools/train.py experiments/bccd_lite0_coordatt.py --seed 0
"""

from dataclasses import replace

from bccd_lite0 import experiment as plain

experiment = replace(
    plain,
    model=replace(plain.model, attention="coord"),
    train=replace(plain.train, epochs=21, eval_every=21),
)
