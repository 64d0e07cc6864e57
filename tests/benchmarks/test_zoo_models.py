import pytest
import timm
import torch
import torchvision_models
from zoo_models import (
    OTHER,
    SAMPLE,
    build_model,
    choose_models,
    example_inputs,
    family_of,
    input_sizes,
)

from tinydet.reparam.verify import tensors_in


def test_choose_models__the_sample():
    sample = choose_models([])
    assert len(sample) >= 220
    assert len({family_of(name) for name in sample}) >= 57
    assert set(sample) <= set(timm.list_models())
    assert choose_models([], SAMPLE) == sample


def test_choose_models__the_others():
    others = choose_models([], OTHER)
    assert not set(others) & set(choose_models([]))
    foreign = choose_models(["torchvision/*"], OTHER)
    assert len(foreign) >= 25
    assert set(foreign) < set(torchvision_models.names())
    names = [name.removesuffix(":classifier") for name in set(others) - set(foreign)]
    assert len(names) >= 60
    assert set(names) <= set(timm.list_models())
    own = {family_of(name) for name in choose_models([])}
    assert len({family_of(name) for name in names} - own) >= 25


def test_choose_models__patterns():
    assert choose_models(["repvgg_a?", "rexnet_100", "repvgg_a0"]) == [
        "repvgg_a0",
        "repvgg_a1",
        "repvgg_a2",
        "rexnet_100",
    ]
    assert choose_models(["rexnet_10?:classifier", "torchvision/fcn*"]) == [
        "rexnet_100:classifier",
        "torchvision/fcn_resnet101",
        "torchvision/fcn_resnet50",
    ]
    with pytest.raises(ValueError, match=r"^repvg: .* try '\*repvg\*'"):
        choose_models(["rexnet_100", "repvg"])
    with pytest.raises(ValueError, match="rexnet_100: no such model"):
        choose_models(["rexnet_100"], OTHER)


def test_input_sizes():
    assert input_sizes("levit_128s") == [224]
    assert input_sizes("vit_base_patch16_384") == [256, 384]
    assert input_sizes("torchvision/ssd300_vgg16") == [300]
    assert input_sizes("torchvision/vgg11_bn") == [224]


def test_a_detector_finds_something_in_each_image():
    name = "torchvision/ssdlite320_mobilenet_v3_large"
    model = build_model(name, 64)
    inputs = example_inputs(name, 2, 64, 96)
    assert [tuple(image.shape) for image in inputs[0]] == [(3, 64, 96)] * 2
    with torch.no_grad():
        found = model(*inputs)
    assert [len(image["boxes"]) for image in found] == [20, 20]
    assert not torch.equal(found[0]["boxes"], found[1]["boxes"])
    assert family_of(name) == "torchvision/ssdlite"


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("torchvision/r3d_18", [(2, 3, 4, 32, 48)]),
        ("torchvision/raft_small", [(2, 3, 32, 48)] * 2),
        ("torchvision/fcn_resnet50", [(2, 3, 32, 48)]),
        ("test_resnet:classifier", [(2, 3, 32, 48)]),
    ],
)
def test_example_inputs(name, shapes):
    inputs = example_inputs(name, 2, 32, 48)
    assert [tuple(x.shape) for x in inputs] == shapes
    again = example_inputs(name, 2, 32, 48)
    assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", choose_models(["torchvision/*"], OTHER))
def test_build_model__every_listed_one_of_torchvision_runs(name):
    (side,) = input_sizes(name)
    with torch.no_grad():
        assert tensors_in(build_model(name, side)(*example_inputs(name, 1, side, side)))


def test_build_model__torchvision():
    name = "torchvision/shufflenet_v2_x0_5"
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (build_model(name, 64).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
        if key.endswith(("running_mean", "bias")):
            assert len(tensor.unique()) > 1, key
