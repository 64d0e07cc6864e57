"""A torch.fx tracer for the code of one module, in one call.

Its children are leaves, input sizes stay free, and checks that raise stay in the graph.
"""

from __future__ import annotations

import dis
import inspect
import linecache
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tinydet.reparam.dataflow import autocast_depth
from tinydet.reparam.verify import copied


class NotTraceableError(ValueError):
    """A module's code cannot be traced; the message says why."""


def must_be(value: Any, expected: Any, what: str) -> None:
    """Raise ValueError unless a value is the one that the code was traced for."""
    if type(value) is not type(expected) or value != expected:
        found = type(value).__name__ if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{what} must be {expected!r}, as when it was folded, not {found}")


class _Proxy(fx.Proxy):
    """Records in-place operators as such, and knows the number of a tensor's axes."""

    tracer: Tracer

    def __getattr__(self, k: str) -> Any:
        if k == "shape":
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def __len__(self) -> int:
        return self.tracer.length(self)


def _in_place(name: str) -> Callable[[_Proxy, Any], Any]:
    def method(self: _Proxy, other: Any) -> Any:
        # Numbers and tuples have no in-place operators.
        changes = isinstance(self.tracer.example(self.node), (Tensor, list))
        function = getattr(operator, "i" + name if changes else name)
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("add", "sub", "mul", "truediv"):
    setattr(_Proxy, f"__i{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """Traces a module's code for one call.

    Attributes:
        inputs: the arguments of the call, one for each placeholder.
        modes: for each operation, whether it ran in inference mode, and with gradients.
    """

    proxy_buffer_attributes = True

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], unpack: bool) -> None:
        super().__init__()
        self.inputs: list[Any] = []
        self.modes: set[tuple[bool, bool]] = set()
        self._args, self._kwargs, self._unpack = args, kwargs, unpack
        self._autocast_depth = autocast_depth()
        self._values: dict[fx.Node, Any] = {}
        self._runs = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Trace no child's code."""
        del m, module_qualified_name
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node."""
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        """Make a placeholder of each argument, under its name in the code."""
        del is_module, concrete_args
        signature = inspect.signature(inspect.unwrap(root_fn))
        if next(iter(signature.parameters.values())).kind is inspect.Parameter.VAR_POSITIONAL:
            raise NotTraceableError("its code does not name its arguments")
        call = signature.bind(self.root, *self._args, **self._kwargs)
        given = set(call.arguments)
        call.apply_defaults()
        for name, value in list(call.arguments.items())[1:]:
            proxy = self.create_proxy("placeholder", name, (), {})
            self._values[proxy.node] = copied(value)
            self.inputs.append(value)
            several = signature.parameters[name].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            )
            call.arguments[name] = self._argument(proxy, value, name, name not in given, several)
        # Code that passes it on, as to a dropout, still switches between training and inference.
        training = self.create_proxy("get_attr", "training", (), {})
        self._values[training.node] = self.root.training
        self.root.__dict__["training"] = training
        self.modes.clear()
        return lambda: root_fn(*call.args, **call.kwargs), []

    def _argument(self, proxy: Any, value: Any, name: str, omitted: bool, several: bool) -> Any:
        """Return what stands for an argument in the code: a proxy, proxies, or a constant."""
        if isinstance(value, (tuple, list, dict)) and not hasattr(value, "_fields"):
            keys = list(value if isinstance(value, dict) else range(len(value)))
            if several or self._unpack or any(map(_is_constant, _leaves(value))):
                length = self.create_proxy("call_function", len, (proxy,), {})
                self._require(length, len(value), f"len({name})")
                items = {
                    k: self._argument(proxy[k], value[k], f"{name}[{k!r}]", omitted, False)
                    for k in keys
                }
                return type(value)(items if isinstance(value, dict) else items.values())
        if _is_constant(value) or (omitted and isinstance(value, (int, float))):
            self._require(proxy, value, name)
            return value
        return proxy

    def _require(self, proxy: Any, value: Any, what: str) -> None:
        self.create_proxy("call_function", must_be, (proxy, value, what), {})

    def example(self, node: fx.Node) -> Any:
        """Return a node's result for the arguments of the call."""
        interpreter = fx.Interpreter(self.root, garbage_collect_values=False, graph=self.graph)
        interpreter.env, self._runs = self._values, True
        try:
            with torch.no_grad():
                for earlier in self.graph.nodes:
                    if earlier not in self._values:
                        self._values[earlier] = interpreter.run_node(earlier)
        finally:
            self._runs = False
        return self._values[node]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run a child while `example` runs the graph; record its call otherwise."""
        return (
            forward(*args, **kwargs)
            if self._runs
            else super().call_module(m, forward, args, kwargs)
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read attributes as they are while `example` runs the graph."""
        return attr_val if self._runs else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node that knows the methods of the module that it comes from."""
        node = super().create_node(kind, *args, **kwargs)
        if autocast_depth() > self._autocast_depth:
            raise fx.proxy.TraceError("its code opens an autocast, which a graph does not record")
        if kind.startswith("call"):
            self.modes.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        methods: set[str] = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            first = next(iter(frame.f_code.co_varnames), "")
            if frame.f_locals.get(first) is self.root:
                methods.add(frame.f_code.co_name)
            frame = frame.f_back
        node.meta["methods"] = methods
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide conditions on the mode or the number of axes, and those that only guard a `raise`.

        The latter stay in the graph as they are.
        """
        if obj.node.target == "training":
            return bool(self._values[obj.node])
        wanted = _not_raising(sys._getframe(2))
        if wanted is None and _is_rank(obj.node):
            wanted = bool(self.example(obj.node))
            self._require(obj, wanted, "its number of axes: a condition on it")
        elif wanted is not None:
            check = obj if wanted else self.create_proxy("call_function", operator.not_, (obj,), {})
            frame = sys._getframe(2)
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            message = f"not as required: {line or frame.f_code.co_name}"
            self.create_proxy("call_function", torch._assert, (check, message), {})
        return bool(super().to_bool(obj)) if wanted is None else wanted

    def length(self, obj: fx.Proxy) -> int:
        """Return the number of a tensor's axes, or of the results of a module."""
        if not _has_fixed_length(obj.node) or isinstance(self.example(obj.node), Tensor):
            raise fx.proxy.TraceError("a length depends on the input's size")
        found = len(self.example(obj.node))
        self._require(self.create_proxy("call_function", len, (obj,), {}), found, "a length")
        return found

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Return an iterator over the parts of a value of fixed length."""
        if isinstance(self.example(obj.node), dict):
            raise fx.proxy.TraceError("it iterates over a dict")
        return iter([cast(Any, obj)[i] for i in range(self.length(obj))])


def _leaves(value: Any) -> list[Any]:
    return cast(list[Any], torch.utils._pytree.tree_leaves(value))


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str))


def _is_rank(node: fx.Node) -> bool:
    """Whether a node's value is computed from the numbers of axes of tensors alone."""
    if node.op == "call_method":
        return node.target in ("dim", "ndimension")
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if node.target is getattr:
        return bool(node.args[1] == "ndim")
    return getattr(node.target, "__module__", "") == "_operator" and all(
        map(_is_rank, node.all_input_nodes)
    )


def _has_fixed_length(node: fx.Node) -> bool:
    """Whether a node is a size, or a list of results, of an unchanging length."""
    if node.op == "call_function" and node.target is operator.getitem:
        return _has_fixed_length(cast(fx.Node, node.args[0]))
    size = (node.op == "call_method" and node.target == "size" and len(node.args) == 1) or (
        node.target is getattr and node.args[1] == "shape"
    )
    return bool(size) or node.op == "call_module"


def _not_raising(frame: FrameType) -> bool | None:
    """Return the value of the condition in a frame after which it does not raise at once.

    None if both or neither do.
    """
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname != "TO_BOOL"]
    at = next(n for n, i in enumerate(code) if i.offset >= frame.f_lasti)
    jump = code[at].opname.rpartition("_")
    if "POP_JUMP" not in jump[0] or jump[2] not in ("TRUE", "FALSE"):
        return None
    target = next(n for n, i in enumerate(code) if i.offset == code[at].argval)
    raises = [_raises(code[n:]) for n in (at + 1, target)]
    return None if raises[0] == raises[1] else (jump[2] == "TRUE") == raises[0]


def _raises(code: Iterable[dis.Instruction]) -> bool:
    """Whether code, run in sequence, raises before it branches, returns or stores anything."""
    for instruction in code:
        if instruction.opname == "RAISE_VARARGS":
            return True
        if any(word in instruction.opname for word in ("JUMP", "RETURN", "STORE", "ITER")):
            return False
    return False
