"""Diverse Branch Blocks inside the weights; base: scratch.py."""

from dataclasses import replace

from scratch import experiment as plain

model = replace(plain.model, expand="dbb", expand_where="3x3 5x5", expand_online=True)
experiment = replace(plain, name="", model=model)
