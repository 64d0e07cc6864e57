"""What is affine, what is a parallel branch, what a network costs."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinydet.reparam.affine import branch_sums, crops, is_affine, multiply_adds
from tinydet.reparam.dataflow import observe


class _Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.pool = nn.BatchNorm2d(4), nn.AvgPool2d(3, 1, 1)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def _observed(way):
    return observe(_Net(way).eval(), (torch.randn(2, 4, 6, 6),), is_leaf=lambda _: False)


@pytest.mark.parametrize(
    ("count", "way"),
    [
        (1, lambda m, x: m.a(x) + m.b(x)),
        (1, lambda m, x: x + m.norm(m.b(x))),
        (1, lambda m, x: m.a(x).sub_(m.pool(x))),
        (2, lambda m, x: m.a(x) + m.b(x) + m.norm(x)),
        (1, lambda m, x: m.a(x) * 2 + m.b(x)),
        (0, lambda m, x: x + m.pool(x)),
        (0, lambda m, x: m.a(x) + m.b(x.relu())),
        (0, lambda m, x: m.a(x).relu() + m.b(x)),
        (0, lambda m, x: (lambda y: (y + m.b(x), y))(m.a(x))),
        (0, lambda m, x: m.a(x) + 1),
        (0, lambda m, x: m.a(x) * m.b(x)),
    ],
)
def test_branch_sums(count, way):
    assert len(branch_sums(_observed(way))) == count


def _transposed(layer, x, scale=1.0):
    return (scale * layer(x.transpose(1, 2))).transpose(1, 2)


@pytest.mark.parametrize(
    ("count", "way"),
    [
        (1, lambda m, x: m.a(x) + m.b(x)),
        (1, lambda m, x: x + m.a(x) * m.scale),
        (1, lambda m, x: m.a(x[:, 0]) + m.b(x[:, 0])),
        (1, lambda m, x: (lambda y, z: m.part(y) + m.part(z))(*x[:, 0].clone().chunk(2, 1))),
        (0, lambda m, x: m.a(x[:, 0]) + m.b(x[:, 1])),  # of two tokens
        (0, lambda m, x: x + _transposed(m.tokens, x) * m.scale),  # as in ResMLP
    ],
)
def test_branch_sums__linear_layers(count, way):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.part = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 6)
            self.tokens, self.scale = nn.Linear(5, 5), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return way(self, x)

    for memory in (torch.randn(2, 5, 6), torch.randn(2, 6, 5).transpose(1, 2)):
        found = branch_sums(observe(Net().eval(), (memory,), is_leaf=lambda _: False))
        assert len(found) == count


@pytest.mark.parametrize(
    ("affine", "way"),
    [
        (True, lambda m, x: m.norm(m.a(x)) * 2 - x / 3),
        (True, lambda m, x: torch.cat([x, m.b(x)], 1).transpose(1, 2)),
        (True, lambda m, x: F.pad(m.a(x), (1, 1)) + m.b.bias.exp().sum()),
        (False, lambda _, x: x * x),
        (False, lambda _, x: 1 / x),
        (False, lambda m, x: m.a(x).relu_()),
        (False, lambda _, x: F.batch_norm(x, None, None, training=True)),
        (False, lambda _, x: x @ x),
        (False, lambda _, x: torch.div(x, 2, rounding_mode="floor")),
    ],
)
def test_is_affine(affine, way):
    flow = _observed(way)
    data = flow.depends_on_input()
    varying = [op for op in flow.ops if any(view.value in data for view in op.inputs)]
    assert all(is_affine(op, data) for op in varying) == affine


@pytest.mark.parametrize(
    ("cropped", "way"),
    [
        (True, lambda m, x: m.a(x[:, :, :3])),
        (True, lambda m, x: m.a(x)[:1]),
        (False, lambda m, x: m.a(x[:, :, 1:-1])),
        (False, lambda m, x: m.a(x) + torch.cat([x[:, :2], x[:, 2:]], 1)),
        (False, lambda m, x: _bordered(m.a(x))),
    ],
)
def test_crops(cropped, way):
    flow = _observed(way)
    assert crops(flow.ops, flow.depends_on_input(), flow.outputs[0]) == cropped


def _bordered(x):
    x = F.pad(x, (1, 1, 1, 1))
    x[:, :, :1] = 0.5
    return x


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_byobnet", "levit_128s"])
def test_multiply_adds__half_of_the_flops_torch_counts(name):
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    # torch counts nothing of the fused attention of some CPUs.
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    flow = observe(model, (x,), is_leaf=lambda _: False)
    assert multiply_adds(flow.ops) * 2 == counter.get_total_flops()


def test_multiply_adds__transposed_and_grouped():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 3, groups=2))
    flow = observe(model, (torch.randn(1, 4, 6, 6),), is_leaf=lambda _: False)
    assert multiply_adds(flow.ops) == 4 * 4 * 8 * 2 * 9 + 4 * 4 * 8 * 3 * 9


class _Attention(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x, need_weights=False)[0]


def test_multiply_adds__attention_in_one_kernel():
    # B images, N places, D channels: four projections, and two products of all places with all.
    b, n, d = 2, 7, 24
    flow = observe(_Attention().eval(), (torch.randn(b, n, d),), is_leaf=lambda _: False)
    assert multiply_adds(flow.ops) == 4 * b * n * d * d + 2 * b * n * n * d


def test_multiply_adds__attention_of_other_places():
    class Cross(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3])

    flow = observe(Cross(), (torch.randn(2, 4, 7, 8),), is_leaf=lambda _: False)
    assert multiply_adds(flow.ops) == 2 * (2 * 4 * 7 * 3 * 8)
