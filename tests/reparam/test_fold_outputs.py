"""What a folded network returns in unusual forms: its dtypes, objects, random numbers and state."""

import warnings
from collections import defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from tinydet.reparam import compare_outputs, expand, fold

from .small_networks import Net

_X = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def _pair(kernel=3):
    return nn.Sequential(nn.Conv2d(4, 4, kernel, padding=kernel // 2), nn.BatchNorm2d(4))


@pytest.fixture
def net(randomise):
    """A network of two branches, and what the test does with them."""
    return lambda way: randomise(Net(way, a=_pair(), b=_pair(1))).eval()


def _sum(m, x):
    return F.relu(m.a(x) + m.b(x))


def _autocast(**options):
    def way(m, x):
        with torch.autocast("cpu", **options):
            return _sum(m, x)

    return way


@pytest.mark.parametrize(
    ("way", "branches"),
    [
        (_autocast(dtype=torch.bfloat16), 1),
        (_autocast(enabled=False), 1),
        (lambda m, x: (m.a(x) + m.b(x)).half(), 0),
        (lambda m, x: m.a(x).bfloat16() + m.b(x).bfloat16(), 1),
    ],
)
@pytest.mark.parametrize("outer", [False, True])
def test_dtypes_that_code_asks_for_stay(net, way, branches, outer):
    model = net(way)
    folded, _ = fold(model, _X)
    convs = sum(isinstance(m, nn.Conv2d) for m in folded.modules())
    assert convs == 1 + branches  # Where casts would be lost, the branches stay.
    with torch.autocast("cpu", torch.bfloat16, enabled=outer), torch.no_grad():
        expected, found = model(_X), folded(_X)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_output_of_half_precision(randomise, dtype):
    """Its error is that of the weights, not of its own dtype."""
    layers = [layer for _ in range(3) for layer in (*_pair(), nn.ReLU())]
    body = randomise(nn.Sequential(*layers)).eval()

    class Upcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(x).float()

    folded, report = fold(Upcast().eval().to(dtype), _X.to(dtype))
    assert report.norms_after == 0
    assert folded(_X.to(dtype)).dtype is torch.float32


@pytest.mark.parametrize(
    "factor",
    [
        lambda: torch.rand(4, 1, 1),
        lambda: torch.bernoulli(torch.full((4, 1, 1), 0.5)),
        lambda: 1 + torch.empty(4, 1, 1).normal_(),
    ],
)
def test_random_factors_stay_random(net, factor):
    model = net(lambda m, x: F.relu(m.a(x) * factor()))
    folded, _ = fold(model, _X)
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = model(_X)
        torch.manual_seed(seed)
        torch.testing.assert_close(folded(_X), expected, rtol=1e-4, atol=1e-5)


class _Plain:
    def __init__(self, value):
        self.value, self.itself = value, self


@dataclass
class _Slots:
    __slots__ = ("value",)
    value: torch.Tensor


@pytest.mark.parametrize(
    ("hide", "find"),
    [
        (_Plain, lambda o: o.value),
        (lambda y: [_Plain({"y": _Plain(y)})], lambda o: o[0].value["y"].value),
        (_Slots, lambda o: o.value),
        (lambda y: y.detach().numpy(), torch.from_numpy),
        (lambda y: defaultdict(list, y=y), lambda o: o["y"]),
    ],
)
def test_tensors_in_returned_objects_keep_their_values(net, hide, find):
    """So a norm behind a returned tensor stays where it is."""

    def way(m, x):
        y = m.a[0](x)
        return F.relu(m.a[1](y)), hide(y)

    model = net(way)
    folded, report = fold(model, _X)
    assert "output of the network" in next(s.detail for s in report.kept if s.name == "a.1")
    with torch.no_grad():
        torch.testing.assert_close(find(folded(_X)[1]), find(model(_X)[1]))


def test_returned_iterators_are_refused(net):
    with pytest.raises(ValueError, match="returns a generator, whose items cannot be compared"):
        fold(net(lambda m, x: (m.a(x), (t for t in [x]))), _X)


def test_counters_stay_as_they_were(net):
    def way(m, x):
        m.calls += 1
        return m.a(x)

    model = net(way)
    model.register_buffer("calls", torch.tensor(3.0))
    folded, _ = fold(model, _X)
    assert (model.calls, folded.calls) == (3, 3)
    folded(_X)
    assert folded.calls == 4


def test_masks_of_minus_infinity(net):
    model = net(lambda m, x: (m.a(x).flatten(2) + m.mask).softmax(-1))
    model.register_buffer("mask", torch.full((256,), -torch.inf).where(torch.arange(256) > 9, 0))
    folded, report = fold(model, _X)
    assert [step.name for step in report.folded] == ["a.1"]
    assert torch.equal(folded.mask, model.mask)


def test_sparse_buffers(net):
    model = net(lambda m, x: torch.sparse.mm(m.links, m.a(x).flatten(2)[0].t()))
    model.register_buffer("links", torch.eye(256).to_sparse())
    folded, report = fold(model, _X)
    assert [step.name for step in report.folded] == ["a.1"]
    assert compare_outputs(model, folded, [_X]).max_rel < 1e-5


def test_networks_that_take_no_negative_numbers(net):
    model = net(lambda m, x: _sum(m, x ** (1 / 2.2)))
    folded, report = fold(model, _X.abs())
    assert report.branches_after == 0
    assert compare_outputs(model, folded, [_X.abs()]).max_rel < 1e-5


class _Scale(nn.Module):
    """A LayerScale with a check of its input, and perhaps a further argument."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x, factor=None):
        if x.shape[1] != 4:
            raise LookupError("four channels")
        return x * self.gamma if factor is None else x * self.gamma * factor


@pytest.mark.parametrize("more", [(), (0.5,)])
def test_modules_that_check_their_input(net, more):
    model = net(lambda m, x: F.relu(m.scale(m.a(x), *more)))
    model.scale = _Scale().eval()
    folded, _ = fold(model, _X)
    assert compare_outputs(model, folded, [_X]).max_rel < 1e-5


def test_blocks_that_check_their_input(net):
    def way(m, x):
        assert x.shape[-1] % 2 == 0
        return m.a(x) + m.b(x)

    model = nn.Sequential(net(way), nn.ReLU()).eval()
    folded, report = fold(model, _X)
    assert report.branches_after == 0
    assert compare_outputs(model, folded, [_X]).max_rel < 1e-5


def test_named_tuples_of_inputs(net):
    Given = namedtuple("Given", "image mask")
    model = net(lambda m, given: _sum(m, given.image) * given.mask)
    folded, report = fold(model, (Given(_X, torch.ones(1, 1, 16, 16)),))
    assert report.branches_after == 0
    given = Given(_X, torch.rand(1, 1, 16, 16))
    assert compare_outputs(model, folded, [(given,)]).max_rel < 1e-5


def test_instance_norms_of_single_images(randomise):
    layers = nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = randomise(nn.Sequential(*layers)).eval()
    folded, report = fold(model, _X[0])
    assert [step.detail for step in report.kept] == ["its input has no batch axis"]
    assert compare_outputs(model, folded, [_X[0]]).max_rel < 1e-5
    assert fold(model, _X)[1].norms_after == 0


class _ByMode(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else x


def test_networks_that_cannot_be_folded_are_refused_in_one_line(net):
    model = net(lambda m, x: m.last(m.a(x)))
    model.last = _ByMode()
    with pytest.raises(ValueError, match=r"its layer last is in training mode; call model.eval()"):
        fold(model, _X)
    with pytest.raises(ValueError, match="has no weights before it has run once"):
        fold(nn.Sequential(nn.LazyConv2d(4, 3)).eval(), _X)
    with torch.device("meta"):
        model = _pair().eval()
    with pytest.raises(ValueError, match=r"0.weight is on the meta device"):
        fold(model, _X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(_pair().eval())
    with pytest.raises(ValueError, match="is TorchScript; fold the network it was made from"):
        fold(model, _X)
    with pytest.raises(ValueError, match="where: selects no module"):
        fold(net(_sum), _X, lambda *_: False)


@pytest.fixture(scope="module")
def extracted():
    torch.manual_seed(0)
    model = resnet18(num_classes=5)
    with torch.no_grad():
        for _ in range(2):  # Statistics of its own: those of a batch would differ.
            model(torch.rand(4, 3, 64, 64))
    return create_feature_extractor(model.eval(), {"layer1": "fine", "layer2": "coarse"})


def test_graphs_that_torchvision_extracts(extracted):
    """Copies of them are in training mode."""
    folded, report = fold(extracted, torch.zeros(1, 3, 64, 64))
    assert report.norms_after == 0
    x = torch.rand(2, 3, 96, 64)
    assert compare_outputs(extracted, folded, [x]).max_rel < 1e-5
    assert not any(m.training for m in folded.modules())
    expanded = expand(extracted, "repvgg", "layer1")
    assert compare_outputs(extracted, expanded, [x]).max_rel < 1e-5


def test_a_copy_that_differs_is_not_folded(net):
    class Once(nn.Module):
        """Its copies do something else."""

        def __deepcopy__(self, memo):
            return nn.Tanh()

        def forward(self, x):
            return x

    model = net(lambda m, x: m.last(m.a(x)))
    model.last = Once().eval()
    with pytest.raises(ValueError, match="a copy of the original network computes another"):
        fold(model, _X)


def test_branches_in_a_torch_fx_graph_stay(net):
    model = torch.fx.symbolic_trace(net(_sum))
    folded, report = fold(model, _X)
    assert "torch.fx graph; fold the network before it is traced" in report.kept[0].detail
    assert report.norms_after == 0
    assert compare_outputs(model, folded, [_X]).max_rel < 1e-5
