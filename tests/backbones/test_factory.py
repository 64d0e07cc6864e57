import pytest
import timm
import torch

from tinydet.backbones.factory import create_backbone
from tinydet.config import ConfigError

# One model of each kind of timm wrapper and of layout: list, hook, getter, own class, NHWC.
NAMES = [
    "resnet18",
    "rexnet_100",
    "tf_efficientnet_lite0",
    "mobilenetv3_small_050",
    "repvgg_a0",
    "convnext_atto",
    "darknet53",
    "xception41",
    "swin_tiny_patch4_window7_224",
    "repvit_m0_9",
    "hrnet_w18_small",
]


@pytest.mark.parametrize("name", NAMES)
def test_c5_has_the_channels_and_stride_timm_says(name):
    backbone = create_backbone(name, "random", "C5")
    with torch.no_grad():
        (feature,) = backbone.module.eval()(torch.zeros(1, 3, 64, 96))
    assert backbone.stride == 32
    assert feature.shape == (1, backbone.channels, 2, 3)


@pytest.mark.parametrize("name", ["resnet18", "rexnet_100", "tf_efficientnet_lite0", "repvgg_a0"])
def test_c4_is_the_c4_of_the_whole_network(name):
    torch.manual_seed(0)
    whole = timm.create_model(name, features_only=True).eval()
    backbone = create_backbone(name, "random", "C4")
    own, theirs = backbone.module.state_dict(), whole.state_dict()
    assert len(own) < len(theirs)  # the last stage is not built
    backbone.module.load_state_dict({key: theirs[key] for key in own})
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (feature,) = backbone.module.eval()(x)
        index = whole.feature_info.reduction().index(16)
        torch.testing.assert_close(feature, whole(x)[index])
    assert (backbone.stride, backbone.channels) == (16, whole.feature_info.channels()[index])


def test_dc5_is_c5_at_stride_16():
    c5 = create_backbone("resnet18", "random", "C5")
    dc5 = create_backbone("resnet18", "random", "DC5")
    assert (dc5.stride, dc5.channels) == (16, c5.channels)
    (feature,) = dc5.module.eval()(torch.zeros(1, 3, 64, 96))
    assert feature.shape == (1, c5.channels, 4, 6)


def test_normalisation_is_timm_s():
    lite = create_backbone("tf_efficientnet_lite0", "random", "C5")
    resnet = create_backbone("resnet18", "random", "C5")
    assert lite.mean == (0.5, 0.5, 0.5)
    assert resnet.mean == pytest.approx((0.485, 0.456, 0.406))
    assert resnet.std == pytest.approx((0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "feature", "says"),
    [
        ("resnet81", "C5", "did you mean .*resnet18"),
        ("repvit_m0_9", "DC5", "cannot dilate"),
        ("vit_tiny_patch16_224", "C5", "no feature map of stride 32.* 16"),
    ],
)
def test_what_cannot_be_built_is_said(name, feature, says):
    with pytest.raises(ConfigError, match=says):
        create_backbone(name, "random", feature)
