import copy
import io

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

from tinydet.reparam.branches import BLOCKS, taps
from tinydet.reparam.expand import ExpandedConv2d, expand, expanded_names


def _network():
    """A net with every sort of conv a word can select."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, 1, 2, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 12, 7, 1, 3),
    )


def _answers(model, x):
    """Outputs in eval mode and in train mode, the latter with the same random numbers each time."""
    with torch.no_grad():
        outputs = [model.eval()(x)]
        torch.manual_seed(3)
        outputs.append(model.train()(x))
    return [list(out) if isinstance(out, (list, tuple)) else [out] for out in outputs]


def _check_same_function(model, expanded, x):
    own, theirs = _answers(model, x), _answers(expanded, x)
    for ours, grown in zip(own, theirs, strict=True):
        for a, b in zip(ours, grown, strict=True):
            assert torch.equal(a, b)
    # The forward pass in train mode moved the running statistics of both alike.
    state = expanded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# Some of each of timm's wrappers: FeatureListNet, hooks, getter, EfficientNet's and MobileNetV3's.
@pytest.mark.parametrize(
    ("name", "block"),
    [
        pytest.param("resnet18", "acnet", marks=pytest.mark.slow),
        pytest.param("rexnet_100", "dbb", marks=pytest.mark.slow),
        pytest.param("repvgg_a0", "repvgg", marks=pytest.mark.slow),
        pytest.param("tf_efficientnet_lite0", "mobileone", marks=pytest.mark.slow),
        pytest.param("tf_efficientnet_lite0", "dbb", marks=pytest.mark.slow),
        ("tf_mobilenetv3_small_minimal_100", "large-kernel"),
        pytest.param("xception41", "repvgg", marks=pytest.mark.slow),
        pytest.param("repvit_m0_9", "dbb", marks=pytest.mark.slow),
        ("test_convnext", "large-kernel"),
        ("test_nfnet", "mobileone"),
        ("test_vit", "repvgg"),
        pytest.param("inception_next_atto", "large-kernel", marks=pytest.mark.slow),
    ],
)
def test_the_function_stays_and_the_names_of_the_weights(name, block, randomise):
    torch.manual_seed(0)
    kwargs = {"img_size": 64} if name == "test_vit" else {}
    model = randomise(timm.create_model(name, features_only=True, **kwargs)).double()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expanded = expand(model, block)
    assert expanded_names(expanded)
    assert not expanded_names(model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert before.keys() < expanded.state_dict().keys()
    new = [key for key in expanded.state_dict() if key not in before]
    assert all(".branches." in key for key in new)
    # Odd sides: padding that depends on the input is not symmetric then.
    side = 64 if name == "test_vit" else 35
    _check_same_function(model, expanded, torch.randn(2, 3, side, side, dtype=torch.float64))


def test_a_classifier_stays_the_same_with_its_dropout():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", drop_rate=0.5, drop_path_rate=0.5).double()
    expanded = expand(model, "mobileone", "blocks.*")
    _check_same_function(model, expanded, torch.randn(2, 3, 40, 48, dtype=torch.float64))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("side", [8, 9, 10, 11])
def test_dynamic_padding_is_kept_and_gives_one_conv(block, side, randomise):
    """With weights that are not zero: conv and branches are a Conv2dSame on every size."""
    torch.manual_seed(0)
    conv = Conv2dSame(4, 4, 5, stride=3, dilation=1, groups=2).double()
    expanded = randomise(expand(conv, block)).eval()
    # Read off away from borders: 17 pixels make ceil(17 / 3) = 6 outputs.
    x = torch.zeros(1, 4, 17, 17, dtype=torch.float64, requires_grad=True)
    y = expanded(x)[0, :, 2, 2]
    first = 2 * 3 - (5 * 3 + 5 - 17) // 2
    single = copy.deepcopy(conv).requires_grad_(False)
    single.bias.copy_(y)
    for out in range(4):
        (gradient,) = torch.autograd.grad(y[out], x, retain_graph=True)
        group = slice(out // 2 * 2, out // 2 * 2 + 2)
        window = gradient[0, group, first : first + 5, first : first + 5]
        assert window.count_nonzero() == gradient.count_nonzero()
        single.weight[out] = window
    x = torch.randn(2, 4, side, side + 1, dtype=torch.float64)
    torch.testing.assert_close(expanded(x), single(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_branch_learns_norms_at_once_and_convs_from_the_second_step(block):
    torch.manual_seed(0)
    model = expand(_network().double(), block).train()
    new = {n: p for n, p in model.named_parameters() if ".branches." in n and p.requires_grad}
    last = {
        f"{name}.branches.{i}.{len(branch) - 1}"
        for name in expanded_names(model)
        for i, branch in enumerate(model.get_submodule(name).branches)
    }
    closing = {name for name in new if name.rpartition(".")[0] in last}
    assert len(closing) >= len(last) > 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 24, 24, dtype=torch.float64)).square().mean().backward()
        gradients.append({name: p.grad.abs().sum().item() for name, p in new.items()})
        optimizer.step()
    at_once, then = gradients
    assert all((at_once[name] > 0) == (name in closing) for name in new), at_once
    # A bias before a norm has no gradient; branches have none. Of one weight a channel (a depthwise
    # 1x1) the norm takes all but a part of the size of its epsilon.
    assert all(then[name] > 0 for name in new), then


def test_new_weights_follow_the_global_seed():
    model = _network()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(expand(model, "dbb").state_dict())
    name = "3.branches.0.0.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_dtype_are_the_convs(training):
    model = _network().to(torch.bfloat16).train(training)
    expanded = expand(model, "dbb")
    assert all(module.training == training for module in expanded.modules())
    for name, tensor in expanded.state_dict().items():
        wanted = torch.int64 if name.endswith("num_batches_tracked") else torch.bfloat16
        assert tensor.dtype == wanted, name


def test_new_weights_are_where_the_convs_are():
    with torch.device("meta"):
        model = _network()
    expanded = expand(model, "dbb", "5x5")
    assert {p.device.type for p in expanded.parameters()} == {"meta"}


def test_a_frozen_conv_stays_frozen_and_its_branches_learn():
    model = _network().requires_grad_(False)
    expanded = expand(model, "repvgg", "3x3")
    learning = {name for name, p in expanded.named_parameters() if p.requires_grad}
    assert learning == {f"0.branches.0.{rest}" for rest in ("0.weight", "1.weight", "1.bias")}


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("", ["0", "3", "6", "9"]),
        ("3x3", ["0"]),
        ("3x3 5x5", ["0", "3"]),
        ("depthwise", ["3"]),
        ("dense", ["0", "9"]),
        ("depthwise dense", ["0", "3", "9"]),
        ("dense 7x7 1x1", ["9"]),
        ("0 3", ["0", "3"]),
        ("[69]", ["6", "9"]),
        ("* 1x1", ["6"]),
        (lambda name, conv: name == "6" or conv.kernel_size == (3, 3), ["0", "6"]),
    ],
)
def test_where_selects(where, names):
    assert expanded_names(expand(_network(), "mobileone", where)) == names


def test_a_modules_name_stands_for_all_in_it_and_for_nothing_else():
    model = timm.create_model("test_resnet", features_only=True)
    names = expanded_names(expand(model, "repvgg", "layer1 layer3.0"))
    convs = [name for name, module in model.named_modules() if type(module) is nn.Conv2d]
    assert names == [name for name in convs if name.startswith(("layer1.", "layer3.0."))]
    assert len(names) > 3
    with pytest.raises(ValueError, match="did you mean"):
        expand(model, "repvgg", "layer")


def test_convs_that_cannot_grow_a_block_stay_as_they_are():
    expanded = expand(_network(), "acnet")
    assert expanded_names(expanded) == ["0", "3", "9"]
    assert type(expanded[6]) is nn.Conv2d


@pytest.mark.parametrize(
    ("block", "where", "says"),
    [
        ("repvg", "", r"block='repvg': no such block; did you mean repvgg\? use one of "),
        (
            "qqq",
            "",
            f"no such block; use one of {', '.join(BLOCKS)}, or a callable",
        ),
        ("dbb", "9x9", r"where='9x9' selects none of the 4 convs; the first are 0 \(3x3 dense\)"),
        ("dbb", "dens", "did you mean dense for dens"),
        ("dbb", lambda *_: False, "selects none of the 4 convs"),
        ("acnet", "1x1", r"acnet: grows on none of the 1 convs .* 6 \(1x1 2 groups\)"),
    ],
)
def test_mistakes_are_told_in_one_line(block, where, says):
    with pytest.raises(ValueError, match=says) as error:
        expand(_network(), block, where)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "conv",
    [
        nn.ConvTranspose2d(3, 4, 3),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        ScaledStdConv2d(3, 4, 3),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.Conv1d(3, 4, 3),
    ],
    ids=lambda conv: type(conv).__name__,
)
def test_other_convs_do_not_grow(conv):
    with pytest.raises(ValueError, match=r"Sequential has no zero-padded nn\.Conv2d"):
        expand(nn.Sequential(conv), "repvgg")
    expanded = expand(nn.Sequential(conv, nn.Conv2d(4, 4, 1)), "repvgg")
    assert expanded_names(expanded) == ["1"]


def test_a_shared_conv_grows_once_and_stays_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv)})
    expanded = expand(model, "repvgg", "b.*")
    assert expanded["a"] is expanded["b"][0]
    assert len(expanded["a"].branches) == 2


def test_the_model_may_be_one_conv():
    expanded = expand(nn.Conv2d(4, 4, 3, padding=1), "repvgg")
    assert expanded_names(expanded) == [""]
    with pytest.raises(ValueError, match=r"acnet: grows on none .* the model \(1x1 dense\)"):
        expand(nn.Conv2d(4, 4, 1), "acnet")


def test_hooks_stay_and_see_the_sum(randomise):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv.register_forward_hook(lambda *call: -call[-1])
    expanded = randomise(expand(conv, "repvgg")).eval()
    x = torch.randn(1, 4, 6, 6)
    total = nn.Conv2d.forward(expanded, x) + sum(branch(x) for branch in expanded.branches)
    torch.testing.assert_close(expanded(x), -total)


def test_expanding_again_grows_more_and_never_inside_branches():
    torch.manual_seed(0)
    model = _network().double()
    once = expand(model, "repvgg", "dense")
    twice = expand(once, "mobileone", "3x3 depthwise dense")
    assert expanded_names(twice) == ["0", "9"]
    assert [len(twice[i].branches) for i in (0, 9)] == [1 + 5, 2]
    assert len(once[0].branches) == 1
    assert expanded_names(expand(twice, "dbb")) == ["0", "3", "6", "9"]
    _check_same_function(model, twice, torch.randn(2, 3, 24, 24, dtype=torch.float64))


def test_weights_of_one_expanded_network_load_into_another():
    model, x = _network(), torch.randn(2, 3, 24, 24)
    trained, other = (expand(model, "dbb").eval() for _ in range(2))
    nn.init.normal_(trained[0].branches[0][1].weight)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), trained(x))
    pretrained = expand(_network(), "dbb")
    result = pretrained.load_state_dict(model.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".branches." in key for key in result.missing_keys)


class _Twin:
    def __init__(self, **changes):
        self.changes = changes

    def __call__(self, conv):
        if conv.groups > 1:
            return []
        return [taps(conv, conv.kernel_size), nn.Conv2d(conv.in_channels, **self.changes)]


def test_ones_own_block_grows_and_starts_at_zero():
    torch.manual_seed(0)
    model = _network().double()
    twin = _Twin(out_channels=8, kernel_size=1, stride=2)
    expanded = expand(model, twin, "3x3 5x5")
    assert expanded_names(expanded) == ["0"]
    assert len(expanded[0].branches) == 2
    _check_same_function(model, expanded, torch.randn(2, 3, 24, 24, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"out_channels": 8, "kernel_size": 1},
            r"_Twin: a branch of 0 returns \(1, 8, .* the conv",
        ),
        ({"out_channels": 7, "kernel_size": 1, "stride": 2}, "a branch of 0 fails on an input"),
        ({"out_channels": 8, "kernel_size": 90}, "a branch of 0 fails on an input"),
    ],
)
def test_a_branch_of_the_wrong_shape_is_refused_at_once(changes, says):
    with pytest.raises(ValueError, match=says) as error:
        expand(_network(), _Twin(**changes), "3x3")
    assert "\n" not in str(error.value)


def test_an_expanded_conv_keeps_its_attributes():
    conv = nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False)
    expanded = expand(conv, "mobileone")
    assert isinstance(expanded, ExpandedConv2d)
    for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(expanded, name) == getattr(conv, name)
    assert expanded.bias is None
