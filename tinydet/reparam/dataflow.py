"""The data flow of a network, observed during one forward pass.

A dispatch mode records every operation, also those outside of any module such as `x + y`. So
"the only consumer of this tensor" is observed and not guessed from the order in which modules were
defined. A value is a piece of memory between two writes: views share it, and an in-place operation
reads one value and produces the next.

Not recorded: code that runs outside torch's dispatcher (`.numpy()`, a custom kernel), and code
paths that this input does not take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tinydet.reparam.dispatch import DispatchMode
from tinydet.reparam.examples import Example, seeded
from tinydet.reparam.verify import copied, tensors_in, tensors_returned

# These read only their input's size.
SIZE_ONLY = {
    f"aten.{name}"
    for name in ("empty_like", "zeros_like", "ones_like", "full_like",
                 "new_empty", "new_zeros", "new_ones", "new_full")
}  # fmt: skip

Value = tuple[int, int]
"""Address of a piece of memory, and how many times it has been written in place."""


@dataclass(frozen=True)
class View:
    """A tensor as an operation saw it: its value, and its layout in memory."""

    value: Value
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def storage(self) -> int:
        """The address of the memory."""
        return self.value[0]

    @property
    def repeats(self) -> bool:
        """Whether several of its elements share memory, as after `Tensor.expand`."""
        return any(n > 1 and s == 0 for n, s in zip(self.shape, self.stride, strict=True))


@dataclass(eq=False)
class Call:
    """One call of a leaf module.

    Attributes:
        name: the module's qualified name.
        module: the module.
        inputs: its tensor arguments.
        arguments: the number of its arguments, others than tensors included.
        outputs: the tensors it returned.
        ops: the operations run inside it.
    """

    name: str
    module: nn.Module
    inputs: tuple[View, ...]
    arguments: int
    outputs: tuple[View, ...] = ()
    ops: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        name: its name, like "aten.add".
        func: the function that was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        inputs: its tensor arguments, parameters included.
        outputs: the tensors it returned; an in-place operation returns its argument.
        is_view: it only returned its input's memory in another shape.
        mutates: it writes to one of its arguments.
        call: the call of a leaf module it ran in, None in the code of a container.
        scope: qualified name of the innermost module it ran in.
        in_autocast: it ran in a `torch.autocast` of the network's own code.
        label: the value of `Recorder.label` when it ran.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]
    is_view: bool
    mutates: bool
    call: Call | None
    scope: str
    in_autocast: bool = False
    label: Any = None

    def varying(self, data: Set[Value]) -> list[View]:
        """Return the inputs whose values are in `data`, such as those that depend on the input."""
        return [view for view in self.inputs if view.value in data]


@dataclass(eq=False)
class DataFlow:
    """One observed forward pass.

    Attributes:
        calls: calls of leaf modules, in order.
        ops: all operations, in order.
        inputs: the network's input tensors.
        outputs: the tensors the network returned.
        returned: the network's output itself.
    """

    calls: list[Call] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: tuple[View, ...] = ()
    outputs: tuple[View, ...] = ()
    returned: Any = None

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Return the calls of one module, in order."""
        return [call for call in self.calls if call.module is module]

    def readers(self, value: Value) -> list[Op]:
        """Return the operations that read or overwrite a value; creating a view is neither."""
        return self._tables.readers.get(value, [])

    def users(self, tensor: Tensor) -> list[Op]:
        """Return the operations that read or overwrite a tensor's memory at any time."""
        return self._tables.users.get(storage_of(tensor), [])

    def producer(self, value: Value) -> Op | None:
        """Return the operation that produced a value; None for inputs and parameters."""
        return self._tables.producers.get(value)

    def is_returned(self, value: Value) -> bool:
        """Return whether the network returns this value or a view of it."""
        return any(view.value == value for view in self.outputs)

    def depends_on_input(self, or_created: bool = False) -> set[Value]:
        """Return the values that are computed from the network's inputs, inputs included.

        Random numbers count as inputs, since no pass repeats those of another.

        Args:
            or_created: also those computed from tensors that the network creates, such as zeros.
        """
        return self._created_values if or_created else self._input_values

    @cached_property
    def _input_values(self) -> set[Value]:
        return self._computed_values(or_created=False)

    @cached_property
    def _created_values(self) -> set[Value]:
        return self._computed_values(or_created=True)

    def _computed_values(self, or_created: bool) -> set[Value]:
        found = {view.value for view in self.inputs}
        for op in self.ops:
            created = or_created and (not op.inputs or op.name in SIZE_ONLY)
            if created or torch.Tag.nondeterministic_seeded in op.func.tags:
                found.update(view.value for view in op.outputs)
            if op.name not in SIZE_ONLY and any(view.value in found for view in op.inputs):
                found.update(view.value for view in op.outputs)
        return found

    @cached_property
    def _tables(self) -> _Tables:
        tables = _Tables()
        for op in self.ops:
            if op.is_view:
                continue
            for value in {view.value for view in op.inputs}:
                tables.readers.setdefault(value, []).append(op)
            for storage in {view.storage for view in op.inputs}:
                tables.users.setdefault(storage, []).append(op)
            for view in op.outputs:
                tables.producers.setdefault(view.value, op)
        return tables


@dataclass
class _Tables:
    readers: dict[Value, list[Op]] = field(default_factory=dict)
    producers: dict[Value, Op] = field(default_factory=dict)
    users: dict[int, list[Op]] = field(default_factory=dict)


