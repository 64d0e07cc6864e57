import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from tinydet.deployment.fixed_padding import with_fixed_padding


def _images(*sizes):
    return [torch.randn(1, 3, *size) for size in sizes]


def test_same_function_at_every_size_of_whole_strides():
    model = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    fixed = with_fixed_padding(model, _images((64, 96), (128, 32)))
    assert any(isinstance(m, Conv2dSame) for m in model.modules())
    assert not any(isinstance(m, Conv2dSame) for m in fixed.modules())
    with torch.no_grad():
        for images in _images((32, 32), (96, 160)):
            for a, b in zip(model(images), fixed(images), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2])
def test_one_convolution(kernel, dilation):
    torch.manual_seed(0)
    conv = Conv2dSame(3, 6, kernel, stride=2, dilation=dilation, groups=3).eval()
    fixed = with_fixed_padding(nn.Sequential(conv), _images((8, 12), (32, 16)))
    assert type(fixed[0]) is not Conv2dSame
    (x,) = _images((20, 18))
    torch.testing.assert_close(fixed(x), conv(x))


def test_padding_that_varies_is_left_alone():
    conv = nn.Sequential(Conv2dSame(3, 4, 3, stride=2)).eval()
    assert type(with_fixed_padding(conv, _images((8, 8), (9, 9)))[0]) is Conv2dSame


def test_other_networks_are_returned_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert with_fixed_padding(model, _images((8, 8))) is model
