"""Several processes train one network together: torchrun starts them, torch's DDP keeps them alike.

Without torchrun everything here is that of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tinydet.config import ConfigError

T = TypeVar("T")

_STEPS_BETWEEN_QUESTIONS = 10


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, and leave them at the end; within another, nothing.

    Args:
        device: as `train.device` has it.

    Yields:
        The device of this process: with several GPUs, process n of a machine has its n-th.

    Raises:
        ConfigError: torchrun started more processes on a machine than it has GPUs, or one GPU is
            named for all of them.
    """
    if "WORLD_SIZE" not in os.environ or _joined():
        yield device
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = _own_gpu(device)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device if on_gpu else "cpu"
    finally:
        distributed.destroy_process_group()


def _own_gpu(device: str) -> str:
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device not in ("auto", "cuda") and processes > 1:
        raise ConfigError(
            f"train.device={device}: {processes} processes would share it; leave it at auto and "
            "choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if number >= gpus:
        raise ConfigError(f"{processes} processes on a machine that shows {gpus} GPUs: start fewer")
    return f"cuda:{number}" if device in ("auto", "cuda") else device


def rank() -> int:
    """Return this process's number among all, 0 where it is the only one."""
    return distributed.get_rank() if _joined() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _joined() else 1


def from_first(make: Callable[[], T]) -> T:
    """Return what the first process makes, in all of them; the others wait for it.

    An error of the first is raised in all.

    Args:
        make: a function without arguments, called in the first process alone.
    """
    if not _joined():
        return make()
    sent: list[Any] = [None, None]
    if rank() == 0:
        try:
            sent[0] = make()
        except Exception as error:
            sent[1] = error
    distributed.broadcast_object_list(sent)
    if sent[1] is not None:
        raise sent[1]
    return sent[0]


def gathered(part: Mapping[str, T]) -> dict[str, T]:
    """Return the entries of all processes together."""
    if not _joined():
        return dict(part)
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, dict(part))
    return {name: value for part in parts for name, value in part.items()}


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of a float tensor over all processes."""
    if _joined():
        values = values.clone()
        distributed.all_reduce(values)
        values /= world_size()
    return values


def in_any_process(flag: Tensor) -> Tensor:
    """Return a bool scalar that is True where it is in any process; the host waits for nothing."""
    if _joined():
        flag = flag.float()
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        flag = flag.bool()
    return flag


def all_agree(
    flags: Sequence[bool], device: torch.device, step: int = 0, stride: int = 1
) -> list[bool]:
    """Return which flags are set in any process: what all must do at the same step, or none.

    Asking makes the host wait for the device, so several processes ask at every tenth step only.

    Args:
        flags: what this process wants.
        device: of this process.
        step: steps done; at 0 all ask.
        stride: steps since this was called before: the first call at or after a tenth step asks.
    """
    if not _joined():
        return list(flags)
    if step % _STEPS_BETWEEN_QUESTIONS >= stride:
        return [False] * len(flags)
    asked = torch.tensor(flags, dtype=torch.float32, device=device)
    distributed.all_reduce(asked, distributed.ReduceOp.MAX)
    return asked.bool().tolist()


def alike(model: nn.Module) -> None:
    """Give the buffers of all processes (norms' statistics) the first one's values."""
    if _joined():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model wrapped so that gradients are averaged over the processes.

    Its weights become the first process's. A backbone may have stages whose maps nobody reads:
    torch learns in the first step which weights get no gradient (`static_graph`).
    """
    if not _joined():
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, static_graph=True)


def with_synced_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with batch norms whose statistics are those of all processes' images.

    timm's conversion: torch's own loses the activation of a `BatchNormAct2d`.

    Raises:
        ConfigError: on a CPU, for which torch has no such norm.
    """
    if device.type != "cuda":
        raise ConfigError(
            "train.sync_norms: torch's SyncBatchNorm runs on GPUs alone; leave it off on a CPU, or "
            "take model.freeze_norms"
        )
    return convert_sync_batchnorm(model)


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
