"""Several processes train one network: torchrun starts them, DistributedDataParallel syncs them.

In a single process every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tinydet.config import ConfigError

T = TypeVar("T")
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_STEPS_BETWEEN_SYNCS = 10


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started and leave them at the end; nested calls do nothing.

    Args:
        device: as in `train.device`.

    Yields:
        The device of this process: with several GPUs, local rank n gets the n-th.

    Raises:
        ConfigError: torchrun started more processes on a machine than it has GPUs, one GPU is
            named for all of them, or a device that has no means of communication.
    """
    if "WORLD_SIZE" not in os.environ or _is_initialized():
        yield device
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        device = _local_gpu(device)
        torch.cuda.set_device(device)
    elif device not in ("auto", "cpu"):
        raise ConfigError(
            f"train.device={device}: processes started by torchrun train on cpu or cuda; start "
            "tools/train.py itself"
        )
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device if on_gpu else "cpu"
    finally:
        distributed.destroy_process_group()


def _local_gpu(device: str) -> str:
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device not in ("auto", "cuda") and processes > 1:
        raise ConfigError(
            f"train.device={device}: {processes} processes would share it; leave it at auto and "
            "choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if local_rank >= gpus:
        raise ConfigError(
            f"{processes} processes on a machine with {gpus} visible GPUs: start fewer"
        )
    return f"cuda:{local_rank}" if device in ("auto", "cuda") else device


def rank() -> int:
    """Return the rank of this process, 0 in a single process."""
    return distributed.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if _is_initialized() else 1


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank.

    An exception raised on rank 0 is raised on every rank.
    """
    if not _is_initialized():
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


def all_gather_dict(part: Mapping[str, T]) -> dict[str, T]:
    """Return the union of the dicts of all ranks."""
    if not _is_initialized():
        return dict(part)
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, dict(part))
    return {name: value for part in parts for name, value in part.items()}


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean of a float tensor over all ranks."""
    if _is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
        values /= world_size()
    return values


def any_rank(flag: Tensor) -> Tensor:
    """Return a bool scalar that is True if it is True on any rank, without a host sync."""
    if _is_initialized():
        flag = flag.float()
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        flag = flag.bool()
    return flag


def any_rank_wants(
    flags: Sequence[bool], device: torch.device, step: int = 0, stride: int = 1
) -> list[bool]:
    """Return which flags are set on any rank, so that all ranks act at the same step.

    The host has to wait for the device, so several processes synchronize at every tenth step only;
    in between all flags are returned as False.

    Args:
        flags: of this rank.
        device: of this rank.
        step: steps done; at 0 the ranks synchronize.
        stride: steps since the last call. The first call at or after a tenth step synchronizes.
    """
    if not _is_initialized():
        return list(flags)
    if step % _STEPS_BETWEEN_SYNCS >= stride:
        return [False] * len(flags)
    wanted = torch.tensor(flags, dtype=torch.float32, device=device)
    distributed.all_reduce(wanted, distributed.ReduceOp.MAX)
    return wanted.bool().tolist()


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers (the norms' running statistics) of rank 0 to every rank."""
    if _is_initialized():
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model wrapped in DistributedDataParallel, which averages gradients over the ranks.

    `static_graph` is set since a backbone may have stages whose feature maps are not used: torch
    then finds out in the first step which parameters get no gradient.
    """
    if not _is_initialized():
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, static_graph=True)


def sync_batchnorm(model: ModuleT, device: torch.device) -> ModuleT:
    """Return the model with batch norms that compute their statistics over all ranks.

    With timm's conversion: torch's own drops the activation of a `BatchNormAct2d`.

    Raises:
        ConfigError: on a CPU, where torch has no synchronized batch norm.
    """
    if device.type != "cuda":
        raise ConfigError(
            "train.sync_norms: torch's SyncBatchNorm runs on GPUs only; turn it off on a CPU, or "
            "set model.freeze_norms"
        )
    return cast(ModuleT, convert_sync_batchnorm(model))


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
