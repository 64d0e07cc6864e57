"""`fold` is the exact inverse of `expand`: one conv of the original's geometry, for any padding."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from tinydet.reparam import BLOCKS, expand, fold

_SIDES = st.integers(1, 6)
_STEPS = st.tuples(st.integers(1, 2), st.integers(1, 2))


@st.composite
def _convs(draw):
    """A small conv of any kernel, stride, dilation, padding and number of groups."""
    stride = draw(_STEPS)
    numbers = st.one_of(st.integers(0, 3), st.tuples(st.integers(0, 2), st.integers(0, 2)))
    padding = draw(
        st.one_of(*([st.just("same")] * 2 if stride == (1, 1) else []), st.just("valid"), numbers)
    )
    channels, out = draw(st.sampled_from([(4, 4), (4, 8), (2, 4), (3, 3)]))
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    kernel, dilation = (draw(_SIDES), draw(_SIDES)), draw(_STEPS)
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, draw(st.booleans()))


def _geometry(conv):
    """What the conv computes: "same" is as many zeros in all as its span, "valid" none."""
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    zeros = {"same": spans, "valid": [0, 0]}.get(conv.padding) or [2 * p for p in conv.padding]
    # The distance between taps is nothing where there is one.
    dilation = [d if k > 1 else 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return type(conv), conv.weight.shape, conv.stride, zeros, dilation, conv.groups


def _check_inverse(conv, block, randomise, seed):
    torch.manual_seed(seed)
    before = [(conv.in_channels, 19, 22), (conv.in_channels, 14, 15), (conv.in_channels, 24, 17)]
    try:
        expanded = randomise(expand(nn.Sequential(conv), block).double(), seed).eval()
    except ValueError as error:
        # Only where the block has no branch for this kernel: it does not depend on the padding.
        assert "grows on none" in str(error)  # noqa: PT017
        assert min(conv.kernel_size) == 1
        return False
    folded, report = fold(expanded, torch.randn(1, *before[0]))
    assert report.kept == ()
    assert [type(m) for m in folded.modules()] == [nn.Sequential, type(conv)]
    assert _geometry(folded[0]) == _geometry(conv)
    for images, shape in enumerate(before, 1):
        x = torch.randn(images, *shape, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(folded(x), expanded(x), rtol=1e-9, atol=1e-9)
    again, report = fold(folded, torch.randn(1, *before[1]))
    assert report.folded == ()
    assert _geometry(again[0]) == _geometry(conv)
    return True


@given(conv=_convs(), block=st.sampled_from(sorted(BLOCKS)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_conv_comes_back(conv, block, seed, randomise_any):
    assume(_check_inverse(conv, block, randomise_any, seed))


@pytest.fixture(scope="module")
def randomise_any():
    from .conftest import _randomise

    return _randomise


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 4, padding="same"),
        nn.Conv2d(4, 4, (2, 3), padding="same", groups=2),
        nn.Conv2d(4, 4, (4, 2), padding="same", dilation=(1, 2)),
        nn.Conv2d(4, 4, 3, padding="valid"),
        nn.Conv2d(4, 4, 4, 2, padding="valid", dilation=2),
        nn.Conv2d(4, 4, (2, 4), (2, 1), (1, 0)),
        Conv2dSame(4, 4, 4, stride=1),
    ],
    ids=str,
)
def test_even_kernels_and_paddings_by_name(conv, block, randomise):
    assert _check_inverse(conv, block, randomise, seed=1)


@pytest.mark.parametrize("block", sorted(BLOCKS.keys() - {"acnet", "large-kernel"}))
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, (1, 4), padding="same"),
        nn.Conv2d(4, 4, (4, 1), padding="same", dilation=(1, 2)),
        Conv2dSame(4, 4, (1, 3), stride=2, dilation=2),
    ],
    ids=str,
)
def test_a_row_or_column_of_taps(conv, block, randomise):
    assert _check_inverse(conv, block, randomise, seed=2)


def test_padding_at_the_end_is_added_once_and_seen_by_all_branches():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 2, padding="same").double()
    expanded = expand(conv, "repvgg")
    twice = expand(expanded, "repvgg")
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    for grown in (expanded, twice):
        assert torch.equal(grown.eval()(x), conv(x))
        assert grown.padding == (0, 0)  # of the conv behind the padding
    assert conv.padding == "same"
    assert len(twice.branches) == 4
    # The identity is the tap that torch's kernel has on the pixel itself.
    nn.init.ones_(expanded.branches[1][-1].weight)
    identity = expanded.branches[1][-1]
    torch.testing.assert_close(expanded(x), conv(x) + identity(x))
