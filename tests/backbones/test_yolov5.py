import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.optim import param_groups_layer_decay
from torch import nn

from tinydet.backbones.factory import create_backbone
from tinydet.config import ConfigError
from tinydet.reparam.fold import fold

# Parameters of layers 0 to 9, as YOLOv5's own training logs print them.
PUBLISHED = {
    "yolov5n": [1760, 4672, 4800, 18560, 29184, 73984, 156928, 295424, 296448, 164608],
    "yolov5s": [3520, 18560, 18816, 73984, 115712, 295424, 625152, 1180672, 1182720, 656896],
    "yolov5m": [5280, 41664, 65280, 166272, 444672, 664320, 2512896, 2655744, 4134912, 1476864],
    "yolov5l": [7040, 73984, 156928, 295424, 1118208, 1180672, 6433792, 4720640, 9971712, 2624512],
    "yolov5x": [
        *(8800, 115520, 309120, 461440, 2259200),
        *(1844480, 13125120, 7375360, 19676160, 4099840),
    ],
}


def _count(module):
    return sum(p.numel() for p in module.parameters())


def _settled(**kwargs):
    """A yolov5n in eval mode whose norms have statistics and factors of their own."""
    torch.manual_seed(0)
    model = timm.create_model("yolov5n", **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_layer_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    layers = [model.stem, *(layer for stage in model.stages for layer in stage)]
    assert [_count(layer) for layer in layers] == PUBLISHED[name]
    assert _count(model) == sum(PUBLISHED[name])


def test_norms_are_yolov5_s():
    norms = [m for m in timm.create_model("yolov5n").modules() if isinstance(m, BatchNormAct2d)]
    assert {(norm.eps, norm.momentum, type(norm.act)) for norm in norms} == {(1e-3, 0.03, nn.SiLU)}


def test_features_have_five_strides_and_the_channels_timm_is_told():
    model = _settled(features_only=True)
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert model.feature_info.channels() == [16, 32, 64, 128, 256]
    with torch.no_grad():
        features = model(torch.randn(2, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [
        (2, c, 64 // s, 96 // s)
        for c, s in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]


@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_dilated_network_has_the_plain_one_s_features_in_every_second_cell(output_stride):
    plain = _settled(num_classes=0)
    dilated = timm.create_model("yolov5n", num_classes=0, output_stride=output_stride).eval()
    dilated.load_state_dict(plain.state_dict())
    strides = [min(s, output_stride) for s in (2, 4, 8, 16, 32)]
    assert [info["reduction"] for info in dilated.feature_info] == strides
    for model in (plain, dilated):
        model.stages[3].pyramid = nn.Identity()  # has a test of its own, below
    x = torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        pairs = zip(*(m.forward_intermediates(x)[1] for m in (plain, dilated)), strict=True)
        for coarse, fine in pairs:
            step = fine.shape[-1] // coarse.shape[-1]
            torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-5)
    assert fine.shape[-1] == 192 // output_stride


@pytest.mark.parametrize("output_stride", [16, 8])
def test_the_pools_reach_the_same_pixels_at_every_stride(output_stride):
    plain = _settled(num_classes=0).stages[3].pyramid
    dilated = timm.create_model("yolov5n", output_stride=output_stride).eval().stages[3].pyramid
    dilated.load_state_dict(plain.state_dict())
    x, step = torch.randn(1, 256, 9, 14), 32 // output_stride
    finer = x.repeat_interleave(step, 2).repeat_interleave(step, 3)
    with torch.no_grad():
        found = dilated(finer)[..., ::step, ::step]
        torch.testing.assert_close(found, plain(x), rtol=1e-4, atol=1e-5)


def test_an_impossible_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride=4"):
        timm.create_model("yolov5n", output_stride=4)


def test_timm_s_ways_to_features_agree():
    model = _settled()
    x = torch.randn(1, 3, 64, 64)
    listed = _settled(features_only=True, out_indices=(2, 4))
    getter = _settled(features_only=True, out_indices=(2, 4), feature_cls="getter")
    with torch.no_grad():
        last, features = model.forward_intermediates(x)
        last_stage, model.stages[3] = model.stages[3], nn.Softmax(dim=7)  # fails when it is run
        early = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
        model.stages[3] = last_stage
        expected = [features[2], features[4]]
        torch.testing.assert_close(listed(x), expected)
        torch.testing.assert_close(getter(x), expected)
        torch.testing.assert_close(early, [features[1]])
        torch.testing.assert_close(last, model.forward_features(x))
        torch.testing.assert_close(last, features[4])
        model.prune_intermediate_layers([1, 3])
        torch.testing.assert_close(model.forward_features(x), features[3])
    assert (len(model.stages), model.num_features) == (3, features[3].shape[1])


def test_features_not_wanted_are_not_built():
    assert not any(
        "stages_3" in n for n, _ in _settled(features_only=True, out_indices=(3,)).named_modules()
    )


def test_the_classifier_pools_the_last_features():
    model = _settled(num_classes=7)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = model.forward_features(x).mean((2, 3))
        logits = pooled @ model.get_classifier().weight.T + model.get_classifier().bias
        torch.testing.assert_close(model(x), logits)
        model.reset_classifier(0)
        torch.testing.assert_close(model(x), pooled)


def test_gradients_are_the_same_with_checkpointing():
    model, x = _settled(num_classes=3), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_learning_rates_can_fall_with_depth():
    model = timm.create_model("yolov5n")
    scales = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.5)
        for p in group["params"]
    }
    parts = [model.stem, *model.stages, model.head]
    found = [{scales[id(p)] for p in part.parameters()} for part in parts]
    assert found == [{0.5**k} for k in (5, 4, 3, 2, 1, 0)]


def test_other_image_channels():
    model = _settled(features_only=True, in_chans=1)
    assert model.stem.conv.weight.shape == (16, 1, 6, 6)
    weights = _settled(num_classes=0).state_dict()
    grey = timm.create_model(
        "yolov5n",
        features_only=True,
        in_chans=1,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(weights)},
    )
    torch.testing.assert_close(grey.stem.conv.weight, weights["stem.conv.weight"].sum(1, True))


