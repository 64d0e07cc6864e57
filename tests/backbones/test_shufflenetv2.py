import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import group_parameters
from torch import nn

from tinydet.backbones import shufflenetv2  # noqa: F401 (registers the models)
from tinydet.reparam.fold import fold

WIDTHS = ["x0_5", "x1_0", "x1_5", "x2_0"]


def _randomised(model):
    """Give the norms statistics under which leaving one out, or its epsilon, would show."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.3, 0.3)
    return model.eval()


def _torchvision(width):
    return _randomised(getattr(tv, f"shufflenet_v2_{width}")())


def _weights(width):
    return getattr(tv, f"ShuffleNet_V2_{width.upper()}_Weights").DEFAULT


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return torchvision's x0_5 and a file of its weights, named as on the server."""
    model = _torchvision("x0_5")
    path = tmp_path_factory.mktemp("hub") / "shufflenetv2_x0.5-f707e7126e.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("width", WIDTHS)
def test_is_torchvisions_network_under_the_same_names(width):
    theirs = _torchvision(width)
    ours = timm.create_model(f"shufflenetv2_{width}").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 72, 104)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected)
        assert expected.std() > 1e-3  # Not all alike.
        torch.testing.assert_close(ours.forward_head(ours.forward_features(x)), expected)
    assert sum(p.numel() for p in ours.parameters()) == _weights(width).meta["num_params"]


def test_parameter_count_of_x1_0():
    model = timm.create_model("shufflenetv2_x1_0")
    assert sum(p.numel() for p in model.parameters()) == 2_278_604


def test_timm_lists_them():
    names = [f"shufflenetv2_{width}" for width in WIDTHS]
    assert timm.list_models("shufflenetv2*") == names
    tagged = [f"{name}.tv_in1k" for name in names]
    assert timm.list_models("shufflenetv2*", pretrained=True) == tagged


@pytest.mark.parametrize("width", WIDTHS)
def test_images_are_prepared_as_torchvision_does(width):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    model = timm.create_model(f"shufflenetv2_{width}")
    config = resolve_data_config(model=model)
    assert config["input_size"] == (3, 224, 224)
    ours = create_transform(**config)(image)
    torch.testing.assert_close(ours, _weights(width).transforms()(image))


def test_pretrained_finds_the_file_that_the_url_names(saved):
    theirs, path = saved
    model = timm.create_model("shufflenetv2_x0_5", pretrained=True, cache_dir=path.parent).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x))


def test_pretrained_features_are_torchvisions_stages(saved):
    theirs, path = saved
    overlay = {"file": str(path)}
    model = timm.create_model(
        "shufflenetv2_x0_5",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        features_only=True,
        out_indices=(2, 4),
    ).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        c3 = theirs.stage2(theirs.maxpool(theirs.conv1(x)))
        c5 = theirs.stage4(theirs.stage3(c3))
        torch.testing.assert_close(model(x), [c3, c5])


def test_one_channel_is_the_grey_image(saved):
    theirs, path = saved
    overlay = {"file": str(path)}
    model = timm.create_model(
        "shufflenetv2_x0_5",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        in_chans=1,
    ).eval()
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(grey), theirs(grey.expand(-1, 3, -1, -1)))


def test_another_number_of_classes_keeps_the_body(saved):
    theirs, path = saved
    overlay = {"file": str(path)}
    model = timm.create_model(
        "shufflenetv2_x0_5", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7
    ).eval()
    assert model.fc.out_features == 7
    torch.testing.assert_close(model.conv5[0].weight, theirs.conv5[0].weight)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 3), (-1,)])
def test_features_have_the_shapes_they_say(out_indices, output_stride):
    model = timm.create_model(
        "shufflenetv2_x0_5",
        features_only=True,
        out_indices=out_indices,
        output_stride=output_stride,
    )
    info = model.feature_info
    every = [min(reduction, output_stride) for reduction in (2, 4, 8, 16, 32)]
    assert info.reduction() == [every[i] for i in out_indices]
    assert info.channels() == [(24, 24, 48, 96, 192)[i] for i in out_indices]
    features = model.eval()(torch.zeros(1, 3, 64, 96))
    for feature, channels, stride in zip(features, info.channels(), info.reduction(), strict=True):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)


