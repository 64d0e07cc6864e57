"""Example inputs of a network, and the variations of them on which it is compared when folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.verify import copied, map_tensors

ExampleInput = Tensor | tuple[Any, ...] | dict[str, Any]

# Sides of small inputs. Maps of stride 32 mostly have 2x2 cells at the first of them: with one
# cell, places could not be told from channels.
_SMALL_SIDES = (36, 64, 96, 128)
# Smaller and larger sizes, odd and even, not square; then those that networks with a fixed stride
# take. Each is a function of the number of the axis and its size.
_OTHER_SIZES: tuple[tuple[Callable[[int, int], int], ...], ...] = (
    (lambda axis, n: (n // 2 | 1) + 2 * axis, lambda _, n: n // 2),
    (lambda axis, n: max(n + 9, 45) + axis, lambda axis, n: n + 32 * (axis + 1)),
)


@dataclass(frozen=True)
class Example:
    """The arguments of one forward pass.

    Attributes:
        args: positional arguments; tensors may be nested in lists, tuples and dicts.
        kwargs: keyword arguments.
        positive: whether its variations have no negative floats.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    positive: bool = False

    def run(self, model: nn.Module, mode: AbstractContextManager[Any] | None = None) -> Any:
        """Run a network on a copy of the arguments, with the same random numbers each time.

        Args:
            model: the network.
            mode: a context for the network alone, not for the copying of the arguments.
        """
        args, kwargs = copied((self.args, self.kwargs))
        with torch.no_grad(), seeded(), mode or nullcontext():
            return model(*args, **kwargs)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Example:
        """Return the example with each tensor changed."""
        args, kwargs = map_tensors((self.args, self.kwargs), change)
        return Example(args, kwargs, self.positive)

    def random(self) -> Example:
        """Return random values of the same shapes, in float64 where the example has floats.

        Integers (other than images in uint8) and booleans are kept: they may be indices or masks.
        """
        generator = torch.Generator().manual_seed(0)

        def random(x: Tensor) -> Tensor:
            if x.is_floating_point():
                numbers = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                return numbers.abs_() if self.positive else numbers
            if x.dtype == torch.uint8:
                return torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
            return x.detach().cpu().clone()

        return self.mapped(random)

    def in_float64(self) -> Example:
        """Return the example on the CPU, with floats in float64."""

        def exact(x: Tensor) -> Tensor:
            return x.detach().cpu().double() if x.is_floating_point() else x.cpu()

        return self.mapped(exact)

    def resized(self, resize: Callable[[int, int], int], more_images: int = 0) -> Example:
        """Return random inputs of other spatial sizes, where the example has images or maps.

        Batches are (B, C, *spatial); inside lists, tuples and dicts, images are (C, H, W).

        Args:
            resize: new size from the number of a spatial axis and its size.
            more_images: added to the length of batches.
        """

        def other(x: Any, nested: bool) -> Any:
            if isinstance(x, (list, tuple, dict)):
                items = x.items() if isinstance(x, dict) else enumerate(x)
                new = {key: other(item, True) for key, item in items}
                if isinstance(x, dict):
                    return new
                return type(x)(*new.values()) if hasattr(x, "_fields") else type(x)(new.values())
            if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
                return x
            first = 1 if nested and x.ndim == 3 else 2
            if x.ndim <= first:
                return x
            spatial = [max(1, resize(i, n)) for i, n in enumerate(x.shape[first:])]
            batch = [x.shape[0] + more_images] if first == 2 else []
            return x.new_empty(*batch, *x.shape[first - 1 : first], *spatial)

        args = tuple(other(x, False) for x in self.args)
        kwargs = {key: other(x, False) for key, x in self.kwargs.items()}
        return Example(args, kwargs, self.positive).random()

    def smaller(self) -> Iterator[Example]:
        """Yield random inputs of fewer positions, the smallest first."""
        for side in _SMALL_SIDES:
            small = self.resized(lambda _, n, side=side: min(n, side))  # type: ignore[misc]
            if small.shapes() == self.shapes():
                return
            yield small

    def of_other_sizes(self) -> list[list[Example]]:
        """Return random inputs of smaller, then of larger sizes; of each the first that fits.

        The smaller ones have one more image.
        """
        return [
            [self.resized(resize, more_images=1 - number) for resize in sizes]
            for number, sizes in enumerate(_OTHER_SIZES)
        ]

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of each tensor."""
        found: list[tuple[int, ...]] = []
        self.mapped(lambda x: found.append(tuple(x.shape)) or x)  # type: ignore[func-returns-value]
        return found


@contextmanager
def seeded() -> Iterator[None]:
    """Draw the same random numbers each time, and leave the caller's generators as they are."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` resets those of all GPUs.
        if devices:
            torch.cuda.manual_seed(0)
        yield


def as_examples(given: ExampleInput | list[ExampleInput]) -> list[Example]:
    """Return the examples that a caller gave: one, or a list of them.

    Raises:
        ValueError: one of them is no tensor, tuple of arguments or dict of keyword arguments.
    """
    found = []
    for item in given if isinstance(given, list) else [given]:
        if isinstance(item, Tensor):
            found.append(Example((item,)))
        elif isinstance(item, tuple):
            found.append(Example(item))
        elif isinstance(item, dict) and all(isinstance(key, str) for key in item):
            found.append(Example((), item))
        else:
            raise ValueError(
                f"example_input: got {type(item).__name__}; give a tensor, a tuple of positional "
                "arguments, a dict of keyword arguments, or a list of these"
            )
    if not found:
        raise ValueError("example_input: the list is empty; give at least one example")
    return found
