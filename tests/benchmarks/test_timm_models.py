import pytest
import timm
import torch
from timm_models import build_model, example_images, family_of, input_sizes
from torch import nn


@pytest.mark.parametrize("name", ["fastvit_t8", "test_convnext", "test_maxvit", "swiftformer_xs"])
def test_build_model__nothing_constant_is_left(name):
    model = build_model(name)
    plain = timm.create_model(name, features_only=True).state_dict()
    state = model.state_dict()
    assert state.keys() == plain.keys()
    for key, tensor in state.items():
        if "running" in key or (key.endswith((".bias", "gamma")) and tensor.numel() > 1):
            assert len(tensor.unique()) > 1, key
            assert not torch.equal(tensor, plain[key]), key
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            assert (module.weight < 0).any()
            assert (module.weight > 0).any()


def test_build_model__same_weights_again_and_no_other_randomness_touched():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = build_model("test_resnet").state_dict(), build_model("test_resnet").state_dict()
    assert torch.equal(torch.rand(1), expected)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def test_build_model__classifier():
    model = build_model("test_resnet:classifier")
    assert model.state_dict().keys() == timm.create_model("test_resnet").state_dict().keys()
    assert not torch.equal(model.conv1[0].weight, build_model("test_resnet").conv1[0].weight)
    images = example_images("test_resnet:classifier", 2, 32, 64)
    with torch.no_grad():
        assert model(images).shape == (2, 1000)
    assert not torch.equal(images, example_images("test_resnet", 2, 32, 64))
    assert family_of("test_resnet:classifier") == family_of("test_resnet") == "resnet"
    assert input_sizes("vit_base_patch16_384:classifier") == [256, 384]


def test_build_model__unknown():
    with pytest.raises(ValueError, match="resnit:classifier: timm has no such model"):
        build_model("resnit:classifier")


def test_input_sizes():
    assert input_sizes("vit_base_patch16_384") == [256, 384]
    assert input_sizes("resnet34") == [224]


def test_example_images():
    images = example_images("resnet18", 2, 32, 64)
    assert images.shape == (2, 3, 32, 64)
    assert torch.equal(images, example_images("resnet18", 2, 32, 64))
    assert not torch.equal(images, example_images("resnet34", 2, 32, 64))
