from __future__ import annotations

import copy
import math

import onnxruntime
import pytest
import torch
from torch import nn

from tinydet.layers import CoordinateAttention

SIZES = [(5, 7), (8, 3), (1, 6), (4, 1), (1, 1)]


def trained(identity_start, channels=6, seed=0):
    """The block as after training: no weight, bias or statistic at a special value."""
    generator = torch.Generator().manual_seed(seed)
    block = CoordinateAttention(channels, identity_start=identity_start).double().eval()
    with torch.no_grad():
        for values in [*block.parameters(), block.bn1.running_mean]:
            values.copy_(torch.randn(values.shape, generator=generator))
        block.bn1.running_var.uniform_(0.5, 2, generator=generator)
    return block


def by_the_paper(block, x, gate):
    """Equations 4 to 9 of the paper, one number at a time."""
    B, C, H, W = x.shape
    bn = block.bn1
    mid = block.conv1.out_channels
    out = torch.empty_like(x)

    def hidden(z):  # (C,) the pooled vector of one row or column -> (mid,)
        values = []
        for m in range(mid):
            v = sum(block.conv1.weight[m, c, 0, 0] * z[c] for c in range(C)) + block.conv1.bias[m]
            v = (v - bn.running_mean[m]) / math.sqrt(bn.running_var[m] + bn.eps)
            v = v * bn.weight[m] + bn.bias[m]
            values.append(v * min(max(v + 3, 0), 6) / 6)
        return values

    def gates(conv, f):
        return [
            gate(sum(conv.weight[c, m, 0, 0] * f[m] for m in range(mid)) + conv.bias[c])
            for c in range(C)
        ]

    for b in range(B):
        rows = [[sum(x[b, c, h, w] for w in range(W)) / W for c in range(C)] for h in range(H)]
        columns = [[sum(x[b, c, h, w] for h in range(H)) / H for c in range(C)] for w in range(W)]
        of_rows = [gates(block.conv_h, hidden(z)) for z in rows]
        of_columns = [gates(block.conv_w, hidden(z)) for z in columns]
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    out[b, c, h, w] = x[b, c, h, w] * of_rows[h][c] * of_columns[w][c]
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("identity_start", [False, True])
def test_is_the_papers_formula(size, identity_start):
    block = trained(identity_start, channels=3)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    top = 2 if identity_start else 1
    with torch.no_grad():
        wanted = by_the_paper(block, x, lambda z: top / (1 + math.exp(-z)))
        torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize(("channels", "mid"), [(3, 8), (256, 8), (512, 16), (96, 8), (1280, 40)])
def test_width_is_the_papers(channels, mid):
    assert CoordinateAttention(channels).conv1.out_channels == mid


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_starts_as_exactly_the_identity(training, dtype):
    block = CoordinateAttention(6).train(training).to(dtype)
    x = (5 * torch.randn(2, 6, 9, 4)).to(dtype)
    assert torch.equal(block(x), x)


def test_the_plain_start_is_not_the_identity():
    x = torch.randn(2, 6, 9, 4)
    ratio = CoordinateAttention(6, identity_start=False)(x) / x
    assert 0.1 < ratio.mean() < 0.5  # About a quarter: two sigmoids around 1/2.


@pytest.mark.parametrize("size", [(6, 5), (1, 2)])
def test_trains_away_from_the_identity_with_one_sample(size):
    torch.manual_seed(0)
    block = CoordinateAttention(6).train()
    before = copy.deepcopy(block.state_dict())
    x = torch.randn(1, 6, *size)
    # What a gate along each direction can express: another factor for each row and column.
    rows, columns = 1 + 0.5 * torch.rand(6, size[0], 1), 1 - 0.5 * torch.rand(6, 1, size[1])
    optimizer = torch.optim.Adam(block.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = (block(x) - x * rows * columns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for name in ("conv1.weight", "bn1.weight", "conv_h.weight", "conv_w.weight", "conv_h.bias"):
        assert not torch.equal(block.state_dict()[name], before[name]), name


def test_first_step_reaches_both_last_convs():
    block = CoordinateAttention(6).train()
    x = torch.randn(2, 6, 5, 4)
    (block(x) * torch.randn_like(x)).sum().backward()
    for conv in (block.conv_h, block.conv_w):
        assert (conv.weight.grad.abs().amax((1, 2, 3)) > 0).all()
        assert (conv.bias.grad.abs() > 0).all()


def test_one_sample_of_one_pixel_trains_without_an_error():
    block = CoordinateAttention(6).train()
    x = torch.randn(1, 6, 1, 1, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    assert block.bn1.running_var.isfinite().all()


def test_input_gradient():
    block = trained(identity_start=True, channels=3)
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["half", "autocast"])
def test_half_precision(dtype, way):
    block = trained(identity_start=True).float()
    with torch.no_grad():
        for conv in (block.conv1, block.conv_h, block.conv_w):
            conv.weight.mul_(0.2)
    x = torch.randn(2, 6, 16, 12)
    wanted = block(x)
    if way == "half":
        made = block.to(dtype)(x.to(dtype))
    else:
        with torch.autocast("cpu", dtype):
            made = block(x.to(dtype))
    assert made.dtype == dtype
    torch.testing.assert_close(made.float(), wanted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("identity_start", [False, True])
def test_half_precision_means_of_large_maps_do_not_overflow(identity_start):
    # The sum of a row is far outside float16.
    block = CoordinateAttention(6, identity_start=identity_start).half().eval()
    made = block(torch.full((1, 6, 64, 80), 3e4, dtype=torch.float16))
    assert made.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_same_for_any_batch_and_size():
    block = trained(identity_start=True).float()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.onnx.export(
        block, (torch.randn(2, 6, 4, 5),), dynamo=True, dynamic_shapes=(sizes,), verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for B, (H, W) in zip([1, 3, 2, 1, 4], SIZES, strict=True):
        x = torch.randn(B, 6, H, W)
        (made,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(made), block(x), rtol=1e-4, atol=1e-5)


def test_follows_a_block_of_a_network_unchanged():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()).eval()
    x = torch.randn(2, 3, 11, 9)
    assert torch.equal(nn.Sequential(network, CoordinateAttention(8)).eval()(x), network(x))


@pytest.mark.parametrize("arguments", [(0,), (8, 0)])
def test_mistakes_are_named(arguments):
    with pytest.raises(ValueError, match="give positive numbers"):
        CoordinateAttention(*arguments)
