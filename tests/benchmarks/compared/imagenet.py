"""An idea that surely helps: weights from ImageNet. See scratch.py."""

from dataclasses import replace

from scratch import experiment as base

experiment = replace(base, model=replace(base.model, weights="imagenet"))