def test_there_are_no_weights_on_a_hub():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for yolov5n"):
        timm.create_model("yolov5n", pretrained=True)
    with pytest.raises(ConfigError, match=r"no weights for yolov5n .* model.weights=FILE"):
        create_backbone("yolov5n", "imagenet", "C5")


def test_pixels_are_divided_by_255_and_no_more():
    backbone = create_backbone("yolov5n", "random", "C5")
    assert (backbone.mean, backbone.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert timm.get_pretrained_cfg("yolov5s").input_size == (3, 640, 640)


@pytest.mark.parametrize(
    ("feature", "channels", "stride"), [("C5", 256, 32), ("DC5", 256, 16), ("C4", 128, 16)]
)
def test_the_factory_s_feature_maps(feature, channels, stride):
    backbone = create_backbone("yolov5n", "random", feature)
    (found,) = backbone.module(torch.zeros(2, 3, 64, 96))
    assert (backbone.channels, backbone.stride) == (channels, stride)
    assert found.shape == (2, channels, 64 // stride, 96 // stride)


@pytest.mark.slow
def test_all_norms_fold():
    model = _settled(features_only=True)
    x = torch.randn(1, 3, 64, 64)
    folded, report = fold(model, x)
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert (report.norms_before, report.norms_after, report.kept) == (convs, 0, ())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [32, 16])
def test_the_exported_network_is_the_same(output_stride, tmp_path):
    model = _settled(features_only=True, output_stride=output_stride)
    x = torch.randn(1, 3, 64, 96)
    path = tmp_path / "yolov5n.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        for ours, theirs in zip(model(x), found, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3)
