"""Code of a module as a graph: what survives tracing, rewriting, copying and pickling."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tinydet.reparam.fx_graph import NotTraceableError, RewrittenModule, as_module, trace


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


def _tripled(module, args, output):
    del module, args
    return 3 * output


@pytest.fixture
def rewritten():
    module = _Caching().eval()
    module.register_forward_hook(_tripled)
    return module, as_module(trace(module, (torch.ones(1, 2, 3, 3),), {}), module)


def test_trace__leaves_the_module_alone(rewritten):
    module, _ = rewritten
    assert module.cache == {}
    module(torch.ones(1, 2, 3, 3))
    again = trace(module, (torch.ones(1, 2, 3, 3),), {})
    assert "bias" in {str(n.target) for n in again.graph.nodes if n.op == "get_attr"}


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: copy.deepcopy(_pickled(m))])
def test_copies_keep_hooks_and_plain_values(rewritten, how):
    module, new = rewritten
    assert isinstance(new, RewrittenModule)
    made = how(new)
    x = torch.randn(2, 2, 5, 4)
    torch.testing.assert_close(made(x), module(x))
    assert (made.width, made.training) == (7, False)
    assert set(made.state_dict()) == {"conv.weight", "conv.bias", "bias"}


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((torch.ones(1), None), {}), ((torch.ones(1),), {"other": torch.ones(1)}), (([],), {})],
)
def test_trace__calls_it_cannot_follow(args, kwargs):
    with pytest.raises(NotTraceableError):
        trace(_Caching(), args, kwargs)
