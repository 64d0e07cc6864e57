"""The mean output of the network with rounded weights is that of the float network."""

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tinydet.deployment.bias_correction import correct_biases, rounded  # noqa: E402
from tinydet.deployment.onnx_graph import find_convs, store_conv  # noqa: E402
from tinydet.deployment.runtime import open_session  # noqa: E402


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
    model = torch.onnx.export(net, (x,), dynamo=True, verbose=False, opset_version=18).model_proto
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
