"""BCCD with ACON-C activations, in the same training time as bccd_lite0.py.

python tools/train.py experiments/bccd_lite0_acon.py --seed 0
"""

from dataclasses import replace

from bccd_lite0 import experiment as plain

experiment = replace(
    plain,
    model=replace(plain.model, activation="acon-c"),
    train=replace(plain.train, epochs=9, eval_every=9),
)
