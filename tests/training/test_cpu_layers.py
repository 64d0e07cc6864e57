import copy

import pytest
import torch
from torch import nn

from tinydet.reparam import expand
from tinydet.training.cpu_layers import prepare_for_cpu


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 1, stride=2, bias=False),
        nn.Conv2d(3, 8, 1, stride=(2, 3), padding=(1, 0)),
        nn.Conv2d(4, 8, 1, stride=2, groups=2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        expand(nn.Conv2d(3, 8, 1, stride=2), "mobileone"),
        expand(nn.Conv2d(8, 8, 3, padding=1, groups=8), "dbb"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_function_gradient_and_names_stay(conv, bfloat16):
    other = copy.deepcopy(conv)
    prepare_for_cpu(other, bfloat16)
    assert list(other.state_dict()) == list(conv.state_dict())
    # Contiguous: the original is safe in this layout.
    x = torch.randn(2, conv.in_channels, 11, 13)
    outputs = [layer(x) for layer in (conv, other)]
    torch.testing.assert_close(outputs[1], outputs[0])
    weight = torch.randn_like(outputs[0])
    grads = [
        torch.autograd.grad((out * weight).sum(), layer.weight)[0]
        for out, layer in zip(outputs, (conv, other), strict=True)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [None, "repvgg"])
def test_the_dangerous_convolution_never_reaches_onednn_in_channels_last(block):
    layer = nn.Conv2d(3, 48, 1, stride=2, bias=False)
    layer = layer if block is None else expand(layer, block)
    layer = layer.to(memory_format=torch.channels_last)
    prepare_for_cpu(layer, bfloat16=False)
    seen = []
    real = torch.nn.functional.conv2d

    def spy(x, weight, bias=None, stride=1, *args, **kwargs):
        seen.append(stride)
        return real(x, weight, bias, stride, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", spy)
        x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
        layer(x).sum().backward()
    assert set(seen) == {1}


def test_bfloat16_is_kept_from_depthwise_convs_that_are_slow_in_it():
    convs = {
        "dense": nn.Conv2d(8, 8, 3),
        "depthwise": nn.Conv2d(8, 8, 5, groups=8),
        "strided scale": nn.Conv2d(16, 16, 1, stride=2, groups=16),
        "scale": nn.Conv2d(8, 8, 1, groups=8),
    }
    for conv in convs.values():
        prepare_for_cpu(conv, bfloat16=True)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = {
            name: conv(torch.randn(2, conv.in_channels, 9, 9)).dtype for name, conv in convs.items()
        }
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "depthwise",
        "strided scale",
    }
