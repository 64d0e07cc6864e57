"""Who feeds whom in a network, observed during one forward pass.

Every operation that reaches a tensor's memory is seen (a `TorchDispatchMode`), also those outside
any module such as `x + y`, so "the only consumer of this tensor" is a fact and not a guess from the
order in which modules were defined. Memory, not the Python object, identifies a tensor: views share
it, and an in-place operation is one more consumer of it.

Not seen: code that runs outside torch's dispatcher (`.numpy()`, a custom kernel), and branches that
this input does not take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinydet.reparam.verify import tensors_in


@dataclass(frozen=True)
class View:
    """A tensor as an operation saw it: which memory, and how it is laid over it."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class Call:
    """One call of a leaf module.

    Attributes:
        name: the module's qualified name.
        module: the module.
        inputs: its tensor arguments.
        outputs: the tensors it returned.
        ops: the operations run inside it.
    """

    name: str
    module: nn.Module
    inputs: tuple[View, ...]
    outputs: tuple[View, ...] = ()
    ops: list[Op] = field(default_factory=list)


@dataclass(eq=False)
class Op:
    """One operation.

    Attributes:
        name: its name, like "aten.add".
        inputs: tensors it was given, parameters included.
        outputs: tensors it returned; an in-place operation returns what it was given.
        is_view: it only returned its input's memory in another shape.
        call: the leaf module's call it ran in, None in the code of a container.
        scope: qualified name of the innermost module it ran in.
    """

    name: str
    inputs: tuple[View, ...]
    outputs: tuple[View, ...]
    is_view: bool
    call: Call | None
    scope: str


@dataclass(eq=False)
class DataFlow:
    """One observed forward pass.

    Attributes:
        calls: calls of leaf modules, in order.
        ops: all operations, in order.
        outputs: the tensors the network returned.
    """

    calls: list[Call] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    outputs: tuple[View, ...] = ()

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Return the calls of one module, in order."""
        return [call for call in self.calls if call.module is module]

    def readers(self, storage: int) -> list[Op]:
        """Return the operations that read or overwrite this memory; making a view is neither."""
        return [op for op in self._reads().get(storage, []) if not op.is_view]

    def producer(self, storage: int) -> Op | None:
        """Return the operation that made this memory; None for inputs and parameters."""
        for op in self.ops:
            if any(view.storage == storage for view in op.outputs):
                made = all(view.storage != storage for view in op.inputs)
                return op if made else None
        return None

    def is_returned(self, storage: int) -> bool:
        """Return whether the network returns this memory or a view of it."""
        return any(view.storage == storage for view in self.outputs)

    def _reads(self) -> dict[int, list[Op]]:
        if not hasattr(self, "_index"):
            self._index: dict[int, list[Op]] = {}
            for op in self.ops:
                for storage in {view.storage for view in op.inputs}:
                    self._index.setdefault(storage, []).append(op)
        return self._index


def storage_of(tensor: Tensor) -> int:
    """Return the address that identifies a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


def view_of(tensor: Tensor) -> View:
    """Return how a tensor lies over its memory."""
    return View(
        storage_of(tensor), tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    )


def _views(value: Any) -> tuple[View, ...]:
    # Empty tensors have no memory: they would all look like one.
    return tuple(view_of(t) for t in tensors_in(value) if t.numel() and t.layout == torch.strided)


class _Recorder(TorchDispatchMode):
    """Writes every operation into a `DataFlow`, under the module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = DataFlow()
        self.scopes: list[str] = [""]
        self.call: Call | None = None
        # Freed memory is given out again at the same address: hold all of it until the end.
        self.alive: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.alive += [t.detach() for t in tensors_in((args, kwargs, result))]
        inputs, outputs = _views((args, kwargs)), _views(result)
        memory = {view.storage for view in inputs}
        aliases = bool(outputs) and all(view.storage in memory for view in outputs)
        op = Op(
            name=str(func.overloadpacket),
            inputs=inputs,
            outputs=outputs,
            is_view=aliases and not func._schema.is_mutable,
            call=self.call,
            scope=self.scopes[-1],
        )
        self.flow.ops.append(op)
        if self.call is not None:
            self.call.ops.append(op)
        return result

    def enter(self, name: str, module: nn.Module, leaf: bool, arguments: Any) -> None:
        self.scopes.append(name)
        # A module inside a leaf (the activation of a norm-and-activation layer) is part of it.
        if leaf and self.call is None:
            self.call = Call(name, module, _views(arguments))
            self.flow.calls.append(self.call)

    def leave(self, module: nn.Module, output: Any) -> None:
        self.scopes.pop()
        if self.call is not None and self.call.module is module:
            self.call.outputs = _views(output)
            self.call = None


def observe(
    model: nn.Module, inputs: tuple[Any, ...], is_leaf: Callable[[nn.Module], bool]
) -> DataFlow:
    """Run a network once and record what each operation reads and makes.

    Memory of all intermediate tensors is held until the pass is over: use a small input.

    Args:
        model: the network; its hooks run as usual, its outputs are dropped.
        inputs: positional arguments.
        is_leaf: says of a module with children whether it counts as one unit; a module without
            children always does.
    """
    recorder = _Recorder()
    handles = []
    for name, module in model.named_modules():
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
    try:
        with torch.no_grad(), recorder:
            recorder.flow.outputs = _views(model(*inputs))
    finally:
        for handle in handles:
            handle.remove()
    return recorder.flow
