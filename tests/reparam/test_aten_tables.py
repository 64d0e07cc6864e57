"""The tables of operation names, against the operations that this version of torch runs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinydet.reparam import affine, channelwise_ops, fuse_affine
from tinydet.reparam.dataflow import SIZE_ONLY, observe

_A = torch.ones(6, 6)

# A use of each operation on an input (2, 4, 6, 6), as a network would write it where it can.
_USES = {
    "add": lambda x: x + 1,
    "add_": lambda x: x.clone().add_(1),
    "sub": lambda x: x - 1,
    "sub_": lambda x: x.clone().sub_(1),
    "rsub": lambda x: 1 - x,
    "neg": lambda x: -x,
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "clone": lambda x: x.clone(),
    "copy": lambda x: torch.ops.aten.copy(torch.empty_like(x), x),
    "copy_": lambda x: torch.empty(x.shape).copy_(x),
    "constant_pad_nd": lambda x: F.pad(x, (1, 1)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x[None], 2),
    "fill_": lambda x: x.clone().fill_(0),
    "zero_": lambda x: x.clone().zero_(),
    "_to_copy": lambda x: x.to("cpu", copy=True),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:1], 0, 0, 1),
    "select_scatter": lambda x: torch.select_scatter(x, x[0], 0, 0),
    "index_select": lambda x: x.index_select(1, torch.arange(2)),
    "mul": lambda x: x * 2,
    "mul_": lambda x: x.clone().mul_(2),
    "div": lambda x: x / 2,
    "div_": lambda x: x.clone().div_(2),
    "mm": lambda x: F.linear(x, _A),
    "bmm": lambda x: x[0] @ _A.expand(4, 6, 6),
    "addmm": lambda x: F.linear(x[0, 0], _A, _A[0]),
    "baddbmm": lambda x: torch.baddbmm(_A[0], x[0], _A.expand(4, 6, 6)),
    "addcmul": lambda x: torch.addcmul(x, _A, x),
    "addcmul_": lambda x: x.clone().addcmul_(_A, x),
    "convolution": lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3)),
    "native_batch_norm": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "view": lambda x: x.flatten(1),
    "_unsafe_view": lambda x: F.linear(x, _A),
    "_reshape_alias": lambda x: torch.ops.aten._reshape_alias(x, (8, 36), (36, 1)),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.mT,
    "t": lambda x: x[0, 0].t(),
    "squeeze": lambda x: x[:1].squeeze(0),
    "unsqueeze": lambda x: x[None],
    "expand": lambda x: x[:1].expand(2, 4, 6, 6),
    "slice": lambda x: x[:1],
    "split": lambda x: x.chunk(2, 1),
    "split_with_sizes": lambda x: x.split([1, 3], 1),
    "alias": lambda x: torch.ops.aten.alias(x),
    "detach": lambda x: x.detach(),
}
# Linear on each channel, but not the same for all positions or sizes.
_CHANNELWISE = {
    "mean": lambda x: x.mean((2, 3)),
    "_adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "_adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 2),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll(1, 2),
    "index": lambda x: x[:, [2, 0]],
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "upsample_linear1d": lambda x: F.interpolate(x[0], scale_factor=2, mode="linear"),
    "upsample_bilinear2d": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "upsample_bicubic2d": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "upsample_trilinear3d": lambda x: F.interpolate(x[None], scale_factor=2, mode="trilinear"),
}
for _axes in (1, 2, 3):
    _CHANNELWISE |= {
        f"upsample_nearest{_axes}d": lambda x: F.interpolate(x, scale_factor=2),
        f"_upsample_nearest_exact{_axes}d": lambda x: F.interpolate(
            x, scale_factor=2, mode="nearest-exact"
        ),
        f"reflection_pad{_axes}d": lambda x: F.pad(x, (1,) * 2 * (x.ndim - 2), mode="reflect"),
        f"replication_pad{_axes}d": lambda x: F.pad(x, (1,) * 2 * (x.ndim - 2), mode="replicate"),
    }
_SIZES = {
    "empty_like": torch.empty_like,
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda x: torch.full_like(x, 2),
    "new_empty": lambda x: x.new_empty(3),
    "new_zeros": lambda x: x.new_zeros(3),
    "new_ones": lambda x: x.new_ones(3),
    "new_full": lambda x: x.new_full((3,), 2),
}


class _Use(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, x):
        return self.use(x)


def _flow(use, shape=(2, 4, 6, 6)):
    return observe(_Use(use), (torch.randn(shape),), is_leaf=lambda _: False)


@pytest.mark.parametrize("name", [*_USES, *_SIZES])
def test_operation_has_this_name_and_is_affine(name):
    flow = _flow({**_USES, **_SIZES}[name])
    found = [op for op in flow.ops if op.name == f"aten.{name}"]
    assert found, [op.name for op in flow.ops]
    assert affine.is_affine(found[0], flow.depends_on_input())


@pytest.mark.parametrize("name", _CHANNELWISE)
def test_channelwise_operation_has_this_name(name):
    shapes = {"pad1d": (4, 6, 6), "pad3d": (2, 4, 6, 6, 6)}
    shapes |= {f"{kind}{end}": shape for end, shape in (("1d", (4, 6, 6)), ("3d", (2, 4, 6, 6, 6)))
               for kind in ("nearest", "nearest_exact")}  # fmt: skip
    shape = next((s for end, s in shapes.items() if name.endswith(end)), (2, 4, 6, 6))
    assert f"aten.{name}" in [op.name for op in _flow(_CHANNELWISE[name], shape).ops]


def test_every_name_in_the_tables_is_tested():
    tables = (
        *(affine._JOINT, affine._EACH, affine._VIEWS, affine._SUMS, affine._NUMERATOR),
        *(affine._BIASED_PRODUCTS, affine._PRODUCTS, SIZE_ONLY, fuse_affine.PADS),
        *(channelwise_ops.PLACES, channelwise_ops.REARRANGEMENTS, channelwise_ops.COPIES),
        *(channelwise_ops._ELEMENTWISE,),
    )
    names = {name.removeprefix("aten.") for table in tables for name in table}
    assert names <= {*_USES, *_CHANNELWISE, *_SIZES}
