"""Give a module other forward code, and let it keep its class, attributes, hooks and identity.

The module becomes an instance of a subclass that is generated from source text: so whatever works
with ordinary modules works with it, and it is pickled as its original class and the text.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, fx, nn

from tinydet.reparam.fx_graph import targets
from tinydet.reparam.module_class import generated_class
from tinydet.reparam.module_swap import give_hooks, has_hooks, with_replaced
from tinydet.reparam.same_padding import SamePad2d

_TORCH_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)


class MergedError(RuntimeError, AttributeError):
    """Something was used that `fold` has merged into other layers."""


class Merged(nn.Module):
    """Stands for a module that was merged into another, where other methods may refer to it."""

    def __init__(self, name: str, into: str) -> None:
        """Take the module's name, and that of the layer."""
        super().__init__()
        self._message = f"{name} was merged into {into} by fold"

    def __getattr__(self, name: str) -> Any:
        if name[0] == "_":
            return super().__getattr__(name)
        raise MergedError(self._message)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise MergedError."""
        del args, kwargs
        raise MergedError(self._message)

    def extra_repr(self) -> str:
        """Return what happened."""
        return self._message


@dataclass(frozen=True)
class _Code:
    """What a generated class is made from.

    Attributes:
        origin: the original class.
        source: the forward method.
        functions: the functions that it calls, by the names it uses.
        mode: whether it runs in inference mode, and with gradients.
        merged: names of members that are no more.
        changed: methods of the original class that no longer compute what they did.
        inlined: methods whose code is in the forward method.
    """

    origin: type[nn.Module]
    source: str
    functions: dict[str, Any]
    mode: tuple[bool, bool]
    merged: frozenset[str]
    changed: frozenset[str]
    inlined: frozenset[str]

    def build(self) -> type[Rewritten]:
        """Return the class."""
        environment = {**fx.Graph().python_code("self").globals, **self.functions}
        file = f"<fold of {self.origin.__qualname__} {hash(self.source):x}>"
        lines = self.source.splitlines(keepends=True)
        linecache.cache[file] = (len(self.source), None, lines, file)  # For tracebacks.
        exec(compile(self.source, file, "exec"), environment)
        forward = environment.pop("forward")
        original = inspect.unwrap(self.origin.forward)
        forward.__defaults__, forward.__kwdefaults__ = (
            original.__defaults__,
            original.__kwdefaults__,
        )
        inference, gradients = self.mode
        if inference or not gradients:
            forward = (torch.inference_mode() if inference else torch.no_grad())(forward)
        members = {name: _refusing(self.origin, name) for name in self.changed}
        members.update(forward=forward, rewritten_code=self, generated_by=(_Code.build, (self,)))
        members.update(__module__=self.origin.__module__, __doc__=self.origin.__doc__)
        members.update(__qualname__=self.origin.__qualname__)
        return cast(
            type[Rewritten],
            generated_class(self.origin.__name__, (Rewritten, self.origin), members),
        )


class Rewritten(nn.Module):
    """Base of the generated classes; see `rewrite`."""

    rewritten_code: ClassVar[_Code]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.rewritten_code.merged:
            raise MergedError(f"{name} was merged by fold: what is assigned would not be used")
        super().__setattr__(name, value)


def _refusing(origin: type[nn.Module], name: str) -> Any:
    """Return a method, or a property, that raises MergedError."""

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        del self, args, kwargs
        raise MergedError(
            f"{origin.__name__}.{name} uses layers that fold has merged; call forward"
        )

    static = inspect.getattr_static(origin, name)
    return refuse if inspect.isfunction(static) else property(refuse)


def rewrite(module: nn.Module, graph: fx.GraphModule, keep: bool) -> nn.Module:
    """Give a module the code of an edited graph, in place.

    Members that only the removed nodes used are removed; where other methods refer to them,
    a `Merged` takes their place. Methods of which code was removed raise MergedError.

    Args:
        module: the module that was traced.
        graph: the result of `trace`, edited.
        keep: return the module itself, never layers in its place.

    Returns:
        The module, or where it was a chain of layers without other methods, the only layer or an
        `nn.Sequential` with its hooks and plain attributes.
    """
    before, after = graph.meta["targets"], targets(graph)
    code = _code_of(module, graph, before, after)
    chain = _chain(graph)
    if chain is not None and type(module) is nn.Sequential and keep:
        module._modules.clear()
        module._modules.update(chain)
        return module
    if chain is not None and not keep and not _still_useful(code):
        single = None if has_hooks(module) else _single_layer(list(chain.values()))
        return as_replacement(single or nn.Sequential(chain), module)
    added = [n for n in sorted(_first(after)) if getattr(module, n, None) is None]
    module.__class__ = code.build()
    for name in added:
        value = getattr(graph, name)
        if isinstance(value, Tensor):
            module.register_buffer(name, value.detach())
        else:
            setattr(module, name, value.train(module.training))
    for name in _remove_unused(module, before, after):
        methods = _methods(code.origin)
        if any(name in _names(methods[method]) for method in methods.keys() - code.changed):
            module._modules[name] = Merged(name, ", ".join(added) or "other layers")
    return module


def _code_of(module: nn.Module, graph: fx.GraphModule, before: set[str], after: set[str]) -> _Code:
    old = type(module).rewritten_code if isinstance(module, Rewritten) else None
    origin = old.origin if old else type(module)
    nodes = graph.meta["nodes"]
    left = set(graph.graph.nodes)
    inlined = {m for methods in nodes.values() for m in methods if m in _methods(origin)}
    changed = {m for node, methods in nodes.items() if node not in left for m in methods} & inlined
    if old is not None:
        # Which of them the removed code was from is not known any more.
        inlined, changed = set(old.inlined), {*old.changed, *old.inlined}
    python = graph.graph.python_code("self")
    usual = fx.Graph().python_code("self").globals
    head, _, rest = python.src.partition("def forward")
    body = rest.partition(":")[2]
    source = f"{head}def forward{_signature(origin)}:{body}"
    return _Code(
        origin=origin,
        source=source,
        functions={k: v for k, v in python.globals.items() if k not in usual},
        mode=graph.meta["mode"],
        merged=frozenset(_first(before) - _first(after)) | (old.merged if old else set()),
        changed=frozenset(changed),
        inlined=frozenset(inlined),
    )


def _signature(origin: type[nn.Module]) -> str:
    """Return the parameters of a class's forward; their defaults are set after compilation."""
    signature = inspect.signature(inspect.unwrap(origin.forward))
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=empty if p.default is empty else None)
        for p in signature.parameters.values()
    ]
    parameters[0] = parameters[0].replace(name="self")
    return str(inspect.Signature(parameters))


