"""Networks whose code names a floating dtype, folded in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import fold
from tinydet.reparam.exact import exact_arithmetic

from .reference_blocks import assert_same
from .small_networks import Net, conv

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize(
    "make",
    [
        lambda d: torch.zeros(2, dtype=d),
        lambda d: torch.arange(3, dtype=d),
        lambda d: torch.linspace(0, 1, 3, dtype=d),
        lambda d: torch.full((2,), 0.1, dtype=d),
        lambda d: torch.eye(2, dtype=d),
        lambda d: torch.tensor([0.1], dtype=d),
        lambda d: torch.ones(2).new_tensor([1], dtype=d),
        lambda d: torch.ones(2).new_zeros(2, dtype=d),
        lambda d: torch.zeros_like(torch.ones(2), dtype=d),
        lambda d: torch.ones(2).to(d),
        lambda d: torch.ones(2).half().to(d).float(),
        lambda d: torch.ones(2).sum(dtype=d),
        lambda d: torch.ones(2).cumsum(0, dtype=d),
        lambda d: torch.ones(2).softmax(0, dtype=d),
        lambda d: torch.from_numpy(np.ones(2, "float32")).to(d),
    ],
)
def test_every_float_is_float64(make, dtype):
    with exact_arithmetic():
        assert make(dtype).dtype == torch.float64


def test_other_dtypes_stay():
    with exact_arithmetic():
        assert torch.arange(3).dtype == torch.int64
        assert torch.zeros(2, dtype=torch.int32).dtype == torch.int32
        assert torch.ones(2, dtype=torch.bool).dtype == torch.bool
        assert torch.tensor([1, 2], dtype=torch.uint8).dtype == torch.uint8
        assert torch.equal(torch.tensor([1.7, -1.7]).to(torch.int64), torch.tensor([1, -1]))
        assert (torch.ones(2) > 0).dtype == torch.bool
        assert torch.zeros(2, dtype=torch.complex64).dtype == torch.complex128


def test_values_are_not_rounded():
    with exact_arithmetic():
        third = torch.full((1,), 1 / 3, dtype=torch.float16)
        assert third.item() == 1 / 3
        assert third.bfloat16().float().item() == 1 / 3
    assert torch.ones(2).half().dtype == torch.float16  # nothing stays behind


def _sampled(self, x):
    y = self.norm(self.conv(x))
    rows = torch.linspace(-1, 1, y.shape[2], dtype=torch.float32)
    columns = torch.linspace(-1, 1, y.shape[3], dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    grid = grid.expand(len(y), -1, -1, -1).to(y.dtype if self.casts else torch.float32)
    return F.grid_sample(y, 0.9 * grid, align_corners=True)


def _weighted(self, x):
    y = self.norm(self.conv(x))
    places = torch.arange(y.shape[3], dtype=torch.float32)
    return y.float() @ torch.stack([places, torch.zeros(y.shape[3], dtype=torch.float32)], 1)


def _half(self, x):
    return self.norm(self.conv(x)).bfloat16().relu().half().float() @ torch.ones(
        x.shape[3], 2, dtype=torch.float32
    )


@pytest.mark.parametrize("way", [_sampled, _weighted, _half])
def test_fold__of_a_network_that_names_dtypes(way, randomise):
    model = Net(way, conv=conv(), norm=nn.BatchNorm2d(4))
    model.casts = False
    model = randomise(model).eval()
    x = torch.randn(2, 4, 9, 7)
    folded, report = fold(model, x)
    assert report.norms_after == 0
    assert report.max_rel < 1e-12
    with torch.no_grad():
        assert_same(model(x), folded(x), 1e-4 if way is not _half else 3e-2)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_convolutions_are_those_of_torch(stride, dilation, multiplier, bias):
    shape = {"stride": stride, "dilation": dilation, "groups": 16, "bias": bias}
    for kernel, padding in (((3, 3), (1, 1)), ((2, 5), (0, 3)), ((1, 1), 0), ((4, 1), "valid")):
        conv = nn.Conv2d(16, 16 * multiplier, kernel, padding=padding, **shape).double()
        for size in ((9, 9), (12, 7)):
            x = torch.randn(2, 16, *size, dtype=torch.float64)
            expected = conv(x)
            with torch.no_grad(), exact_arithmetic():
                torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), exact_arithmetic(), pytest.raises(RuntimeError):
        conv(torch.randn(1, 16, 1, 3, dtype=torch.float64))
