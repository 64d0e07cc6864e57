import re

import pytest
import timm
import torch

from tinydet.backbones.factory import create_backbone
from tinydet.config import ConfigError

# One model of each kind of timm wrapper and of layout: list, hook, getter, own class, NHWC.
NAMES = [
    "test_resnet",
    "mobilenetv3_small_050",
    "convnext_atto",
    "mambaout_femto",
    "repvit_m0_9",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            *("resnet18", "rexnet_100", "tf_efficientnet_lite0", "repvgg_a0", "darknet53"),
            *("xception41", "swin_tiny_patch4_window7_224", "hrnet_w18_small"),
        )
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_c5_has_the_channels_and_stride_timm_says(name):
    backbone = create_backbone(name, "random", "C5")
    with torch.no_grad():
        (feature,) = backbone.module.eval()(torch.zeros(1, 3, 64, 96))
    assert backbone.stride == 32
    assert feature.shape == (1, backbone.channels, 2, 3)


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "mobilenetv3_small_050",
        pytest.param("rexnet_100", marks=pytest.mark.slow),
        pytest.param("repvgg_a0", marks=pytest.mark.slow),
    ],
)
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
    c5 = create_backbone("test_resnet", "random", "C5")
    dc5 = create_backbone("test_resnet", "random", "DC5")
    assert (dc5.stride, dc5.channels) == (16, c5.channels)
    (feature,) = dc5.module.eval()(torch.zeros(1, 3, 64, 96))
    assert feature.shape == (1, c5.channels, 4, 6)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "mambaout_femto"])
def test_p4_is_c4_beside_c5_of_twice_the_size(name):
    torch.manual_seed(0)
    whole = timm.create_model(name, features_only=True).eval()
    backbone = create_backbone(name, "random", "P4")
    theirs = whole.state_dict()
    own = {key: theirs[key.replace("body.", "")] for key in backbone.module.state_dict()}
    backbone.module.load_state_dict(own)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        (feature,) = backbone.module.eval()(x)
        c4, c5 = whole(x)[-2:]
    if whole.feature_info.channels()[-1] != c5.shape[1]:
        c4, c5 = c4.permute(0, 3, 1, 2), c5.permute(0, 3, 1, 2)
    large = c5.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(feature, torch.cat([c4, large], dim=1))
    assert (backbone.stride, backbone.channels) == (16, c4.shape[1] + c5.shape[1])


def test_normalisation_is_timm_s():
    lite = create_backbone("tf_efficientnet_lite0", "random", "C5")
    mobilenet = create_backbone("mobilenetv3_small_050", "random", "C5")
    assert lite.mean == (0.5, 0.5, 0.5)
    assert mobilenet.mean == pytest.approx((0.485, 0.456, 0.406))
    assert mobilenet.std == pytest.approx((0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("name", "feature", "says"),
    [
        ("resnet81", "C5", "did you mean .*resnet18"),
        ("repvit_m0_9", "DC5", "cannot dilate"),
        ("vit_tiny_patch16_224", "C5", "no feature map of stride 32.* 16"),
        ("vit_tiny_patch16_224", "P4", "no feature map of stride 32.* 16"),
    ],
)
def test_what_cannot_be_built_is_said(name, feature, says):
    with pytest.raises(ConfigError, match=says):
        create_backbone(name, "random", feature)


@pytest.mark.parametrize(
    ("name", "feature", "says"),
    [
        ("coat_tiny", "C5", r"224"),  # one size only
        ("levit_128s", "C5", r"RuntimeError"),  # the same, and said less clearly
        pytest.param(
            *("halonet_h1", "C4", r"AssertionError"),  # multiples of 8 cells; no message at all
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("inception_v3", "C4", r"it has the shape \(1, 768, 2, 4\)"),  # no padding
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_backbone_that_does_not_take_all_sizes_is_refused(name, feature, says):
    with pytest.raises(ConfigError) as caught:
        create_backbone(name, "imagenet", feature)  # before any weights are looked for
    message = str(caught.value)
    assert re.search(rf"model\.backbone={name}: does not take .* any size.*{says}", message)
    assert "such as rexnet_100" in message
    assert "\n" not in message


@pytest.mark.parametrize("feature", ["C5", "C4"])
def test_the_check_of_sizes_leaves_no_trace(feature):
    torch.manual_seed(4)
    timm.create_model("test_resnet", features_only=True)  # to find out the strides
    index = {"C5": 4, "C4": 3}[feature]
    expected = timm.create_model("test_resnet", features_only=True, out_indices=(index,))
    number = torch.rand(())
    torch.manual_seed(4)
    found = create_backbone("test_resnet", "random", feature).module
    assert torch.equal(torch.rand(()), number)
    assert all(module.training for module in found.modules())
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
