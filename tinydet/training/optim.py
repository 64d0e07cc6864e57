"""Optimizer, learning-rate schedule and the linear scaling rule of the batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tinydet.config import Optim


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run, after scaling to its batch size.

    Attributes:
        iterations: optimizer steps of the whole run.
        lr: peak learning rate.
        warmup_iters: optimizer steps of warm-up.
        total_batch: images an optimizer step, over all processes.
        lines: what was scaled, one line each, for the user.
    """

    iterations: int
    lr: float
    warmup_iters: int
    total_batch: int
    lines: tuple[str, ...]


def make_schedule(optim: Optim, total_batch: int, iterations: int) -> Schedule:
    """Scale rate and warm-up to the total batch by the linear rule (arXiv 1706.02677, section 2.1).

    The number of iterations follows from the epochs. Warm-up takes at most a third of the run, so
    that a short trial reaches its learning rate.
    """
    factor = total_batch / optim.base_batch if optim.scale_with_batch else 1.0
    lr = optim.lr * factor
    warmup = round(optim.warmup_iters / factor)
    lines = []
    shortened = min(warmup, iterations // 3)
    third = ", a third of the run" if shortened < warmup else ""
    if factor != 1:
        lines.append(
            f"linear scaling to {total_batch} images per step (from {optim.base_batch}): "
            f"lr {optim.lr:g} -> {lr:g}, warm-up {optim.warmup_iters} -> {shortened} iterations"
            f"{third} (turn off with optim.scale_with_batch=false)"
        )
    elif third:
        lines.append(f"warm-up {warmup} -> {shortened} iterations{third}")
    return Schedule(iterations, lr, shortened, total_batch, tuple(lines))


def learning_rate_factor(optim: Optim, schedule: Schedule, iteration: int) -> float:
    """Return the fraction of the peak rate that optimizer step `iteration` (from 0) uses."""
    done = iteration / schedule.iterations
    if optim.schedule == "cosine":
        factor = (1 + math.cos(math.pi * min(done, 1.0))) / 2
    elif optim.schedule == "step":
        factor = optim.gamma ** sum(done >= milestone for milestone in optim.milestones)
    else:
        raise ValueError(f"optim.schedule={optim.schedule}: not implemented")
    if iteration < schedule.warmup_iters:
        risen = iteration / schedule.warmup_iters
        factor *= optim.warmup_factor + (1 - optim.warmup_factor) * risen
    return factor


def set_learning_rate(
    optimizer: Optimizer, optim: Optim, schedule: Schedule, iteration: int
) -> None:
    """Give every parameter group the rate of optimizer step `iteration` (from 0)."""
    factor = learning_rate_factor(optim, schedule, iteration)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def make_optimizer(model: nn.Module, optim: Optim, schedule: Schedule) -> Optimizer:
    """Return the optimizer, with the rate of the first step; see `set_learning_rate`.

    Norms, biases and per-channel scales (all one-dimensional parameters) have no weight decay; the
    parameters of `model.backbone` have `optim.backbone_lr_factor` times the learning rate.
    """
    in_backbone = {id(p) for p in model.get_submodule("backbone").parameters()}
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
    optimizer: Optimizer
    if optim.optimizer == "adamw":
        optimizer = AdamW(param_groups, betas=(optim.momentum, 0.999), fused=True)
    else:
        optimizer = torch.optim.SGD(param_groups, momentum=optim.momentum, fused=True)
        # The fused optimizer would allocate these in its first step, and leave them uninitialized
        # where a non-finite gradient makes it skip that step; zeros give the same first step.
        for parameter in model.parameters():
            if parameter.requires_grad and optim.momentum:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    set_learning_rate(optimizer, optim, schedule, 0)
    return optimizer
