"""BCCD with RepVGG branches on 3x3 and 5x5 convs, in the training time of bccd_lite0.py.

python tools/train.py experiments/bccd_lite0_repvgg.py --seed 0
"""

from dataclasses import replace

from bccd_lite0 import experiment as plain

experiment = replace(
    plain,
    model=replace(plain.model, expand="repvgg", expand_where="3x3 5x5"),
    train=replace(plain.train, epochs=18, eval_every=18),
)
