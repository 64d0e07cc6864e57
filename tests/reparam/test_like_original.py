"""A folded network has the dtypes, devices and memory formats of the original."""

import copy

import pytest
import torch
from torch import nn

from tinydet.reparam import BLOCKS, expand, fold
from tinydet.reparam.like_original import like_original, memory_format_of

from .small_networks import Net


def _network():
    """Branches with a 1x1 kernel first, a fused norm, one that stays, a transposed conv."""
    return nn.Sequential(
        Net(
            lambda m, x: m.one(x) + m.three(x),
            one=nn.Conv2d(4, 6, 1),
            three=nn.Conv2d(4, 6, 3, padding=1),
        ),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.BatchNorm2d(4),
    ).eval()


def _formats(model):
    return {n: memory_format_of(p) for n, p in model.named_parameters() if p.ndim > 3}


@pytest.mark.parametrize("last", [True, False])
def test_fold_keeps_channels_last(last, randomise):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 9, 11)
    model = randomise(_network())
    plain, expected = fold(model, x)
    # Depthwise kernels lie in memory in both ways at once.
    names = {"0.weight": True, "5.weight": True, "8.weight": False}
    if last:
        model.to(memory_format=torch.channels_last)
    folded, report = fold(model, x)
    assert _formats(folded) == {
        name: torch.channels_last if last and is_last else torch.contiguous_format
        for name, is_last in names.items()
    }
    # The structure does not depend on the layout in memory.
    assert report.lines()[:-2] == expected.lines()[:-2]
    assert report.kept == expected.kept
    assert plain.state_dict().keys() == folded.state_dict().keys()
    given = torch.randn(2, 4, 12, 10).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(folded(given), plain(given), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded(given), model(given), rtol=1e-4, atol=1e-5)


def test_strides_of_a_fused_weight_are_those_of_its_source():
    conv = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)
    one = nn.Conv2d(6, 5, 1).to(memory_format=torch.channels_last)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), one, nn.BatchNorm2d(5)).eval()
    folded, _ = fold(model, torch.zeros(1, 4, 9, 9))
    assert folded[0].weight.stride() == conv.weight.stride() == (36, 1, 12, 4)
    assert folded[0].weight.dtype == folded[0].bias.dtype == torch.float32


def test_volumes_keep_channels_last():
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 2))
    model = model.eval().to(memory_format=torch.channels_last_3d)
    folded, report = fold(model, torch.zeros(1, 2, 6, 7, 8))
    assert report.norms_after == 0
    assert set(_formats(folded).values()) == {torch.channels_last_3d}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("last", [True, False])
def test_branches_and_what_they_fold_into_have_the_convs_memory_format(block, last, randomise):
    torch.manual_seed(0)
    wanted = torch.channels_last if last else torch.contiguous_format
    model = nn.Sequential(nn.Conv2d(4, 4, 5, padding=2), nn.ReLU()).to(memory_format=wanted)
    expanded = randomise(expand(model, block)).eval()
    # Of 1x1 and of depthwise kernels both are true.
    kernels = [p for p in expanded.parameters() if p.ndim == 4 and 1 not in p.shape[1:]]
    assert {memory_format_of(p) for p in kernels} == {wanted}
    # There the strides tell.
    for kernel in expanded.parameters():
        if kernel.ndim == 4:
            assert kernel.stride(1) == (1 if last else kernel[0, 0].numel())
    folded, _ = fold(expanded, torch.zeros(1, 4, 9, 9))
    assert memory_format_of(folded[0].weight) == wanted


def test_norms_in_float32_beside_bfloat16_convs(randomise):
    torch.manual_seed(0)
    model = randomise(_network()).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    folded, report = fold(model, torch.zeros(1, 4, 9, 9))
    assert [step.name for step in report.kept] == ["3"]
    for name, tensor in folded.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64
        else:
            assert tensor.dtype == (torch.float32 if name[0] == "3" else torch.bfloat16), name


def test_sources_are_found_by_name_then_in_the_block_then_around_it():
    original = nn.ModuleDict(
        {
            "block": nn.ModuleDict(
                {
                    "norm": nn.BatchNorm2d(3).double(),
                    "conv": nn.Conv2d(3, 3, 3).half().to(memory_format=torch.channels_last),
                }
            ),
            "head": nn.Linear(3, 2).bfloat16(),
        }
    )
    folded = nn.ModuleDict(
        {"block": nn.Conv2d(3, 3, 5), "head": nn.Linear(3, 2), "new": nn.Linear(2, 2)}
    )
    folded["tied"] = nn.Linear(2, 2)
    folded["tied"].weight = folded["new"].weight
    folded.register_buffer("count", torch.tensor(3))
    like_original(folded, original)
    assert folded["block"].weight.dtype == folded["block"].bias.dtype == torch.float16
    assert memory_format_of(folded["block"].weight) == torch.channels_last
    assert folded["head"].weight.dtype == torch.bfloat16
    # The first kernel of the whole network.
    assert folded["new"].weight.dtype == torch.float16
    assert folded["tied"].weight is folded["new"].weight
    assert folded.count.dtype == torch.int64


def test_shared_weights_and_gradients_wanted_stay():
    conv = nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)
    original = nn.Sequential(conv, nn.ReLU(), conv).requires_grad_(False)
    folded = copy.deepcopy(original).double().to(memory_format=torch.contiguous_format)
    like_original(folded, original)
    assert folded[0] is folded[2]
    assert not folded[0].weight.requires_grad
    assert torch.equal(folded[0].weight, conv.weight)
    assert folded[0].weight.stride() == conv.weight.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_device_of_the_original():
    model = _network().cuda().to(memory_format=torch.channels_last)
    folded, _ = fold(model, torch.zeros(1, 4, 9, 9, device="cuda"))
    assert {t.device.type for t in folded.state_dict().values()} == {"cuda"}
    x = torch.randn(2, 4, 9, 9, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-2, atol=1e-2)