def _methods(origin: type) -> dict[str, Any]:
    """Return the functions and properties of a class that torch's modules do not have."""
    kinds = [k for k in reversed(origin.__mro__) if k.__module__.partition(".")[0] != "torch"]
    members = {name: member for kind in kinds for name, member in vars(kind).items()}
    return {
        name: member.fget if isinstance(member, property) else member
        for name, member in members.items()
        if (inspect.isfunction(member) or isinstance(member, property))
        and not hasattr(nn.Module, name)
    }


def _names(function: Callable[..., Any]) -> set[str]:
    """Return the names that a function's code refers to."""
    found: set[str] = set()
    codes = [inspect.unwrap(function).__code__]
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [c for c in code.co_consts if inspect.iscode(c)]
    return found


def _still_useful(code: _Code) -> bool:
    """Whether a class has public methods beside forward that do what they did."""
    return any(
        name[0] != "_" and name not in code.changed and not _names(method) & code.merged
        for name, method in _methods(code.origin).items()
    )


def _first(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _remove_unused(module: nn.Module, before: set[str], after: set[str]) -> list[str]:
    """Remove the members that were used before and no longer are; return their names."""
    gone = []
    for name in sorted(_first(before)):
        rest = [
            {n.partition(".")[2] for n in names if n.partition(".")[0] == name}
            for names in (before, after)
        ]
        member = getattr(module, name, None)
        if member is None:
            continue  # A constant of the graph.
        if not rest[1]:
            gone.append(name)
            delattr(module, name)
            if isinstance(member, Tensor) and isinstance(module, _TORCH_LAYERS):
                # As a layer without bias has it: code such as `extra_repr` looks at it.
                module.register_parameter(name, None)
            removed = {cast(nn.Module, member): None}
            for attribute, value in list(vars(module).items()):
                if attribute[0] != "_":
                    module.__dict__[attribute] = with_replaced(value, removed)
        elif isinstance(member, (nn.ModuleList, nn.ModuleDict)) and "" not in rest[1]:
            _remove_unused(member, *rest)
    return gone


def _single_layer(layers: list[nn.Module]) -> nn.Module | None:
    """Return the one layer of a chain, or timm's Conv2dSame for its padding and a conv."""
    if len(layers) == 2 and isinstance(layers[0], SamePad2d):
        return layers[0].joined(layers[1])
    return layers[0] if len(layers) == 1 else None


def as_replacement(new: nn.Module, original: nn.Module) -> nn.Module:
    """Copy the hooks, mode and plain attributes of the original, which other code may read."""
    for name, value in vars(original).items():
        if isinstance(value, (bool, int, float, str, tuple)) and not hasattr(new, name):
            new.__dict__[name] = value
    give_hooks(original, new)
    return new.train(original.training)


def _chain(graph: fx.GraphModule) -> OrderedDict[str, nn.Module] | None:
    """Return the modules of a graph that only calls one module after another, else None."""
    nodes = list(graph.graph.nodes)
    if nodes[0].op != "placeholder" or nodes[-1].op != "output" or len(nodes) < 3:
        return None
    chain: OrderedDict[str, nn.Module] = OrderedDict()
    for before, node in itertools.pairwise(nodes[:-1]):
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return None
        chain[str(node.target).replace(".", "_")] = graph.get_submodule(str(node.target))
    return chain if nodes[-1].args == (nodes[-2],) and len(chain) == len(nodes) - 2 else None