def test_features_keep_nothing_that_comes_later():
    model = timm.create_model("shufflenetv2_x0_5", features_only=True, out_indices=(3,))
    assert list(model) == ["conv1", "maxpool", "stage2", "stage3"]
    last = timm.create_model("shufflenetv2_x0_5", features_only=True, out_indices=(4,))
    assert list(last)[-1] == "stage4"


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_holds_the_strided_net_s_values(output_stride):
    # A strided convolution is the dense one at every second place, and a dilated one on the dense
    # grid reads just those places: so stage k on every n-th place must be the strided stage k.
    # The size is no multiple of 32, so that borders count.
    strided = _randomised(timm.create_model("shufflenetv2_x0_5", features_only=True))
    dilated = timm.create_model(
        "shufflenetv2_x0_5", features_only=True, output_stride=output_stride
    ).eval()
    dilated.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 200, 136)
    with torch.no_grad():
        expected, found = strided(x), dilated(x)
    steps = [r // min(r, output_stride) for r in strided.feature_info.reduction()]
    assert max(steps) == 32 // output_stride
    for feature, dense, step in zip(expected, found, steps, strict=True):
        torch.testing.assert_close(dense[..., ::step, ::step], feature, rtol=1e-4, atol=1e-5)


def test_other_output_strides_are_refused():
    with pytest.raises(ValueError, match="output_stride=4: ShuffleNetV2 supports 8, 16 or 32"):
        timm.create_model("shufflenetv2_x0_5", output_stride=4)


def test_classifier_can_be_replaced_and_removed():
    model = timm.create_model("shufflenetv2_x0_5", drop_rate=0.9).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert model.get_classifier().out_features == 1000
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, model.forward_features(x).mean((2, 3)))
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(x), model.forward_features(x).amax((2, 3)))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)
    assert timm.create_model("shufflenetv2_x2_0", num_classes=0).num_features == 2048


def test_drop_rate_drops_in_training_only():
    torch.manual_seed(0)
    model = timm.create_model("shufflenetv2_x0_5", drop_rate=0.5)
    features = torch.rand(8, 1024, 1, 1) + 1
    dropped = model.forward_head(features, pre_logits=True)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (model.eval().forward_head(features, pre_logits=True) > 0).all()


def test_intermediates_are_the_features():
    model = _randomised(timm.create_model("shufflenetv2_x0_5"))
    listed = timm.create_model("shufflenetv2_x0_5", features_only=True).eval()
    listed.load_state_dict(
        {key: model.state_dict()[key] for key in listed.state_dict()}, strict=True
    )
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = listed(x)
        final, found = model.forward_intermediates(x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(final, model.forward_features(x))
        only = model.forward_intermediates(x, 2, intermediates_only=True)
        torch.testing.assert_close(only, expected[-2:])
        last, found = model.forward_intermediates(x, [1, 3], stop_early=True)
        torch.testing.assert_close(found, [expected[1], expected[3]])
        torch.testing.assert_close(last, expected[3])
        getter = timm.create_model("shufflenetv2_x0_5", features_only=True, feature_cls="getter")
        assert [f.shape for f in getter(x)] == [f.shape for f in expected]
    with pytest.raises(ValueError, match="output_fmt=NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_checkpointing_computes_blocks_twice_and_the_same_gradients():
    model = _randomised(timm.create_model("shufflenetv2_x0_5", num_classes=3))
    x = torch.randn(2, 3, 64, 64)
    runs, gradients = [], []
    # Before: the second run stops as soon as it has all that the backward pass needs.
    model.stage3[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(runs) == 1 + 2
    torch.testing.assert_close(*gradients)


def test_parameters_are_grouped_from_input_to_output():
    model = timm.create_model("shufflenetv2_x0_5")
    fine = group_parameters(model, model.group_matcher())
    assert len(fine) == 1 + (4 + 8 + 4) + 1
    assert sum(map(len, fine.values())) == len(list(model.parameters()))
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    firsts = [{name.split(".")[0] for name in names} for names in coarse.values()]
    assert firsts == [{"conv1"}, {"stage2"}, {"stage3"}, {"stage4", "conv5"}, {"fc"}]


def test_device_and_dtype():
    model = timm.create_model("shufflenetv2_x0_5", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [32, 16])
def test_every_norm_folds(output_stride):
    model = _randomised(
        timm.create_model("shufflenetv2_x0_5", features_only=True, output_stride=output_stride)
    )
    folded, report = fold(model, torch.zeros(1, 3, 64, 64))
    assert report.norms_before > 50
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def _with_both_blocks():
    return _randomised(
        timm.create_model("shufflenetv2_x0_5", features_only=True, out_indices=(0, 2))
    )


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    model = _with_both_blocks()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_onnx_takes_any_size(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = _with_both_blocks()
    path = tmp_path / "net.onnx"
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 96),),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch, 2: height, 3: width},),
        verbose=False,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in [(1, 3, 128, 64), (3, 3, 70, 101)]:
        x = torch.randn(shape)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            for ours, expected in zip(found, model(x), strict=True):
                np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-3, atol=1e-4)
