"""Branches inside the weight: the function, gradients and training of branches beside the conv."""

import copy
from functools import cache, partial
from itertools import product

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import prune

from tinydet.reparam import BLOCKS, expand, fold
from tinydet.reparam.branches import taps

from .beside import beside, random_scales, renamed

online = partial(expand, online=True)


def _maps(output):
    return list(output) if isinstance(output, (list, tuple)) else [output]


# Dense, depthwise, grouped and dilated convs, with fixed padding and with Conv2dSame's.
BACKBONES = {
    "test_efficientnet": {},
    "test_resnet": {},
    "test_resnet dilated": {"output_stride": 8},
    "test_convnext": {},
    "test_byobnet": {},
    "lcnet_035": {},
    "tinynet_e": {},
    "mnasnet_small": {},
    "ghostnet_050": {},
    "regnetx_002": {},
    "inception_next_atto": {},
    "tf_mobilenetv3_small_minimal_100": {},
}


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
}


@cache
def _backbone(name):
    torch.manual_seed(0)
    return timm.create_model(name.split()[0], features_only=True, **BACKBONES[name]).double()


@cache
def _folded(name):
    return fold(_backbone(name).eval(), torch.randn(1, 3, 48, 56, dtype=torch.float64))


def _train(network, optimizer, images):
    """Take a step on each batch; return the names of what had a gradient in the first two."""
    learning = set()
    for step, x in enumerate(images):
        optimizer.zero_grad()
        # The logarithm: a large loss would have gradients with which training diverges.
        sum(y.square().mean().log1p() for y in _maps(network(x))).backward()
        if step < 2:
            learning |= {
                n for n, p in network.named_parameters() if p.requires_grad and p.grad.any()
            }
        optimizer.step()
    return learning


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "name",
    [n if n == "test_efficientnet" else pytest.param(n, marks=pytest.mark.slow) for n in BACKBONES],
)
def test_an_online_network_is_the_one_with_branches_beside_its_convs(name, block, randomise):
    """From the first step to the last, of SGD and of AdamW, and after folding."""
    model = randomise(copy.deepcopy(_backbone(name)))
    torch.manual_seed(1)
    grown = online(model, block)
    steps = 20 if name == "test_efficientnet" else 5
    images = torch.randn(steps, 1, 3, 48, 56, dtype=torch.float64)
    for mode in (False, True):
        outputs = [copy.deepcopy(m).train(mode)(images[:2, 0]) for m in (model, grown)]
        for plain, own in zip(*map(_maps, outputs), strict=True):
            torch.testing.assert_close(own, plain, rtol=0, atol=1e-6)
    for make in OPTIMIZERS.values():
        # In eval mode: statistics of so few values would make rounding errors grow by the step.
        one, other = copy.deepcopy(grown).eval(), beside(grown).eval()
        learning = _train(one, make(one.parameters()), images)
        assert learning >= {
            n for n, p in one.named_parameters() if p.requires_grad and ".branches." in n
        }
        _train(other, make(other.parameters()), images)
        found = dict(other.named_parameters())
        for n, p in one.named_parameters():
            # Adam divides by gradients that may be of the size of rounding.
            torch.testing.assert_close(p, found[renamed(n)], rtol=1e-7, atol=1e-7)
        _assert_same_maps(one, other, images[0])
    folded, report = fold(one, images[0])
    plain, of_plain = _folded(name)
    for figure in ("norms_after", "macs_after", "params_after"):
        assert getattr(report, figure) == getattr(of_plain, figure)
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (folded, plain)]
    assert shapes[0] == shapes[1]
    _assert_same_maps(folded, other, images[0])


