"""Equalization keeps the function to the last bit; bias correction restores mean outputs."""

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tinydet.deployment.equalize import correct_biases, equalize, rounded  # noqa: E402
from tinydet.deployment.onnx_detector import open_session  # noqa: E402
from tinydet.deployment.onnx_graph import (  # noqa: E402
    channel_stats,
    find_convs,
    store_conv,
)


class _Net(nn.Module):
    """Chains with and without ReLU, a depthwise conv, a fork; what must not be touched."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4, bias=False)
        self.left, self.right = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 3, padding=1)
        self.clipped, self.last = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x):
        x = self.grouped(self.depthwise(self.dense(x).relu()).relu())
        x = self.left(x) + self.right(x)
        return self.last(nn.functional.relu6(self.clipped(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = _Net().eval()
    with torch.no_grad():
        for conv in (net.dense, net.depthwise, net.grouped, net.left):
            # Channels of very different size, as folded branches have.
            scale = 10 ** torch.empty(conv.out_channels).uniform_(-2, 2)
            conv.weight.mul_(scale.view(-1, 1, 1, 1))
            if conv.bias is not None:
                conv.bias.mul_(scale)
    return net


def _export(net, x):
    return torch.onnx.export(net, (x,), dynamo=True, verbose=False, opset_version=18).model_proto


def _spread(model, batches):
    """Return, value by value, how far the channels' largest magnitudes are apart."""
    names = [conv.node.input[0] for conv in find_convs(model).values()]
    stats = channel_stats(model, names[1:], batches)
    return {name: float(np.log2(s.largest[s.largest > 0]).std()) for name, s in stats.items()}


def test_channels_are_nearer_and_the_function_is_the_same_to_the_last_bit(net):
    x = torch.randn(2, 3, 16, 16)
    model = _export(net, x)
    session = open_session(model)
    name = session.get_inputs()[0].name
    before, spread = session.run(None, {name: x.numpy()})[0], _spread(model, [x])
    assert equalize(model, [x]) == 3  # dense, depthwise, grouped
    onnx.checker.check_model(model, full_check=True)
    after = open_session(model).run(None, {name: x.numpy()})[0]
    # Products with powers of two are exact.
    np.testing.assert_array_equal(after, before)
    nearer = _spread(model, [x])
    balanced = [key for key in spread if nearer[key] < 0.6 * spread[key]]
    assert len(balanced) == 3, (spread, nearer)
    # What a sum or a cap reads is as it was.
    assert sum(nearer[key] == spread[key] for key in spread) == len(spread) - 3


def test_the_factors_are_those_of_the_formula():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([64.0, 0.25]).view(2, 1, 1, 1))
        net[2].weight.copy_(torch.tensor([1.0, 1.0]).view(1, 2, 1, 1))
    x = torch.ones(1, 1, 4, 4)
    model = _export(net, x)
    assert equalize(model, [x]) == 1
    first, second = find_convs(model).values()
    # Values 64 and 1/4 are 16 and 1/16 times their geometric mean, the weights equal: by the square
    # roots, 4 and 1/4, the eight bits between the channels are shared by values and weights.
    assert first.weight.reshape(-1).tolist() == [16.0, 1.0]
    assert second.weight.reshape(-1).tolist() == [4.0, 0.25]


def test_a_dead_channel_is_left_alone():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        net[0].weight[1] = -1
        net[0].bias[1] = 0
    x = torch.ones(1, 1, 4, 4)
    model = _export(net, x)
    equalize(model, [x])
    first, _ = find_convs(model).values()
    assert first.weight.reshape(-1)[1] == -1


def _mean_output(model, x):
    session = open_session(model)
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return out.mean(axis=(0, 2, 3))


def _with_rounded_weights(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for conv in find_convs(copy).values():
        conv.weight = rounded(conv.weight)
        store_conv(copy, conv)
    return copy


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_the_shift_of_the_mean_is_gone(groups, bias):
    torch.manual_seed(0)
    net = nn.Conv2d(8, 16, 3, groups=groups, bias=bias).eval()
    with torch.no_grad():
        net.weight[:, :, 1, 1] += 20  # the rest has few of the 8 bits, as after folding
    x = torch.rand(4, 8, 12, 12) + 2  # far from zero, as after ReLU
    x[:, ::2] *= 3
    model = _export(net, x)
    expected = _mean_output(model, x)
    plain = np.abs(_mean_output(_with_rounded_weights(model), x) - expected)
    correct_biases(model, [x, x])
    onnx.checker.check_model(model, full_check=True)
    corrected = np.abs(_mean_output(_with_rounded_weights(model), x) - expected)
    assert corrected.max() < 0.05 * plain.max()


def test_rounded_is_what_onnxruntime_makes_of_a_weight():
    from onnxruntime.quantization.quant_utils import QuantType, quantize_data

    weight = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)
    for row, channel in zip(rounded(weight), weight, strict=True):
        *_, scale, quantized = quantize_data(
            channel.reshape(-1), QuantType.QInt8.tensor_type, symmetric=True
        )
        np.testing.assert_allclose(row.reshape(-1), quantized * scale, rtol=1e-5, atol=1e-7)
    weight[3] = 0
    assert not rounded(weight)[3].any()
