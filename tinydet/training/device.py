"""Where a model runs, and what differs between devices.

CPUs, NVIDIA and AMD GPUs ("cuda"), and the GPUs of Apple's computers ("mps", without float64).
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from tinydet.config import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first GPU, else the CPU.

    Raises:
        ConfigError: no such device here, or none that TinyDet runs on.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("not a kind of device that TinyDet runs on")
        if device.type == "mps" and not has_mps:
            raise RuntimeError("this machine, or its PyTorch, has no Apple GPU")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name}: {reason}; use cpu, cuda, cuda:N or mps") from None
    return device


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()} (mps)"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all work queued on it; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def training_dtypes(device: torch.device) -> tuple[str, ...]:
    """Return the dtypes that a device trains in, on a GPU the usual one first.

    bfloat16 has the range of float32. float16 needs loss scaling, and so an optimizer that skips
    steps on the device: those on Apple's GPUs do not (torch 2.14). NVIDIA GPUs of a compute
    capability below 8.0 (before Ampere) only emulate bfloat16.
    """
    if device.type != "cuda":
        return ("float32", "bfloat16")
    if torch.cuda.get_device_capability(device)[0] < 8:
        return ("float16", "float32")
    return ("bfloat16", "float16", "float32")


def fast_memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format in which a device runs most convolutions fastest.

    On Apple's GPUs the backward pass of a channels_last convolution takes up to 30 times as long
    (github.com/pytorch/pytorch, number 193349).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last