@torch.no_grad()
def _assert_same_maps(one, other, x):
    for a, b in zip(_maps(one(x)), _maps(other(x)), strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


@pytest.mark.parametrize("block", BLOCKS)
def test_the_kernel_is_that_of_the_branches_on_any_conv(block):
    """Also where a branch's taps lie off the middle, and where it starts inside the input."""
    torch.manual_seed(0)
    kernels, groups = (1, 2, 3, 7, (3, 5), (11, 1)), ((1, 4, 4), (2, 4, 8), (4, 4, 4))
    compared = 0
    for kernel, stride, padding, dilation, (group, c_in, c_out) in product(
        kernels, (1, 3), (0, 4), (1, 2), groups
    ):
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, group).double()
        if not BLOCKS[block](conv):
            continue
        grown = random_scales(online(conv, block))
        sides = [d * (k - 1) + 4 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        x = torch.randn(1, c_in, *sides, dtype=torch.float64)
        torch.testing.assert_close(grown(x), beside(grown)(x), rtol=1e-9, atol=1e-9)
        compared += 1
    assert compared >= 72


@pytest.mark.parametrize("block", BLOCKS)
def test_branches_of_plain_layers_run_no_layer_on_an_input(block):
    """Their kernel is composed from weights: no impulses, and no loop over channels."""
    grown = online(nn.Conv2d(64, 64, 5, 2, 2), block)
    ran = []
    for module in grown.parametrizations.modules():
        if isinstance(module, (nn.Conv2d, nn.AvgPool2d)):
            module.register_forward_hook(lambda *_: ran.append(1))
    with torch.profiler.profile() as profile:
        assert grown.weight.shape == (64, 64, 5, 5)
    assert not ran
    assert len(profile.events()) < 200


class _Shift(nn.Module):
    """Its own arithmetic: the difference to the pixel on the left, times a weight."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x):
        return self.weight * (x - F.pad(x, (1, 0, 0, 0))[..., :-1])


def _axes(conv):
    return zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)


def _differences(conv):
    """A branch of three of its layers; the crop leaves the middle tap and the one before it."""
    crop = [p - k // 2 * d for k, p, d in _axes(conv)]
    mix = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, 0, 1, conv.groups)
    pads = nn.ZeroPad2d((crop[1], crop[1], crop[0], crop[0]))
    return [nn.Sequential(pads, _Shift(conv.in_channels), mix), taps(conv, (1, 1))]


OWN = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 8, 3, 2, 1, groups=2),
    nn.Conv2d(4, 4, 5, 3, 2, groups=4),
]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(4, 4, 1, bias=False), nn.AvgPool2d(3, 2, 1, divisor_override=5)],
        [nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)],
        [nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)],
        [nn.ZeroPad2d(1), nn.Conv2d(4, 4, (3, 1), (2, 1)), nn.Conv2d(4, 4, (1, 3), (1, 2))],
        [nn.Sequential(nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 4, 1)), nn.AvgPool2d(3, 2, 1)],
    ],
    ids=str,
)
def test_unusual_layers_have_their_kernel(layers):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, 2, 1).double()
    grown = random_scales(online(conv, lambda _: [nn.Sequential(*copy.deepcopy(layers))]))
    for size in (9, 10):
        x = torch.randn(2, 4, size, size + 1, dtype=torch.float64)
        torch.testing.assert_close(grown(x), beside(grown)(x))


@pytest.mark.parametrize("conv", OWN, ids=str)
def test_ones_own_branch_is_read_off_its_response_to_impulses(conv):
    torch.manual_seed(0)
    grown = random_scales(online(conv.double(), _differences))
    reference = beside(grown)
    for size in (12, 13):
        x = torch.randn(2, 4, size, size + 1, dtype=torch.float64)
        y, expected = grown(x), reference(x)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    expected.square().sum().backward()
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    for name, p in grown.named_parameters():
        torch.testing.assert_close(p.grad, gradients[renamed(name)], rtol=1e-9, atol=1e-9)


def test_a_pruned_branch_stays_pruned():
    torch.manual_seed(0)
    grown = random_scales(online(nn.Conv2d(4, 4, 3, padding=1).double(), "acnet"))
    reference = beside(grown)
    mask = torch.rand(4, 4, 3, 1) > 0.5
    for branches in (grown.parametrizations.weight[0].branches, reference.kernels.branches):
        column = branches[0][0]
        prune.custom_from_mask(column, "weight", mask)
        with torch.no_grad():
            column.weight_orig.mul_(2)  # As an optimizer does: pruning multiplies in each call.
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(grown(x), reference(x))


REFUSED = {
    "not linear": [nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU()],
    "dropout": [nn.Conv2d(4, 4, 3, 1, 1), nn.Dropout(0.5)],
    "group norm": [nn.Conv2d(4, 4, 3, 1, 1), nn.GroupNorm(1, 4)],
    "a batch norm of another class": [
        nn.Conv2d(4, 4, 3, 1, 1),
        BatchNormAct2d(4, apply_act=False),
    ],
    "five taps for a conv of three": [nn.Conv2d(4, 4, 5, 1, 2)],
    "beyond the last tap": [nn.ZeroPad2d((0, 2, 0, 2)), nn.Conv2d(4, 4, 3)],
    "dilated beyond the conv": [nn.Conv2d(4, 4, 3, 1, 2, 2)],
    "another border": [nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect")],
    "average of the inside": [nn.AvgPool2d(3, 1, 1, count_include_pad=False)],
}


@pytest.mark.parametrize("layers", REFUSED.values(), ids=REFUSED)
def test_a_branch_that_is_no_kernel_on_the_taps_is_refused_in_one_line(layers):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match=r"a branch of 0 is not a kernel on the conv's taps") as e:
        online(model, lambda _: [nn.Sequential(*copy.deepcopy(layers))])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_a_pool_that_rounds_its_size_up_is_refused(kernel):
    """On some sizes only it has another output than the conv."""
    conv = nn.Conv2d(4, 4, kernel, kernel)
    with pytest.raises(ValueError, match="is not a kernel on the conv's taps"):
        online(conv, lambda _: [nn.AvgPool2d(kernel, kernel, ceil_mode=True)])


def test_a_branch_that_mixes_groups_is_refused():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    online(conv, lambda _: [nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1, groups=2)])
    with pytest.raises(ValueError, match="a branch of the model is not a kernel"):
        online(conv, lambda _: [nn.Conv2d(4, 4, 1)])


def test_biases_and_norms_of_ones_own_branch_become_scales():
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, 1, 1))
    grown = online(nn.Conv2d(4, 4, 3, padding=1), lambda _: [own])
    assert set(grown.state_dict()) == {
        "bias",
        "parametrizations.weight.original",
        *(f"parametrizations.weight.0.branches.0.{i}.weight" for i in range(4)),
    }


def test_the_fixed_filters_of_orepa_do_not_learn_and_are_cosines():
    grown = online(nn.Conv2d(4, 8, 3, padding=1), "orepa")
    fixed = [p for p in grown.parameters() if not p.requires_grad]
    assert [p.shape for p in fixed] == [(8, 1, 3, 3)]
    basis = [torch.tensor([1.0, 0, -1]) * 0.75**0.5, torch.tensor([1.0, -2, 1]) / 2]
    for channel, found in enumerate(fixed[0][:, 0]):
        wave = basis[channel % 4 % 2].expand(3, 3)
        torch.testing.assert_close(found, wave.T if channel < 4 else wave)


@pytest.mark.parametrize("inside", [False, True])
def test_branches_start_at_a_scale_that_is_given(inside):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    grown = expand(conv, "repvgg", online=inside, scale=0.5).eval()
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    branches = grown.parametrizations.weight[0].branches if inside else grown.branches
    (pointwise,) = (p for p in branches[0].parameters() if p.ndim == 4)
    branch_sum = 0.5 * (F.conv2d(x, pointwise) + x)
    if inside:  # The conv's own weight is what the branches leave.
        torch.testing.assert_close(grown(x), conv(x))
        assert all(torch.equal(s.weight, s.weight.new_full((4,), 0.5)) for *_, s in branches)
        twice = online(grown, "dbb", scale=1.0)
        torch.testing.assert_close(twice(x), conv(x))
        grown.parametrizations.weight.original = nn.Parameter(conv.weight)
        torch.testing.assert_close(grown(x), conv(x) + branch_sum)
    else:
        torch.testing.assert_close(grown(x), conv(x) + branch_sum / (1 + 1e-5) ** 0.5)


def test_a_branch_without_a_norm_of_its_own_ends_in_its_scale_in_both_forms():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    one, other = expand(conv, "qarepvgg"), online(conv, "qarepvgg")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in one.modules())
    scales = torch.randn(2, 4, dtype=torch.float64)
    kernel = torch.randn(4, 4, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        for branches in (one.branches, other.parametrizations.weight[0].branches):
            for branch, scale in zip(branches, scales, strict=True):
                branch[-1].weight.copy_(scale)
            next(branches[0].parameters()).copy_(kernel)
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    column = scales[..., None, None]
    expected = conv(x) + column[0] * F.conv2d(x, kernel) + column[1] * x
    torch.testing.assert_close(one.train()(x), expected)
    torch.testing.assert_close(other.train()(x), expected)
