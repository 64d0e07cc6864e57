"""BCCD with ACON-C for its activations, in the minutes of bccd_lite0.py.

python tools/train.py experiments/bccd_lite0_acon.py --seed 0
"""

from dataclasses import replace

from bccd_lite0 import experiment as plain

experiment = replace(
    plain,
    model=replace(plain.model, activation="acon-c"),
    train=replace(plain.train, epochs=9, eval_every=9),
)
