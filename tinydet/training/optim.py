"""Optimiser, learning-rate schedule and the linear scaling rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tinydet.config import Optim


@dataclass(frozen=True)
class Schedule:
    """How long and how fast this run learns, after scaling.

    Attributes:
        iterations: optimiser steps of the whole run.
        lr: peak learning rate.
        warmup_iters: optimiser steps of warm-up.
        total_batch: images an optimiser step, over all processes.
        lines: what was scaled, one line each, to be shown.
    """

    iterations: int
    lr: float
    warmup_iters: int
    total_batch: int
    lines: tuple[str, ...]


def make_schedule(optim: Optim, total_batch: int, iterations: int) -> Schedule:
    """Scale rate and warm-up to the total batch by the linear rule (arXiv 1706.02677, section 2.1).

    Epochs fix the number of iterations, so that one is scaled by itself. Warm-up takes at most a
    third of the run: a short trial should reach its learning rate.
    """
    factor = total_batch / optim.base_batch if optim.scale_with_batch else 1.0
    lr = optim.lr * factor
    warmup = round(optim.warmup_iters / factor)
    lines = []
    if factor != 1:
        lines.append(
            f"linear rule: {total_batch} images a step instead of {optim.base_batch}, so "
            f"lr {optim.lr:g} -> {lr:g}, warm-up {optim.warmup_iters} -> {warmup} iterations "
            "(optim.scale_with_batch=false turns this off)"
        )
    if warmup > iterations // 3:
        lines.append(
            f"warm-up cut from {warmup} to {iterations // 3} iterations: the run has {iterations}"
        )
        warmup = iterations // 3
    return Schedule(iterations, lr, warmup, total_batch, tuple(lines))


def learning_rate_factor(optim: Optim, schedule: Schedule, iteration: int) -> float:
    """Return the fraction of the peak rate that optimiser step `iteration` (from 0) uses."""
    done = iteration / schedule.iterations
    if optim.schedule == "cosine":
        factor = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    else:
        factor = optim.gamma ** sum(done >= milestone for milestone in optim.milestones)
    if iteration < schedule.warmup_iters:
        risen = iteration / schedule.warmup_iters
        factor *= optim.warmup_factor + (1 - optim.warmup_factor) * risen
    return factor


def set_learning_rate(
    optimizer: Optimizer, optim: Optim, schedule: Schedule, iteration: int
) -> None:
    """Give every parameter group the rate of optimiser step `iteration` (from 0)."""
    factor = learning_rate_factor(optim, schedule, iteration)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def make_optimizer(model: nn.Module, optim: Optim, schedule: Schedule) -> Optimizer:
    """Return the optimiser, with the rate of the first step; see `set_learning_rate`.

    Norms, biases and per-channel scales (every parameter of one dimension) do not decay; the
    parameters of `model.backbone` learn at `optim.backbone_lr_factor` times the rate.
    """
    in_backbone = {id(p) for p in model.backbone.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in in_backbone, parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    param_groups = [
        {
            "params": parameters,
            "initial_lr": schedule.lr * (optim.backbone_lr_factor if backbone else 1.0),
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (backbone, decays), parameters in groups.items()
    ]
    if optim.optimizer == "adamw":
        optimizer = AdamW(param_groups, betas=(optim.momentum, 0.999), fused=True)
    else:
        optimizer = torch.optim.SGD(param_groups, momentum=optim.momentum, fused=True)
        # The fused optimiser would make these at its first step, and leave them uninitialised where
        # a non-finite gradient makes it skip that step; zeros give the same first step.
        for parameter in model.parameters():
            if parameter.requires_grad and optim.momentum:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    set_learning_rate(optimizer, optim, schedule, 0)
    return optimizer
