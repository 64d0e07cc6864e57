"""Which operations are affine: y = A x + b with a fixed A and b.

Only what an operation does to values that depend on the network's input counts, not the module it
runs in. A weight computed from other weights is as constant as a stored one.

The tables name aten operations, as they are once torch has decomposed composite ones. Operations
missing here are never merged: the fold stays correct but removes less. tests/reparam/
test_aten_tables.py compares the names with those that torch runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch

from tinydet.reparam.dataflow import SIZE_ONLY, DataFlow, Op, Value, View

# Jointly linear in all their tensors.
_JOINT = {
    f"aten.{name}"
    for name in (
        "add", "add_", "sub", "sub_", "rsub", "neg", "cat", "stack", "clone", "copy_", "copy",
        "constant_pad_nd", "avg_pool2d", "avg_pool3d", "fill_", "zero_", "slice_scatter",
        "select_scatter", "index_select",
    )
}  # fmt: skip
# Linear in each tensor while the others are constant.
_EACH = {f"aten.{name}" for name in ("mul", "mul_", "mm", "bmm", "convolution")}
# Not those that pick single positions, such as `select` or `unfold`.
_VIEWS = {
    f"aten.{name}"
    for name in (
        "view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "squeeze",
        "unsqueeze", "expand", "slice", "split", "split_with_sizes", "alias", "detach",
    )
}  # fmt: skip
_SUMS = {"aten.add", "aten.add_", "aten.sub", "aten.sub_", "aten.rsub"}
_NUMERATOR = {"aten.div", "aten.div_"}
_BIASED_PRODUCTS = {"aten.addmm", "aten.baddbmm", "aten.addcmul", "aten.addcmul_"}
_CONV = "aten.convolution"
_PRODUCTS = {_CONV, "aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm"}


def is_product(op: Op) -> bool:
    """Return whether an operation is a convolution or a matrix product."""
    return op.name in _PRODUCTS


def is_layer(op: Op, data: Set[Value]) -> bool:
    """Return whether an operation is a product of an activation with constant weights."""
    return is_product(op) and len(op.varying(data)) == 1


def is_affine(op: Op, data: Set[Value]) -> bool:
    """Return whether an operation's result is an affine function of the values in `data`.

    No casts are, nor anything in a `torch.autocast` of the network's own code: what runs behind
    them would get another dtype.
    """
    if op.is_view:
        return op.name in _VIEWS
    if op.in_autocast:
        return False
    if op.name in _JOINT or op.name in SIZE_ONLY:
        return True
    if op.name == "aten._to_copy":
        return op.kwargs.get("dtype") in (None, op.args[0].dtype)
    varying = [view.value in data for view in op.inputs]
    if op.name in _EACH:
        return sum(varying) <= 1
    if op.name in _NUMERATOR:
        return not any(varying[1:]) and op.kwargs.get("rounding_mode") is None
    if op.name in _BIASED_PRODUCTS:
        return sum(varying[1:]) <= 1
    if op.name == "aten.native_batch_norm":
        return not any(varying[1:]) and op.args[5] is False
    return op.name == "aten._native_batch_norm_legit_no_training" and not any(varying[1:])


def sums_a_stack(op: Op, flow: DataFlow) -> bool:
    """Return whether an operation adds or averages the tensors that `torch.stack` joined."""
    return _stack_summed_by(op, flow) is not None


def _stack_summed_by(op: Op, flow: DataFlow) -> Op | None:
    if op.name not in ("aten.sum", "aten.mean") or op.kwargs or len(op.args) != 2:
        return None
    stack = flow.producer(op.inputs[0].value)
    if stack is None or stack.name != "aten.stack" or stack.outputs != op.inputs:
        return None
    ndim, axis = len(stack.outputs[0].shape), stack.args[1] if len(stack.args) > 1 else 0
    return stack if [a % ndim for a in op.args[1] or ()] == [axis % ndim] else None


def crops(ops: Iterable[Op], data: Set[Value], out: View) -> bool:
    """Return whether an operation reads a part of fixed size of a value.

    `x[:, :, :40]` is all of a small image but only a part of a large one, which no comparison on
    small inputs shows. Writing into such a part (a border) shows at any size.

    Args:
        ops: the operations, in order.
        data: values that depend on the input.
        out: the view that is returned; it counts as read.
    """
    cropped: set[View] = set()
    for op in ops:
        varying = op.varying(data)
        if op.is_view:
            if any(view in cropped for view in varying) or _ends_at_a_number(op):
                cropped.update(op.outputs)
        elif op.name not in SIZE_ONLY:
            written = op.inputs[0] if op.mutates else None
            if any(view in cropped and view != written for view in varying):
                return True
    return out in cropped


def _ends_at_a_number(op: Op) -> bool:
    if op.name in ("aten.split", "aten.split_with_sizes"):
        return (op.args[2] if len(op.args) > 2 else op.kwargs.get("dim", 0)) != 1
    if op.name != "aten.slice":
        return False
    axis, end = (op.args[i] if len(op.args) > i else None for i in (1, 3))
    return axis != 1 and end is not None and 0 <= end < torch.iinfo(torch.int64).max


def multiply_adds(ops: Iterable[Op]) -> int:
    """Return the multiply-adds of the convolutions and matrix products among operations.

    Products of two weights or of two activations (attention) count as well, also inside torch's
    fused attention kernels.
    """
    return sum(multiply_adds_of(op.name, op.args, op.outputs[0].shape) for op in ops if op.outputs)


def multiply_adds_of(name: str, args: Sequence[Any], shape: Sequence[int]) -> int:
    """Return the multiply-adds of one operation with a result of this shape."""
    if name.startswith("aten._scaled_dot_product"):
        query, key, value = args[:3]  # (..., N, D), (..., M, D), (..., M, E)
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        return int(pairs * (query.shape[-1] + value.shape[-1]))
    if name == "aten._native_multi_head_attention":
        x = args[0]  # (B, N, D): three projections, two products of them, one more
        return int(math.prod(x.shape) * (4 * x.shape[-1] + 2 * x.shape[-2]))
    if name == "aten.convolution":
        x, weight, transposed = args[0], args[1], bool(args[6])
        # Each output (of a transposed conv: each input) is multiplied by one kernel.
        return math.prod(x.shape if transposed else shape) * math.prod(weight.shape[1:])
    if name in _PRODUCTS:
        left = args[1] if name in ("aten.addmm", "aten.baddbmm") else args[0]
        return math.prod(shape) * int(left.shape[-1])
    return 0


def reach(op: Op) -> int:
    """Return how far an operation looks to any side, in steps of its input, padding included."""
    if op.name == "aten.convolution":
        weight, padding, dilation = op.args[1], op.args[4], op.args[5]
        kernel = weight.shape[2:]
        sizes = zip(kernel, *(each_axis(n, len(kernel)) for n in (padding, dilation)), strict=True)
        return max((d * (k - 1) + p for k, p, d in sizes), default=0)
    if op.name.startswith("aten.avg_pool"):
        return max(op.args[1]) + max(op.args[3] if len(op.args) > 3 else [0])
    if op.name == "aten.constant_pad_nd":
        return max(abs(p) for p in op.args[1])
    return 0


def each_axis(numbers: Sequence[int], axes: int) -> list[int]:
    """Return one number for each axis; torch accepts a single one for all of them."""
    return [*numbers] * (axes if len(numbers) == 1 else 1)


def stride(op: Op) -> int:
    """Return how many steps of its input one step of an operation's output is."""
    if op.name == "aten.convolution":
        return max(op.args[3], default=1)
    if op.name.startswith("aten.avg_pool"):
        return max(op.args[2] if len(op.args) > 2 and op.args[2] else op.args[1])
    return 1