def named(ops: Iterable[Op]) -> dict[str, Op]:
    """Give each operation a unique name: what it does, the module whose code it is, a number."""
    found: dict[str, Op] = {}
    counts: Counter[str] = Counter()
    for op in ops:
        name = f"{op.name.removeprefix('aten.')} in {op.scope or 'the network'}"
        counts[name] += 1
        found[f"{name} ({counts[name]})"] = op
    return found


def storage_of(tensor: Tensor) -> int:
    """Return the address that identifies a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


def autocast_depth() -> int:
    """Return how many `torch.autocast` contexts of this thread are open, disabling ones included.

    torch only has a function that counts up, and one that counts down again.
    """
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


class Recorder(DispatchMode):
    """Records every operation in a `DataFlow`, with the module that it runs in.

    Attributes:
        flow: the operations so far.
        label: stored with each operation; set by the caller.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flow = DataFlow()
        self.label: Any = None
        self._scopes: list[str] = [""]
        self._call: Call | None = None
        self._autocast_depth = autocast_depth()
        self._writes: dict[int, int] = {}
        # Freed memory would be reused at the same address: keep all of it alive until the end.
        self._alive: dict[int, torch.UntypedStorage] = {}

    def views(self, value: Any) -> tuple[View, ...]:
        """Return the current views of the tensors in an argument or result."""
        return self._views(tensors_in(value))

    def _views(self, tensors: list[Tensor]) -> tuple[View, ...]:
        # Empty tensors have no memory and could not be told apart.
        return tuple(self._view(t) for t in tensors if t.numel() and t.layout == torch.strided)

    def _view(self, tensor: Tensor) -> View:
        memory = tensor.untyped_storage()
        storage = memory.data_ptr()
        self._alive[storage] = memory
        value = (storage, self._writes.get(storage, 0))
        return View(value, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and record it."""
        given = tensors_in((args, kwargs))
        inputs = self._views(given)
        result = func(*args, **kwargs)
        returned = tensors_in(result)
        mutates = func._schema.is_mutable  # torch has no public name for an operator's schema.
        for storage in _written(func, args, kwargs) if mutates else ():
            self._writes[storage] = self._writes.get(storage, 0) + 1
        outputs = self._views(returned)
        memory = {view.storage for view in inputs}
        aliases = bool(outputs) and all(view.storage in memory for view in outputs)
        op = Op(
            name=str(func.overloadpacket),
            func=func,
            args=args,
            kwargs=kwargs,
            inputs=inputs,
            outputs=outputs,
            is_view=aliases and not mutates,
            mutates=mutates,
            call=self._call,
            scope=self._scopes[-1],
            in_autocast=autocast_depth() > self._autocast_depth,
            label=self.label,
        )
        self.flow.ops.append(op)
        if self._call is not None:
            self._call.ops.append(op)
        return result

    def enter(self, name: str, module: nn.Module, leaf: bool, arguments: Any) -> None:
        """Record that a module starts to run."""
        self._scopes.append(name)
        # A module inside a leaf (the activation of a norm-and-activation layer) is part of it.
        if leaf and self._call is None:
            args, kwargs = arguments
            self._call = Call(name, module, self.views(arguments), len(args) + len(kwargs))
            self.flow.calls.append(self._call)

    def leave(self, module: nn.Module, output: Any) -> None:
        """Record that a module has returned."""
        self._scopes.pop()
        if self._call is not None and self._call.module is module:
            self._call.outputs = self.views(output)
            self._call = None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Return the memory that an operation writes in place."""
    written: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [t for t in tensors_in(given) if t.numel()]
    return {storage_of(t) for t in written}


def observe(
    model: nn.Module,
    inputs: Example | tuple[Any, ...],
    is_leaf: Callable[[nn.Module], bool],
) -> DataFlow:
    """Run a network once and record what each operation reads and produces.

    All intermediate tensors are kept until the end of the pass: use a small input.

    Args:
        model: the network; its hooks run as usual.
        inputs: an example, or positional arguments.
        is_leaf: whether a module with children counts as one unit; one without always does.
    """
    recorder = Recorder()
    example = inputs if isinstance(inputs, Example) else Example(inputs)
    args, kwargs = copied((example.args, example.kwargs))
    with torch.no_grad(), seeded(), calls_noted(model, recorder, is_leaf), recorder:
        recorder.flow.inputs = recorder.views((args, kwargs))
        recorder.flow.returned = model(*args, **kwargs)
        recorder.flow.outputs = recorder.views(tensors_returned(recorder.flow.returned))
    return recorder.flow


@contextmanager
def calls_noted(
    model: nn.Module, recorder: Recorder, is_leaf: Callable[[nn.Module], bool]
) -> Iterator[None]:
    """Let a recorder know which module is running, by hooks on all of them."""
    handles = []
    scripted: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            scripted[module] = name
            continue
        leaf = is_leaf(module) or next(module.children(), None) is None

        def before(
            module: nn.Module, args: Any, kwargs: Any, name: str = name, leaf: bool = leaf
        ) -> None:
            recorder.enter(name, module, leaf, (args, kwargs))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            del args
            recorder.leave(module, output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    def before_any(module: nn.Module, args: Any) -> None:
        if module in scripted:
            recorder.enter(scripted[module], module, True, (args, {}))

    def after_any(module: nn.Module, args: Any, output: Any) -> None:
        del args
        if module in scripted:
            recorder.leave(module, output)

    if scripted:  # TorchScript modules take no hooks of their own.
        handles.append(nn.modules.module.register_module_forward_pre_hook(before_any))
        handles.append(nn.modules.module.register_module_forward_hook(after_any))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
