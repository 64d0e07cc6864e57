import importlib
import io
import pickle

import pytest
import timm
import torch
from torch import nn

from tinydet.reparam import fold

# The package's name `fold` is the function.
from .reference_blocks import Amber, Basalt, Garnet

fold_module = importlib.import_module("tinydet.reparam.fold")

_MODELS = [
    "resnet18",
    "rexnet_100",
    "tf_efficientnet_lite0",
    "mobilenetv3_large_100",
    "repvgg_a0",
    "mobileone_s0",
]


def _net(seed=0):
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 1),
            nn.BatchNorm2d(4),
        )
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", _MODELS)
@pytest.mark.parametrize("features_only", [False, True])
def test_fold__timm(name, features_only, randomise):
    model = randomise(timm.create_model(name, features_only=features_only)).double().eval()
    folded, report = fold(model, torch.zeros(1, 3, 64, 64))
    assert report.norms_after == 0
    assert report.kept == ()
    assert report.max_rel < 1e-12
    assert report.params_after < report.params_before
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)  # another batch, another size
    with torch.no_grad():
        expected, found = model(x), folded(x)
    if not features_only:
        expected, found = [expected], [found]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * a.abs().max().item())


def test_fold__does_not_touch_the_model():
    model = _net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fold(model, torch.zeros(1, 3, 8, 8))
    assert before.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        assert value.dtype == before[key].dtype


def test_fold__deterministic_structure_loads_strictly():
    x = torch.randn(1, 3, 8, 8)
    trained, _ = fold(_net(seed=1), x)
    fresh, _ = fold(_net(seed=2), torch.zeros(1, 3, 12, 12))
    fresh.load_state_dict(trained.state_dict(), strict=True)
    torch.testing.assert_close(fresh(x), trained(x))


def test_fold__twice_changes_nothing():
    for model, shape in ((_net(), (1, 3, 8, 8)), (nn.Sequential(Garnet()).eval(), (1, 8, 9, 9))):
        once, first = fold(model, torch.zeros(shape))
        twice, report = fold(once, torch.zeros(shape))
        assert first.norms_after == 0
        assert report.folded == ()
        assert report.kept == ()
        state = twice.state_dict()
        assert state.keys() == once.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in once.state_dict().items())


def test_fold__mixed_dtypes_follow_the_kernels():
    model = nn.Sequential(Amber(), Basalt(groups=8)).eval().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    folded, _ = fold(model, torch.zeros(1, 8, 9, 9))
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}


def test_fold__refuses_training_mode():
    with pytest.raises(ValueError, match="training mode"):
        fold(_net().train(), torch.zeros(1, 3, 8, 8))
    model = _net()
    model[1].train()
    with pytest.raises(ValueError, match="layer 1 is in training mode"):
        fold(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("error", [1e-6, 0.5])
def test_fold__refuses_a_wrong_fold(monkeypatch, error):
    right = fold_module.fold_scales

    def wrong(network):
        steps = right(network)
        network.model[0].weight.data *= 1 + error
        return steps

    monkeypatch.setattr(fold_module, "fold_scales", wrong)
    with pytest.raises(ValueError, match="its output changes by"):
        fold(_net(), torch.zeros(1, 3, 8, 8))


def test_fold__refuses_a_network_without_finite_output():
    model = _net()
    model[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        fold(model, torch.zeros(1, 3, 8, 8))


def test_fold__casts_to_float32_inside(randomise):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _net()
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            # In float64 the second layer would refuse a float32 input, or blur the comparison.
            return self.last(self.net(x).float())

    model = randomise(Casting()).eval()
    _, report = fold(model, torch.zeros(1, 3, 8, 8))
    assert report.norms_after == 0
    assert report.max_rel < 1e-12


def test_fold__several_arguments_and_uint8():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _net()

        def forward(self, images, offset):
            return {"out": self.net(images.to(self.net[0].weight.dtype) / 255 + offset)}

    model = Two().eval()
    inputs = (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1))
    folded, report = fold(model, inputs)
    assert report.norms_after == 0
    torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_fold__result_pickles_and_exports():
    folded, _ = fold(_net(), torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(pickle.loads(pickle.dumps(folded))(x), folded(x))
    exported = torch.export.export(folded, (x,))
    torch.testing.assert_close(exported.module()(x), folded(x))
    torch.save(folded.state_dict(), io.BytesIO())


def test_fold__leaves_no_global_state_behind():
    fold(_net(), torch.zeros(1, 3, 8, 8))
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    model = _net()
    with torch.inference_mode():
        folded, _ = fold(model, torch.zeros(1, 3, 8, 8))
    assert not any(p.is_inference() for p in folded.parameters())


def test_report_lines():
    _, report = fold(_net(), torch.zeros(1, 3, 8, 8))
    lines = "\n".join(report.lines())
    assert "2 -> 0" in lines
    assert f"{report.params_after:,}" in lines


@pytest.mark.slow
def test_fold__feature_hooks(randomise):
    model = timm.create_model(
        "repvgg_a0", features_only=True, feature_cls="hook", out_indices=(1, 4)
    )
    model = randomise(model).double().eval()
    folded, report = fold(model, torch.zeros(1, 3, 64, 64))
    assert report.norms_after == 0
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(model(x), folded(x), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * a.abs().max().item())


def test_fold__shares_no_memory_with_the_original():
    """Also in float64, which needs no conversion: training the one must not change the other."""
    model = _net().append(nn.ReLU()).append(nn.Linear(6, 6)).double().eval()
    folded, _ = fold(model, torch.zeros(1, 3, 8, 8).double())
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not own & {t.untyped_storage().data_ptr() for t in folded.state_dict().values()}
