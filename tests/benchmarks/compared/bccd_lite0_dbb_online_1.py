"""Diverse Branch Blocks inside the weights, with scales of 1 at the start; base: bccd_lite0.py."""

from dataclasses import replace

from tinydet.experiment_file import load_experiment

plain = load_experiment("experiments/bccd_lite0.py")
model = replace(
    plain.model, expand="dbb", expand_where="3x3 5x5", expand_online=True, expand_scale=1.0
)
experiment = replace(plain, name="", model=model)
