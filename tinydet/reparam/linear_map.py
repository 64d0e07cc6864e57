"""The kernel of a linear subgraph, computed from the kernels of its operations.

Every value in such a subgraph is a convolution of the subgraph's source. The kernel of a
convolution of it, or of a scale, sum or concatenation of such values, follows from their kernels.
So the recorded operations are enough; the subgraph is not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tinydet.reparam.affine import each_axis
from tinydet.reparam.dataflow import SIZE_ONLY, Op, Value, View, storage_of
from tinydet.reparam.equivalent_layer import (
    NO_TAP,
    keeps_groups_apart,
    mixtures,
    random_like,
    seeded,
)
from tinydet.reparam.geometry import Geometry, NotAConvolutionError, as_geometry
from tinydet.reparam.kernel import Kernel, NotSupportedError, Numbers, added, concatenated
from tinydet.reparam.verify import tensors_in


@dataclass(frozen=True)
class _Stack:
    """Values along a new axis."""

    axis: int
    kernels: tuple[Kernel, ...]


@dataclass
class LinearMap:
    """A linear subgraph, as recorded.

    Attributes:
        ops: the operations of the forward pass that contains it, in order.
        data: values that depend on the input of that pass.
        source: the subgraph's input, (B, C, *spatial) or (..., C).
        out: its output.
        axes: the number of spatial axes, 0 for (..., C).
        weights: the parameters and buffers; whether they take both signs, by their memory.
    """

    ops: list[Op]
    data: Set[Value]
    source: View
    out: View
    axes: int
    weights: dict[int, bool] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """The number of input channels."""
        return self.source.shape[1 if self.axes else -1]

    @torch.no_grad()
    def geometry(self, groups: Sequence[int]) -> Geometry:
        """Return the shape of the equivalent layer, for any values of the weights.

        Args:
            groups: numbers of groups to try, the highest first.

        Raises:
            NotAConvolutionError: it is no convolution, or none that torch's layers can describe.
            NotSupportedError: there is no rule for one of the operations.
        """
        random, made = seeded(0), dict[View, Tensor]()

        def generic(view: View, tensor: Tensor) -> Tensor:
            signed = self.weights.get(view.storage)
            if signed is None or not tensor.is_floating_point():
                return tensor
            if view not in made:
                made[view] = random_like(tensor, signed, random)
            return made[view]

        # Two random mixtures of the channels are enough to see every tap and the groups.
        mixed = mixtures(self.channels, groups[0])
        kernel = self._kernel(Kernel.of_source(mixed.T, 1, self.axes), generic)
        if not kernel.weight.isfinite().all():
            raise NotSupportedError("weights of restricted range")
        if kernel.flaw:
            raise NotAConvolutionError(kernel.flaw)
        responses = kernel.weight.transpose(0, 1)  # (2, C_out, *taps)
        count = next((g for g in groups if keeps_groups_apart(responses, groups[0], g)), 1)
        present = (responses[0].abs() > NO_TAP * responses.abs().max()).any(0).nonzero()
        axes = zip(kernel.first, kernel.spacing, present.T.tolist(), strict=True)
        offsets = [sorted({first + d * t for t in taps}) for first, d, taps in axes]
        if not len(present):
            raise NotAConvolutionError("its output does not depend on its input")
        bias = bool(kernel.bias.abs().max() > NO_TAP)
        found = as_geometry(offsets, kernel.stride, self.channels, len(kernel.bias), bias)
        axes = zip(found.padding, found.dilation, found.kernel_size, strict=True)
        if kernel.slack != tuple(2 * p - d * (k - 1) - 1 for p, d, k in axes):
            raise NotAConvolutionError("it pads or crops its input's sides differently")
        return replace(found, groups=count)

    @torch.no_grad()
    def weight_and_bias(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias of the equivalent layer, of shape `geometry`."""
        one = torch.ones(self.channels, 1, dtype=torch.float64)
        start = Kernel.of_source(one, self.channels, self.axes)
        kernel = self._kernel(start, lambda _, tensor: tensor)
        return kernel.as_layer_weight(geometry), kernel.bias

    def _kernel(self, start: Kernel, leaf: Callable[[View, Tensor], Tensor]) -> Kernel:
        """Return the kernel of the output.

        Args:
            start: the kernel of the source.
            leaf: the tensor to use for one that no operation computes.
        """
        needed: set[Value] = {self.out.value}
        ops: list[Op] = []
        for op in reversed(self.ops):
            if op.name == "aten._local_scalar_dense":
                raise NotSupportedError(op.name)
            made = needed if op.is_view else needed - {self.source.value}
            if any(view.value in made for view in op.outputs):
                ops.append(op)
                if op.name not in SIZE_ONLY:
                    needed |= {view.value for view in op.inputs}
        written = {view.storage for op in self.ops if op.mutates for view in op.outputs}
        known: dict[View, Any] = {self.source: start}
        leaves: set[int] = set()
        for op in reversed(ops):
            if op.is_view and op.inputs[0].value == self.source.value and op.inputs[0] not in known:
                continue  # It leads to the source.
            tensors = [t for t in tensors_in((op.args, op.kwargs)) if t.numel()]
            views = {id(t): v for t, v in zip(tensors, op.inputs, strict=True)}

            def given(
                tensor: Tensor, op: Op = op, views: dict[int, View] = views
            ) -> Kernel | _Stack | Tensor:
                view = views.get(id(tensor))
                if view is None or view in known:
                    return tensor if view is None else known[view]
                if view.value in self.data or view.storage in written:
                    raise NotSupportedError(f"{op.name} on a part of a value")
                leaves.add(view.storage)
                return leaf(view, tensor)

            if op.name in SIZE_ONLY:
                results = op.func(*op.args, **op.kwargs)
            else:
                args, kwargs = _replaced(op.args, given), _replaced(op.kwargs, given)
                if not any(isinstance(known.get(v), (Kernel, _Stack)) for v in op.inputs):
                    if op.mutates and op.outputs[0].storage in leaves:
                        raise NotSupportedError(f"{op.name} on a weight")
                    results = op.func(*args, **kwargs)
                else:
                    with _disable_current_modes():  # Kernels are of float64 in any case.
                        results = self._apply(op, args, kwargs)
            if isinstance(results, Tensor | Kernel | _Stack):
                results = [results]
            results = [r for r in results if not isinstance(r, Tensor) or r.numel()]
            known.update(zip(op.outputs, results, strict=True))
        result = known.get(self.out)
        rows_moved = not self.axes and self.out.shape[:-1] != self.source.shape[:-1]
        if not isinstance(result, Kernel) or rows_moved:
            raise NotSupportedError("an output of another layout")
        return result

    def _apply(self, op: Op, args: Any, kwargs: Any) -> Kernel | _Stack | list[Kernel]:
        """Return the results of an operation on values that depend on the source."""
        name = op.name.removeprefix("aten.").removesuffix("_")
        shape = op.outputs[0].shape
        x = args[0]
        if name in ("cat", "stack"):
            return self._joined(name, x, _option(args, kwargs, 1, "dim", 0), len(shape))
        if name in ("sum", "mean") and isinstance(x, _Stack):
            return _reduced(name, x, args, kwargs, len(shape) + 1)
        if name in ("add", "sub", "rsub", "mul", "div"):
            if kwargs.keys() - {"alpha"}:
                raise NotSupportedError(op.name)
            a, b = (v if isinstance(v, Kernel) else self._vector(v, shape) for v in args[:2])
            if any(v.shape != shape for v in op.inputs if v.value in self.data):
                raise NotSupportedError(f"{op.name} of several sizes")
            return _arithmetic(name, a, b, kwargs.get("alpha", 1))
        if name == "addmm" and not self.axes and isinstance(args[1], Kernel):
            shift, x, matrix = args
            alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
            product = x.convolved(_constant(matrix).T * alpha, 1, ())
            return product.scaled(1.0, self._vector(shift, shape) * beta)
        if not isinstance(x, Kernel):
            raise NotSupportedError(op.name)
        if name in ("clone", "detach", "alias", "_to_copy"):
            return x
        if name in ("view", "_unsafe_view", "_reshape_alias"):
            before = op.inputs[0].shape
            if shape == before or (not self.axes and shape[-1] == before[-1]):
                return x
        elif name == "neg":
            return x.scaled(-1.0)
        elif name == "mm" and not self.axes:
            return x.convolved(_constant(args[1]).T, 1, ())
        elif name in ("native_batch_norm", "_native_batch_norm_legit_no_training"):
            if self.axes or len(shape) == 2:
                return _normalised(x, args)
        elif name == "constant_pad_nd":
            pads = [*args[1], *[0] * (2 * self.axes - len(args[1]))]
            if len(pads) == 2 * self.axes and _option(args, kwargs, 2, "value", 0) == 0:
                return x.padded(pads[-2::-2], pads[::-2])
        elif name == "convolution" and not args[6] and args[1].ndim == self.axes + 2:
            weight, bias, groups = _constant(args[1]), args[2], args[8]
            stride, pad, dilation = (each_axis(args[i], self.axes) for i in (3, 4, 5))
            made = x.padded(pad, pad).convolved(weight, groups, dilation).strided(stride)
            return made if bias is None else made.scaled(1.0, _constant(bias))
        elif name in ("avg_pool2d", "avg_pool3d") and self.axes == int(name[-2]):
            return _pooled(x, *args[1:])
        elif name in ("slice", "split", "split_with_sizes"):
            return self._cut(op, x, args, kwargs)
        raise NotSupportedError(op.name)

    def _channel_axis(self, ndim: int) -> int:
        return 1 if self.axes else ndim - 1

    def _vector(self, constant: Any, shape: tuple[int, ...]) -> Tensor:
        """Return the (C,) or (1,) values of a constant that is the same at all positions."""
        tensor = torch.as_tensor(_constant(constant), dtype=torch.float64)
        if tensor.ndim > len(shape):
            raise NotSupportedError("a constant of more axes")
        tensor = tensor.reshape(*[1] * (len(shape) - tensor.ndim), *tensor.shape)
        for axis in set(range(len(shape))) - {self._channel_axis(len(shape))}:
            first = tensor.narrow(axis, 0, 1)
            if tensor.shape[axis] > 1 and not bool((tensor == first).all()):
                raise NotSupportedError("a constant that varies over positions")
            tensor = first
        return tensor.flatten()

    def _joined(self, name: str, parts: Any, axis: int, ndim: int) -> Kernel | _Stack:
        if not all(isinstance(part, Kernel) for part in parts):
            raise NotSupportedError(f"aten.{name} with a constant")
        if name == "stack":
            return _Stack(axis % ndim, tuple(parts))
        if axis % ndim != self._channel_axis(ndim):
            raise NotSupportedError("aten.cat of positions")
        return concatenated(parts)

    def _cut(self, op: Op, x: Kernel, args: Any, kwargs: Any) -> Kernel | list[Kernel]:
        ndim, count = len(op.inputs[0].shape), len(x.weight)
        if op.name != "aten.slice":
            if _option(args, kwargs, 2, "dim", 0) % ndim != self._channel_axis(ndim):
                raise NotSupportedError(f"{op.name} of positions")
            sizes = args[1] if op.name == "aten.split_with_sizes" else [args[1]] * count
            ends = [min(sum(sizes[: i + 1]), count) for i in range(len(op.outputs))]
            return [x.channels(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        axis, start, end, step = (
            _option(args, kwargs, i, key, other)
            for i, key, other in ((1, "dim", 0), (2, "start", 0), (3, "end", None), (4, "step", 1))
        )
        if op.outputs[0] == op.inputs[0]:
            return x
        if axis % ndim == self._channel_axis(ndim):
            return x.channels(*slice(start, end, step).indices(count))
        spatial, start = axis % ndim - 2, start or 0
        open_end = end is None or end == torch.iinfo(torch.int64).max
        if not self.axes or spatial < 0 or start < 0 or not (open_end or end < 0):
            raise NotSupportedError(f"{op.name} at a fixed position")
        before, after, stride = [0] * self.axes, [0] * self.axes, [1] * self.axes
        before[spatial], after[spatial], stride[spatial] = -start, 0 if open_end else end, step
        return x.padded(before, after).strided(stride)


def _arithmetic(name: str, a: Any, b: Any, alpha: float) -> Kernel:
    """Return the result for kernels and vectors of constants, at least one of each is a kernel."""
    if name in ("mul", "div"):
        if name == "div" and isinstance(a, Kernel) and isinstance(b, Tensor):
            return a.scaled(1 / b)
        kernel, factor = (a, b) if isinstance(a, Kernel) else (b, a)
        if name == "div" or isinstance(factor, Kernel):
            raise NotSupportedError(f"aten.{name} of two values")
        return kernel.scaled(factor)  # type: ignore[no-any-return]
    if name == "rsub":
        a, b = b, a
    alpha = alpha if name == "add" else -alpha
    if isinstance(a, Kernel) and isinstance(b, Kernel):
        return added([a, b if alpha == 1 else b.scaled(alpha)])
    if isinstance(a, Kernel):
        return a.scaled(1.0, alpha * b)
    return b.scaled(alpha, a)  # type: ignore[no-any-return]


def _reduced(name: str, x: _Stack, args: Any, kwargs: Any, ndim: int) -> Kernel:
    axes = _option(args, kwargs, 1, "dim", ())
    if [axis % ndim for axis in axes or ()] != [x.axis] or _option(args, kwargs, 2, "keepdim", 0):
        raise NotSupportedError(f"aten.{name} over another axis")
    total = added(x.kernels)
    return total if name == "sum" else total.scaled(1 / len(x.kernels))


def _normalised(x: Kernel, args: Any) -> Kernel:
    weight, bias, mean, variance = (t if t is None else _constant(t) for t in args[1:5])
    if mean is None or variance is None or (len(args) == 8 and args[5]):
        raise NotSupportedError("statistics of the batch")
    scale = torch.rsqrt(variance.double() + args[-1])
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return x.scaled(scale, shift if bias is None else shift + bias)


def _pooled(
    x: Kernel,
    kernel: Numbers,
    stride: Numbers = (),
    padding: Numbers = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Kernel:
    axes = len(x.first)
    size, pad = each_axis(kernel, axes), each_axis(padding, axes)
    step = each_axis(stride, axes) if stride else size
    weight = x.weight.new_full((len(x.weight), 1, *size), 1 / (divisor or math.prod(size)))
    made = x.padded(pad, pad).convolved(weight, len(weight), [1] * axes).strided(step)
    # A window that starts in the input is used even if it ends outside of input and padding.
    if ceil_mode and any(s > 1 and k - p > 1 for k, s, p in zip(size, step, pad, strict=True)):
        return replace(made, flaw="its pool has more windows for some input sizes (ceil_mode)")
    if any(pad) and not count_include_pad and not divisor:
        return replace(made, flaw="its pool averages fewer pixels at the borders")
    return made


def _constant(value: Any) -> Any:
    if isinstance(value, (Kernel, _Stack)):
        raise NotSupportedError("a product of two values")
    return value


def _option(args: Any, kwargs: Any, index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _replaced(value: Any, given: Callable[[Tensor], Any]) -> Any:
    """Replace the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return given(value)
    if isinstance(value, dict):
        return {key: _replaced(item, given) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, given) for item in value)
    return value


def weights_of(module: nn.Module) -> dict[int, bool]:
    """Return the memory of a module's weights, and whether each is a parameter."""
    tensors: Iterable[tuple[Tensor, bool]] = (
        *((buffer, False) for buffer in module.buffers()),
        *((parameter, True) for parameter in module.parameters()),
    )
    return {storage_of(tensor): signed for tensor, signed in tensors if tensor.numel()}
