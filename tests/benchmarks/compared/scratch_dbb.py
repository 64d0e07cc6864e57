"""An idea whose worth is an open question: Diverse Branch Blocks. See scratch.py."""

from dataclasses import replace

from scratch import experiment as base

experiment = replace(base, model=replace(base.model, expand="dbb", expand_where="3x3 5x5"))
