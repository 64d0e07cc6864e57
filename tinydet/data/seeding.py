"""Random numbers that depend on their purpose, not on the process that draws them."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a generator seeded by the whole key, e.g. (seed, epoch, image index).

    The key is hashed: with sums like seed + epoch, runs of neighbouring seeds would share numbers.
    """
    return torch.Generator().manual_seed(_hashed(key))


def seed_globally(device: torch.device, *key: int | str) -> None:
    """Seed the global generators of the CPU and of `device` (used by dropout) by the whole key.

    Called before every step, so checkpoints need no state of these generators.
    """
    seed = _hashed(key)
    # torch.manual_seed looks for every kind of accelerator, and is a hundred times slower.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _hashed(key: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw a number from [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """Draw an integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