def branch_sums(flow: DataFlow) -> list[Op]:
    """Return the additions (or subtractions) of parallel linear branches.

    Both sides are affine functions of the same value, at least one of them through a convolution
    or matrix product, and nothing else reads the intermediate values: one convolution could replace
    them.
    """
    order = {id(op): i for i, op in enumerate(flow.ops)}
    found: dict[int, Op] = {}
    # A position table that the network creates itself is a source like its input.
    for data in (flow.depends_on_input(), flow.depends_on_input(or_created=True)):
        for op in flow.ops:
            stack = _stack_summed_by(op, flow)
            joins = (op if op.name in _SUMS else None) if stack is None else stack
            if joins is not None and len(joins.varying(data)) > 1:
                between = _back_to_one_source(flow, joins, data, order)
                if any(is_layer(o, data) for o in between):
                    found[id(op)] = op
    return list(found.values())


def _back_to_one_source(
    flow: DataFlow, last: Op, data: Set[Value], order: dict[int, int]
) -> list[Op]:
    """Return the affine operations from a single source value to a result; empty if none."""
    inside: list[Op] = []
    frontier: set[Value] = set()
    op: Op | None = last
    while op is not None:
        varying = op.varying(data)
        # A value repeated along an axis, such as an attention bias, is not a convolution.
        affine = is_affine(op, data) or sums_a_stack(op, flow)
        if not affine or any(view.repeats for view in varying):
            return []
        inside.append(op)
        frontier |= {view.value for view in varying}
        if len(frontier) == 1:
            return [] if _differ_by_place(flow, inside, frontier, data) else inside
        # In this order all readers of a value have been met before it.
        made = {value: flow.producer(value) for value in frontier}
        latest = max(frontier, key=lambda value: order.get(id(made[value]), -1))
        readers = {id(reader) for reader in flow.readers(latest)}
        if flow.is_returned(latest) or not readers <= {id(o) for o in inside}:
            return []
        op = made[latest]
        frontier.remove(latest)
    return []


def _differ_by_place(
    flow: DataFlow, inside: list[Op], source: Set[Value], data: Set[Value]
) -> bool:
    """Whether branches of linear layers see different places, or treat places differently.

    Such as two classifiers of two tokens, or a linear layer over the tokens whose result is scaled
    by one number for each channel.
    """
    if any(op.name == _CONV for op in inside):
        return False
    seen = {view for op in inside for view in op.varying(data) if view.value in source}
    made = flow.producer(next(iter(source)))
    whole = made.outputs if made else [v for v in flow.inputs if v.value in source]
    axes = max((len(view.shape) for view in whole if view.value in source), default=0)
    if len({view.offset for view in seen}) > 1 and all(len(v.shape) < axes for v in seen):
        return True
    for op in inside:
        if is_product(op):
            continue
        # The channels of a linear layer are next to each other in memory.
        (view, *_), constants = op.varying(data), [v for v in op.inputs if v.value not in data]
        for constant in constants:
            shape = (1,) * (len(view.shape) - len(constant.shape)) + constant.shape
            sides = zip(shape, view.shape, view.stride, strict=False)
            if any(n == m > 1 and stride > 1 for n, m, stride in sides):
                return True
    return False
