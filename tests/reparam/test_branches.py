"""Conv and branches together are one conv of the given conv's shape, and the papers' branches."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinydet.reparam.branches import BLOCKS, acnet, centre, dbb, large_kernel, mobileone, repvgg
from tinydet.reparam.expand import expand


def _one_conv(expanded, padding, shape):
    """Read kernel and bias off an affine function, and see that nothing lies beside the kernel.

    The kernel is the gradient of one output far from the border, the bias the answer to zero.
    """
    conv = nn.Conv2d(
        *(expanded.in_channels, expanded.out_channels, expanded.kernel_size, expanded.stride),
        *(padding, expanded.dilation, expanded.groups),
    ).double()
    x = torch.randn(1, conv.in_channels, *shape, dtype=torch.float64, requires_grad=True)
    y = expanded(x)
    row, column = y.shape[2] // 2, y.shape[3] // 2
    per_group = conv.in_channels // conv.groups
    with torch.no_grad():
        at_zero = expanded(torch.zeros_like(x))
        conv.bias.copy_(at_zero[0, :, 0, 0])
    left, _, top, _ = conv._reversed_padding_repeated_twice
    first = (row * conv.stride[0] - top, column * conv.stride[1] - left)
    assert min(first) >= 0, "the input is too small to tell"
    ys, xs = (
        [start + tap * step for tap in range(size)]
        for start, size, step in zip(first, conv.kernel_size, conv.dilation, strict=True)
    )
    for out in range(conv.out_channels):
        (gradient,) = torch.autograd.grad(y[0, out, row, column], x, retain_graph=True)
        group = out // (conv.out_channels // conv.groups)
        mine = slice(group * per_group, (group + 1) * per_group)
        taps = gradient[0, mine][:, ys][:, :, xs]
        assert taps.abs().sum() > 0
        assert taps.count_nonzero() == gradient.count_nonzero()
        with torch.no_grad():
            conv.weight[out] = taps
    return conv


def _check_one_conv(conv, block, randomise, size=None):
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    shape = size or tuple(2 * r + 6 for r in reach)
    expanded = randomise(expand(conv.double(), block)).eval()
    assert len(expanded.branches) > 0
    equivalent = _one_conv(expanded, conv.padding, shape)
    # One row and column more: where a stride leaves a rest, and other borders.
    for more in (0, 1):
        x = torch.randn(2, conv.in_channels, shape[0] + more, shape[1] + more, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(equivalent(x), expanded(x), rtol=1e-9, atol=1e-9)


GRID = [
    case
    for case in product(BLOCKS, (1, 3, 5, 7), (1, 2), (1, 2), (1, 2, 8))
    if (case[0], case[1]) not in {("acnet", 1), ("large-kernel", 1)}
]


@pytest.mark.parametrize(("block", "kernel", "stride", "dilation", "groups"), GRID)
def test_conv_and_branches_are_one_conv(block, kernel, stride, dilation, groups, randomise):
    torch.manual_seed(0)
    conv = nn.Conv2d(
        *(8, 8, kernel, stride, dilation * (kernel // 2), dilation, groups),
        bias=stride == 1,
    )
    _check_one_conv(conv, block, randomise)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.Conv2d(4, 8, 3, 1, 1, groups=4),
        nn.Conv2d(4, 4, 3, padding=0),
        nn.Conv2d(4, 4, 3, padding=3),
        nn.Conv2d(4, 4, 5, padding=1, dilation=2),
        nn.Conv2d(4, 4, 3, padding="valid"),
        nn.Conv2d(4, 4, 4, padding="same"),
        nn.Conv2d(4, 4, (3, 5), (2, 1), (0, 2), (2, 1)),
        nn.Conv2d(3, 4, 4, 4),
        nn.Conv2d(3, 4, 2, 2),
        nn.Conv2d(4, 4, 13, padding=6, groups=4),
        nn.Conv2d(4, 4, (5, 31), padding=(2, 15), groups=4),
    ],
    ids=str,
)
def test_any_padding_and_shape_of_the_kernel(block, conv, randomise):
    torch.manual_seed(0)
    _check_one_conv(conv, block, randomise)


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, (1, 7)), nn.Conv2d(4, 4, (11, 1), 2, (5, 0))])
@pytest.mark.parametrize("block", ["repvgg", "dbb", "mobileone", "large-kernel"])
def test_a_kernel_of_one_row_or_column(block, conv, randomise):
    torch.manual_seed(0)
    _check_one_conv(conv, block, randomise)


def _shapes(branches):
    """(kernel size, dilation) of every conv of each branch."""
    return [
        [(m.kernel_size, m.dilation[0]) for m in branch.modules() if isinstance(m, nn.Conv2d)]
        for branch in branches
    ]


ONE = ((1, 1), 1)


def test_repvgg_has_a_1x1_and_an_identity_where_the_shape_stays():
    assert _shapes(repvgg(nn.Conv2d(4, 4, 3, 1, 1))) == [[ONE], []]
    assert _shapes(repvgg(nn.Conv2d(4, 4, 1))) == [[ONE], []]
    assert _shapes(repvgg(nn.Conv2d(4, 4, 3, 2, 1))) == [[ONE]]
    assert _shapes(repvgg(nn.Conv2d(4, 8, 3, 1, 1))) == [[ONE]]


def test_acnet_has_a_column_and_a_row_and_needs_both():
    assert _shapes(acnet(nn.Conv2d(4, 8, 3, 2, 1))) == [[((3, 1), 1)], [((1, 3), 1)]]
    assert acnet(nn.Conv2d(4, 4, 1)) == acnet(nn.Conv2d(4, 4, (1, 7))) == []


def test_mobileone_has_copies_a_scale_and_an_identity():
    same = ((3, 3), 1)
    conv = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
    assert _shapes(mobileone(conv)) == [[same]] * 4 + [[ONE], []]
    assert _shapes(mobileone(conv, copies=2)) == [[same]] * 2 + [[ONE], []]
    assert _shapes(mobileone(nn.Conv2d(4, 8, 1))) == [[ONE]] * 4
    expanded = expand(conv, partial(mobileone, copies=1))
    assert len(expanded.branches) == 3


@pytest.mark.parametrize(
    ("kernel", "extents"),
    [
        # Of each smaller kernel: taps a side, and pixels it spans (arXiv 2311.15599).
        (3, [(1, 1)]),
        (5, [(3, 3), (3, 5)]),
        (7, [(5, 5), (3, 5), (3, 7)]),
        (8, [(5, 5), (3, 5), (3, 7)]),
        (9, [(5, 5), (5, 9), (3, 7), (3, 9)]),
        (11, [(5, 5), (5, 9), (3, 7), (3, 9), (3, 11)]),
        (13, [(5, 5), (7, 13), (3, 7), (3, 9), (3, 11)]),
        (31, [(5, 5), (9, 17), (3, 9), (3, 11), (3, 15)]),
    ],
)
def test_large_kernel_has_the_smaller_kernels_of_the_paper(kernel, extents):
    conv = nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=4)
    found = [
        (size[0], dilation * (size[0] - 1) + 1)
        for ((size, dilation),) in _shapes(large_kernel(conv))
    ]
    assert found == extents
    assert large_kernel(nn.Conv2d(4, 4, 1)) == []


def test_dbb_has_the_papers_branches():
    three = ((3, 3), 1)
    dense = dbb(nn.Conv2d(4, 8, 3, 1, 1))
    assert _shapes(dense) == [[ONE], [ONE, three], [ONE]]
    depthwise = dbb(nn.Conv2d(4, 4, 3, 1, 1, groups=4))
    assert _shapes(depthwise) == [[ONE], [ONE, three], []]
    assert [m.out_channels for m in depthwise[1] if isinstance(m, nn.Conv2d)] == [8, 4]
    assert _shapes(dbb(nn.Conv2d(4, 8, 1))) == [[ONE]]
    assert len(dbb(nn.Conv2d(4, 8, 3, dilation=2))) == 2
    assert len(dbb(nn.Conv2d(4, 8, (1, 3), dilation=(2, 1)))) == 3


def test_dbbs_padding_is_its_authors_padding_with_the_shift(randomise):
    torch.manual_seed(0)
    branch = randomise(dbb(nn.Conv2d(3, 4, 3, 2, 1))[1]).double().eval()
    pointwise, norm, kxk = (copy.deepcopy(layer) for layer in branch)
    pointwise.padding = (0, 0)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    shift = norm(torch.zeros(1, 3, 1, 1, dtype=torch.float64))
    inner = F.pad(norm(pointwise(x)) - shift, (1, 1, 1, 1)) + shift
    torch.testing.assert_close(branch(x), kxk(inner))


def test_dbbs_average_counts_the_padding():
    branch = dbb(nn.Conv2d(4, 4, 3, 2, 1, groups=4))[2]
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(branch(x), F.avg_pool2d(x, 3, 2, 1, count_include_pad=True))


def test_centre_is_the_middle_pixel():
    conv = nn.Conv2d(2, 2, 3, 2, 0, 2)
    branch = centre(conv)
    nn.init.dirac_(branch[-1].weight)
    x = torch.randn(1, 2, 11, 12)
    torch.testing.assert_close(branch(x), x[..., 2:-2:2, 2:-2:2])
