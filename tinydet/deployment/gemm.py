"""What a machine can compute at most: the speed of a large matrix product."""

from __future__ import annotations

import time

import torch

_SIDES = (256, 512, 1024, 2048, 4096, 8192)
_REPEATS = 5
_SECONDS = 0.02  # a product that takes this long is large enough


def gemm_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return the operations a second of the fastest of some products of two square matrices.

    Adding and multiplying are an operation each. The matrices grow until a product takes a while:
    a device that has no such unit would be busy with large ones for minutes.

    Args:
        device: where.
        dtype: of the matrices.

    Raises:
        RuntimeError: the device has no product of this type.
    """
    peak = 0.0
    for side in _SIDES:
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        seconds = min(_seconds(a, b) for _ in range(_REPEATS))
        peak = max(peak, 2 * side**3 / seconds)
        if seconds > _SECONDS:
            break
    return peak


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    product = a @ b
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - start
