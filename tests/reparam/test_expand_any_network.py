"""What users have in their networks: each works, or is refused in one line that names the layer."""

import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from tinydet.reparam import expand, expanded_names, fold


def _conv(**kwargs):
    return nn.Conv2d(4, 4, 3, padding=1, **kwargs)


def _weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(_conv())


def _pruned():
    conv = _conv()
    prune.l1_unstructured(conv, "weight", amount=0.3)
    return conv


def _assigned():
    conv = _conv()
    conv.forward = lambda x: x
    return conv


class _Own(nn.Conv2d):
    pass


_REFUSED = [
    (parametrizations.weight_norm(_conv()), "a conv with a computed weight or a replaced forward"),
    (
        parametrizations.spectral_norm(_conv()),
        "a conv with a computed weight or a replaced forward",
    ),
    (_weight_norm(), "a conv with a computed weight or a replaced forward"),
    (nn.utils.spectral_norm(_conv()), "a conv with a computed weight or a replaced forward"),
    (_pruned(), "a conv with a computed weight or a replaced forward"),
    (_assigned(), "a conv with a computed weight or a replaced forward"),
    (_conv(padding_mode="reflect"), "padded with reflect values"),
    (_conv(padding_mode="circular"), "padded with circular values"),
    (nn.Conv1d(4, 4, 3), "a Conv1d"),
    (nn.Conv3d(4, 4, 3), "a Conv3d"),
    (nn.ConvTranspose2d(4, 4, 3), "a ConvTranspose2d"),
    (nn.LazyConv2d(4, 3), "a LazyConv2d"),
    (_Own(4, 4, 3), "a _Own"),
    (torch.jit.script(_conv()), "a RecursiveScriptModule"),
]


@pytest.mark.parametrize(("conv", "what"), _REFUSED, ids=[what for _, what in _REFUSED])
def test_a_conv_that_cannot_have_branches_is_named_with_the_reason(conv, what):
    with pytest.raises(ValueError, match=f"no zero-padded nn.Conv2d .*; 0 is {what}$") as error:
        expand(nn.Sequential(conv), "repvgg")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"the model is {what}$"):
        expand(conv, "repvgg")
    model = nn.Sequential(nn.ModuleDict({"odd": conv}), _conv())
    assert expanded_names(expand(model, "repvgg")) == ["1"]
    with pytest.raises(ValueError, match=rf"none of the 1 convs; 0\.odd is {what}; the first"):
        expand(model, "repvgg", "0")


def test_a_weight_that_a_hook_computes_is_copied_with_its_network():
    torch.manual_seed(0)
    model = nn.Sequential(_weight_norm(), nn.ReLU(), nn.utils.spectral_norm(_conv()), _conv())
    x = torch.randn(2, 4, 6, 5)
    model.train()(x).sum().backward()  # Its weights now have a gradient function.
    expanded = expand(model.eval(), "repvgg")
    assert torch.equal(expanded(x), model(x))
    with torch.no_grad():
        expanded[0].weight_g.mul_(2)
    assert not torch.allclose(expanded(x), model(x))
    expanded.train()(x).sum().backward()
    assert model[0].weight_g.grad is not expanded[0].weight_g.grad is not None


def test_torchvision_networks_grow_and_fold_back(randomise):
    torch.manual_seed(0)
    model = randomise(torchvision.models.shufflenet_v2_x0_5(num_classes=3)).double().eval()
    expanded = randomise(expand(model, "repvgg", "depthwise stage2"), seed=1).eval()
    assert len(expanded_names(expanded)) == 5
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    (plain, wanted), (folded, found) = fold(model, x[:1]), fold(expanded, x[:1])
    assert found.macs_after == wanted.macs_after
    assert found.kept == wanted.kept == ()
    assert {k: t.shape for k, t in folded.state_dict().items()} == {
        k: t.shape for k, t in plain.state_dict().items()
    }
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expanded(x), rtol=1e-9, atol=1e-9)


def test_a_shared_conv_gets_its_branches_once_and_is_folded_once(randomise):
    torch.manual_seed(0)
    conv = _conv()
    expanded = randomise(expand(nn.Sequential(conv, nn.ReLU(), conv).double(), "dbb")).eval()
    assert expanded[0] is expanded[2]
    folded, _ = fold(expanded, torch.zeros(1, 4, 9, 9))
    assert folded[0] is folded[2]
    assert type(folded[0]) is nn.Conv2d
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expanded(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", ["dbb", "mobileone"])
def test_half_precision_trains(dtype, block):
    torch.manual_seed(0)
    model = nn.Sequential(_conv(), nn.BatchNorm2d(4), nn.ReLU()).to(dtype)
    expanded = expand(model, block).train()
    assert {p.dtype for p in expanded.parameters()} == {dtype}
    x = torch.randn(4, 4, 9, 9, dtype=dtype)
    for _ in range(3):
        loss = expanded(x).float().square().mean()
        expanded.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in expanded.parameters():
                p -= 0.1 * p.grad
    assert all(p.isfinite().all() and p.grad.any() for p in expanded[0].branches.parameters())
    folded, _ = fold(expanded.eval(), x[:1])
    assert {p.dtype for p in folded.parameters()} == {dtype}
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expanded(x), rtol=0.05, atol=0.05)


def test_branches_made_in_inference_mode_can_be_trained():
    model = _conv()
    with torch.inference_mode():
        expanded = expand(model, "dbb")
    assert not any(t.is_inference() for t in expanded.state_dict().values())
    expanded.train()(torch.randn(2, 4, 5, 5)).sum().backward()
    assert expanded.branches[0][-1].bias.grad is not None


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_networks_run_the_branches(inside, randomise):
    torch.manual_seed(0)
    model = nn.Sequential(_conv(), nn.ReLU())
    x = torch.randn(2, 4, 7, 6)
    if inside:
        model[0].compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    model(x)
    expanded = randomise(expand(model, "repvgg")).eval()
    (name,) = expanded_names(expanded)
    conv = expanded.get_submodule(name)
    total = nn.Conv2d.forward(conv, x) + sum(branch(x) for branch in conv.branches)
    torch.testing.assert_close(expanded(x), total.relu())
