"""Code of a module as a graph: what tracing leaves alone, and what it refuses."""

import pytest
import torch
from torch import nn

from tinydet.reparam.fx_graph import NotTraceableError, observe_nodes, trace


class _Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.width = nn.Conv2d(2, 2, 1), 7
        self.bias = nn.Parameter(torch.ones(2, 1, 1))
        self.cache = {}

    def forward(self, x, other=None):
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        x = self.conv(x) + self.cache["bias"]
        return x if other is None else x + other


def test_trace__leaves_the_module_alone():
    module = _Caching().eval()
    x = torch.ones(1, 2, 3, 3)
    graph = trace(module, (x,), {})
    assert module.cache == {}
    torch.testing.assert_close(observe_nodes(graph).returned, module(x))
    again = trace(module, (x,), {})
    assert "bias" in {str(n.target) for n in again.graph.nodes if n.op == "get_attr"}


def test_trace__buffers_are_not_constants():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.ones(2))

        def forward(self, x):
            return x - self.mean.exp()

    graph = trace(Centred(), (torch.ones(1, 2),), {})
    assert graph.meta["targets"] == {"mean"}


class _Stores(nn.Module):
    def forward(self, x):
        self.last = x
        return x


class _Unnamed(nn.Module):
    def forward(*args):
        return args[1]


def _own_forward():
    module = nn.Identity()
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    "module",
    [_Stores(), _Unnamed(), _own_forward(), torch.jit.script(nn.ReLU())],
    ids=["stores activations", "unnamed arguments", "forward of its own", "TorchScript"],
)
def test_trace__modules_it_cannot_follow(module):
    with pytest.raises(NotTraceableError):
        trace(module, (torch.ones(1),), {})


def test_observe_nodes__code_that_took_another_path():
    class Tests(nn.Module):
        def forward(self, x):
            return x.sum() if isinstance(x, torch.Tensor) else x[5]

    with pytest.raises(NotTraceableError, match="does not run"):
        observe_nodes(trace(Tests(), (torch.ones(1),), {}))
