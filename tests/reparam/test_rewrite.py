"""A module with other code keeps its class, its members and its identity."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import timm
import torch
from torch import fx, nn
from torch.nn import functional as F

from tinydet.reparam import fold
from tinydet.reparam.rewrite import Merged

from .reference_blocks import assert_same
from .small_networks import Net, check_nothing_unused, conv, convs_of, example, fold_and_compare


class Classifier(nn.Module):
    """A network with the methods that timm's have; its two heads are averaged."""

    def __init__(self, channels=4):
        super().__init__()
        self.stem = nn.Sequential(conv(channels=channels, bias=False), nn.BatchNorm2d(channels))
        self.one, self.two = nn.Linear(channels, 3), nn.Linear(channels, 3)
        self.num_features, self.info = channels, [{"channels": channels}]
        self.auxiliary = nn.Linear(channels, 2)
        self.register_buffer("mean", torch.randn(channels, 1, 1))

    def get_classifier(self):
        return self.one, self.two

    def reset_classifier(self, n):
        self.one, self.two = nn.Linear(self.num_features, n), nn.Linear(self.num_features, n)

    def forward_features(self, x):
        return F.relu(self.stem(x - self.mean))

    def forward_head(self, x, pre_logits: bool = False):
        x = x.mean((2, 3))
        return x if pre_logits else (self.one(x) + self.two(x)) / 2

    def forward(self, x, pre_logits: bool = False):
        return self.forward_head(self.forward_features(x), pre_logits)


@pytest.fixture
def classifier(randomise):
    model = Classifier().eval()
    model.info.append(model)  # Networks may refer to themselves.
    folded, report = fold_and_compare(model, example(), randomise)
    assert report.branches_after == 0
    return model, folded


def test_root_keeps_its_class_and_members(classifier):
    model, folded = classifier
    assert isinstance(folded, Classifier)
    assert type(folded).__name__ == "Classifier"
    assert inspect.signature(folded.forward).parameters.keys() == {"x", "pre_logits"}
    assert folded.num_features == 4
    assert folded.info[1] is folded
    x = example()
    assert_same(model.forward_features(x), folded.forward_features(x))
    assert torch.equal(folded.auxiliary.weight, model.auxiliary.weight)
    assert {n for n, _ in folded.named_children()} == {
        "stem", "auxiliary", "one", "two", "reparam_conv"
    }  # fmt: skip
    assert set(folded.state_dict()) == {
        *(f"{n}.{p}" for n in ("stem.0", "auxiliary", "reparam_conv") for p in ("weight", "bias")),
        "mean",
    }


def test_methods_of_which_code_was_merged(classifier):
    _, folded = classifier
    x = example()
    for head in folded.get_classifier():
        assert isinstance(head, Merged)
        assert not list(head.parameters())
        with pytest.raises(RuntimeError, match="merged into reparam_conv"):
            head(x)
        with pytest.raises(RuntimeError, match="merged into reparam_conv"):
            head.weight.sum()
    with pytest.raises(RuntimeError, match="forward_head"):
        folded.forward_head(x)
    with pytest.raises(RuntimeError, match="would not be used"):
        folded.reset_classifier(7)
    with pytest.raises(ValueError, match="pre_logits"):
        folded(x, True)


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), _saved]
)
def test_copies(how, classifier):
    model, folded = classifier
    folded.register_forward_hook(_tripled)
    twin = how(how(folded))
    x = example()
    assert_same(3 * model(x), twin(x))
    assert_same(model.forward_features(x), twin.forward_features(x))
    assert isinstance(twin, Classifier)
    assert str(twin) == str(folded)
    with pytest.raises(RuntimeError, match="forward_head"):
        twin.forward_head(x)
    folded.load_state_dict(twin.state_dict(), strict=True)


def _tripled(module, args, output):
    del module, args
    return 3 * output


def test_exports_traces_and_folds_again(classifier):
    model, folded = classifier
    x = example()
    exported = torch.export.export(folded, (x,)).module()
    again, report = fold(folded, x)
    assert not report.folded
    assert again.state_dict().keys() == folded.state_dict().keys()
    for form in (fx.symbolic_trace(folded, {"pre_logits": False}), exported, again):
        assert_same(model(x), form(x))
    assert_same(model(x), torch.jit.trace(folded, x)(x))
    folded(x).sum().backward()
    assert all((p.grad is None) == n.startswith("auxiliary") for n, p in folded.named_parameters())


class _Twice(nn.Module):
    """First its branches are merged, then its factor is fused."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(), conv(1), conv(1)
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))

    def scaled(self, x):
        return self.gamma.exp() * self.c(x)

    def forward(self, x):
        return x + self.scaled(F.relu(self.a(x) + self.b(x)))


def test_rewriting_twice(randomise):
    model = nn.Sequential(_Twice())
    folded, _ = fold_and_compare(model, example(), randomise)
    assert [m.__name__ for m in type(folded[0]).__mro__ if issubclass(m, _Twice)] == ["_Twice"] * 2
    assert {n for n, _ in folded[0].named_parameters()} == {
        f"{n}.{p}" for n in ("c", "reparam_conv") for p in ("weight", "bias")
    }
    check_nothing_unused(folded, example())
    with pytest.raises(RuntimeError, match="scaled"):
        folded[0].scaled(example())


def test_nothing_is_left_of_what_was_merged(randomise):
    """Neither members, nor constants computed for them, nor sizes."""

    def way(m, x):
        table = torch.arange(4.0, dtype=x.dtype).view(-1, 1, 1).exp() + m.shift
        a = m.branches[0](x)
        b = m.branches[1](x).reshape(a.shape)
        return F.relu(a + table * b) + m.branches[2](F.relu(x))

    branches = nn.ModuleList([conv(), conv(1), conv(1)])
    model = Net(way, branches=branches, reparam_conv=None)
    model.shift = nn.Parameter(torch.randn(4, 1, 1))
    folded, _ = fold_and_compare(model, example(), randomise)
    assert len(convs_of(folded)) == 2
    assert dict(folded.branches.named_children()).keys() == {"2"}
    check_nothing_unused(folded, example())
    assert not any(word in folded.rewritten_code.source for word in ("shape", "exp", "shift"))


def test_shared_child_that_one_module_still_uses(randomise):
    class Uses(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.a, self.b = first, second

        def forward(self, x):
            return F.relu(self.a(x) + self.b(x))

    shared = conv(1)
    model = Net(
        lambda m, x: m.other(m.block(x)).sin() - x, block=Uses(conv(), shared), other=shared
    )
    folded, _ = fold_and_compare(model, example(), randomise)
    assert {n.partition(".")[0] for n in folded.state_dict()} == {"block", "other"}
    check_nothing_unused(folded, example())


def test_levit():
    torch.manual_seed(0)
    model = timm.create_model("levit_128s").eval()
    x = torch.randn(1, 3, 224, 224)
    folded, _ = fold(model, x)
    with torch.no_grad():
        assert_same(model(x), folded(x), 1e-4)
        assert_same(model.forward_features(x), folded.forward_features(x), 1e-4)
    assert folded.num_features == model.num_features
    assert [type(m) for m in folded.get_classifier()] == [Merged, Merged]
    with pytest.raises(RuntimeError):
        folded.forward_head(model.forward_features(x))
