"""Surgery on networks of many families, each idea with the network's own data flow.

`python tests/backbones/test_surgery.py` tries every idea on every one of `BACKBONES` (most of an
hour), or on those named, and prints a table; the tests run a sample.
"""

import copy
import io
import re
import sys
import time
import warnings

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._features import FeatureHookNet
from torch import nn

from tinydet.backbones.surgery import ACTIVATIONS, add_attention, replace_activation
from tinydet.layers import AconC, CoordinateAttention, MetaAcon
from tinydet.reparam import fold
from tinydet.reparam.branches import BLOCKS
from tinydet.reparam.expand import expand, expanded_names
from tinydet.reparam.verify import difference

IDEAS = ("acon-c", "block", "stage", "se", "dbb", "repvgg", "meta-acon", "acon-a", "acon-b")
SAMPLE = [
    ("test_resnet", "acon-c"),
    ("test_efficientnet", "meta-acon"),
    ("lcnet_050", "se"),
    ("starnet_s050", "block"),
    ("test_convnext", "stage"),
    ("test_byobnet", "acon-b"),
    ("test_resnet", "dbb"),
]
BACKBONES = [
    *("resnet18", "resnet14t", "resnetv2_18", "mobilenetv2_035", "mobilenetv3_small_050"),
    *("lcnet_050", "rexnet_100", "regnetx_002", "regnety_002", "efficientnet_b0", "mixnet_s"),
    *("tf_efficientnet_lite0", "tinynet_e", "mnasnet_small", "semnasnet_050", "hardcorenas_a"),
    *("mobilenetv4_conv_small_035", "ghostnet_050", "repghostnet_050", "convnext_atto"),
    *("convnextv2_atto", "inception_next_atto", "repvgg_a0", "mobileone_s0", "fastvit_t8"),
    *("repvit_m0_9", "starnet_s050", "edgenext_xx_small"),
    *("efficientvit_b0", "mobilevit_xxs", "mobilevitv2_050", "poolformer_s12", "pvt_v2_b0"),
    *("swin_tiny_patch4_window7_224", "hgnetv2_b0", "dla46_c", "densenet121", "vgg11_bn"),
    *("cspresnet50", "darknet53", "res2net50_14w_8s", "selecsls42b", "skresnet18", "seresnet18"),
    *("ese_vovnet19b_dw", "xception41", "hrnet_w18_small", "dm_nfnet_f0", "resnest14d"),
    *(
        "eca_resnext26ts",
        "tresnet_m",
        "gernet_s",
        "nf_regnet_b0",
        "legacy_seresnet18",
    ),
]
# Those with channel attention, which Coordinate Attention can take the place of.
GATED = [
    *("efficientnet_b0", "mobilenetv3_small_050", "rexnet_100", "regnety_002", "mixnet_s"),
    *("tinynet_e", "semnasnet_050", "hardcorenas_a", "fbnetv3_b", "lcnet_050", "ghostnet_050"),
    *("repghostnet_050", "seresnet18", "legacy_seresnet18", "ese_vovnet19b_dw", "repvit_m0_9"),
    *("mobileone_s4", "efficientnetv2_rw_t", "dm_nfnet_f0", "nf_regnet_b0", "nf_seresnet26"),
    *("eca_resnext26ts", "eca_nfnet_l0", "tresnet_m", "resnetrs50", "seresnext26ts"),
    *("regnetz_b16", "ecaresnet26t", "seresnextaa101d_32x8d", "legacy_seresnext26_32x4d"),
    *("ghostnetv2_100", "mnasnet_small", "cs3se_edgenet_x"),
]


def _create(name, **kwargs):
    torch.manual_seed(0)
    for any_size in ({"strict_img_size": False}, {}):
        try:
            model = timm.create_model(name, features_only=True, **any_size, **kwargs)
            break
        except TypeError:
            continue
    return _calibrated(model)


def _calibrated(model):
    """Give signals the scale they have in a trained network, for figures that mean something."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1
        if norm.weight is not None and not norm.weight.any():
            nn.init.ones_(norm.weight)  # The last of a block: it would hide the block.
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("gain") and not parameter.any():
                parameter.fill_(1)  # The same in networks without norms.
        model.train()(torch.randn(4, 3, 64, 64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _change(model, idea, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Activations in code stay.
        if idea in ACTIVATIONS:
            return replace_activation(model, idea, x)
        if idea in BLOCKS:
            return expand(model, idea)
        return add_attention(model, "coord", x, idea)


def _move(model, old=()):
    """Let all weights but the old ones act, as after some training.

    The old ones stay: after their norms are no longer those of the data, rounding grows large.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in old:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def _check(name, idea):
    """Forward, backward, fold; return the change of the function and the number of new weights."""
    model = _create(name)
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    changed = _change(model, idea, x[:1])
    with torch.no_grad():
        was, now = model(x), changed(x)
    change = difference(was, now).max_rel
    assert change < float("inf")
    if idea in ("block", "stage", *BLOCKS):
        assert change == 0
    # What was not touched has its weights under its names; the network given is as it was.
    after = changed.state_dict()
    kept = before.keys() & after.keys()
    assert kept == before.keys() or idea == "se"
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    new = {key: p for key, p in changed.named_parameters() if key not in before}
    assert new
    # A checkpoint loads into a network that was changed anew.
    again = _change(_create(name), idea, x[:1])
    again.load_state_dict(_move(changed, before).state_dict())
    with torch.no_grad():
        assert difference(changed(x), again(x)).max_rel == 0
    changed.train()
    maps = changed(x)
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    without = [key for key, p in new.items() if p.grad is None or not p.grad.abs().max() > 0]
    # A shift before a batch norm has no gradient but rounding's, and over two values not even that.
    shift = re.compile(r"branches\.\d+\.1\.bias$" if idea in BLOCKS else r"conv1\.bias$")
    assert all(shift.search(key) for key in without), without
    changed = changed.double().eval()
    folded, _ = fold(changed, x[:1].double())
    assert not expanded_names(folded)
    other = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        assert difference(changed(other), folded(other)).max_rel < 1e-9
    return change, sum(p.numel() for p in new.values())


@pytest.mark.parametrize(("name", "idea"), SAMPLE)
def test_backbones_run_learn_load_and_fold(name, idea):
    _check(name, idea)


class _Mixed(nn.Module):
    """Activations over channels in two axes, and one shared by two widths."""

    def __init__(self, shared=None):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.shared = shared or nn.SiLU(inplace=True)
        self.linear1, self.act = nn.Linear(12, 20), nn.SiLU()
        self.linear2, self.gate = nn.Linear(20, 12), nn.Sigmoid()

    def forward(self, x):
        x = self.shared(self.conv2(self.shared(self.conv1(x))))
        tokens = x.flatten(2).transpose(1, 2)
        y = self.linear2(self.act(self.linear1(tokens)))
        return x * self.gate(y).transpose(1, 2).reshape(x.shape)


def test_channels_are_found_in_any_axis_and_for_each_width_of_a_shared_activation():
    x = torch.randn(2, 3, 6, 6)
    model = _Mixed()
    changed = replace_activation(model, "acon-c", x)
    shapes = {n: tuple(p.shape) for n, p in changed.named_parameters() if n.endswith("beta")}
    assert shapes == {
        "shared.bodies.8.beta": (8,),
        "shared.bodies.12.beta": (12,),
        "act.body.beta": (20,),
    }
    assert isinstance(changed.gate, nn.Sigmoid)
    torch.testing.assert_close(changed(x), model(x))
    # Each channel has its own slope: of the linear layer's outputs, not of places.
    with torch.no_grad():
        changed.act.body.p1[3] = 5
        tokens = torch.randn(2, 36, 20)
        moved = (changed.act(tokens) - nn.functional.silu(tokens)).abs().amax((0, 1)) > 1e-3
    assert moved.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("activation", "limit"),
    [(nn.SiLU, 1e-6), (nn.ReLU, 0.05), (nn.ReLU6, 0.05), (nn.GELU, 0.05), (nn.LeakyReLU, 0.05)],
)
@pytest.mark.parametrize("kind", ["acon-b", "acon-c"])
def test_the_function_stays_near_the_one_with_the_activation_replaced(kind, activation, limit):
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), activation())
        for c in (3, 32, 32, 32)
    ]
    model, x = nn.Sequential(*blocks), 8 * torch.randn(8, 3, 16, 16)
    changed = replace_activation(model, kind, x)
    assert difference(model(x), changed(x)).max_rel < limit
    swish = nn.Sequential(*copy.deepcopy(blocks))
    for block in swish:
        block[2] = nn.SiLU()
    if activation is not nn.SiLU:
        assert difference(model(x), swish(x)).max_rel > 2 * difference(model(x), changed(x)).max_rel


def test_attention_takes_the_place_of_gates_alone():
    model = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    changed = add_attention(model, "coord", torch.randn(1, 3, 64, 64), "se")
    gates = {name for name, m in model.named_modules() if isinstance(m, SqueezeExcite)}
    new = {name: m for name, m in changed.named_modules() if isinstance(m, CoordinateAttention)}
    assert gates == set(new)
    for name, layer in new.items():
        assert layer.conv_h.out_channels == model.get_submodule(name).conv_expand.out_channels


def test_attention_behind_every_block_of_a_residual_network():
    x = torch.randn(1, 3, 64, 64)
    changed = add_attention(timm.create_model("resnet18", features_only=True), "coord", x, "block")
    names = [n for n, m in changed.named_modules() if isinstance(m, CoordinateAttention)]
    assert names == [f"layer{i}.{j}.attention" for i in (1, 2, 3, 4) for j in (0, 1)]
    part = add_attention(changed, "coord", x, "block", "layer4")
    assert [n for n, m in part.named_modules() if isinstance(m, CoordinateAttention)][-3:] == [
        "layer4.0.attention_2", "layer4.1.attention", "layer4.1.attention_2",
    ]  # fmt: skip


class _Double(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 2.0))

    def forward(self, x):
        assert x.shape[1] == len(self.scale)
        return x * self.scale


@pytest.mark.parametrize(
    "name",
    ["resnet18", "densenet121", "hrnet_w18_small", "regnetx_002", "swin_tiny_patch4_window7_224"],
)
def test_a_layer_of_ones_own_runs_once_behind_the_last_stage(name):
    x = torch.randn(1, 3, 64, 64)
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1)} if name.startswith("swin") else {}
    model = _create(name, **small)
    last = {"densenet121": "features_norm5", "hrnet_w18_small": "incre_modules.3"}
    words = last.get(name, "layer4 s4 layers_3")
    changed = add_attention(model, _Double, x, "stage", words)
    with torch.no_grad():
        *others, map_ = model(x)
        *now, doubled = changed(x)
    torch.testing.assert_close(doubled, 2 * map_)
    assert all(torch.equal(a, b) for a, b in zip(others, now, strict=True))


def test_all_ideas_one_after_the_other_fold_and_survive_pickle():
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("test_byobnet", features_only=True).eval()
    steps = [
        lambda m: replace_activation(m, "acon-c", x),
        lambda m: add_attention(m, "coord", x, "stage"),
        lambda m: add_attention(m, "coord", x, "block"),
        lambda m: add_attention(m, "coord", x, "se"),
        lambda m: expand(m, "repvgg", "3x3"),
    ]
    for order in (steps, steps[::-1]):
        changed = model
        for step in order:
            changed = step(changed)
        assert expanded_names(changed)
        attention = [n for n, m in changed.named_modules() if isinstance(m, CoordinateAttention)]
        assert len(attention) == 4 + 4 + 5
        changed = _move(changed).double()
        folded, _ = fold(changed, x.double())
        assert not expanded_names(folded)
        file = io.BytesIO()
        torch.save(folded, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        with torch.no_grad():
            expected = changed(x.double())
            assert difference(expected, loaded(x.double())).max_rel < 1e-9
            assert difference(expected, copy.deepcopy(changed)(x.double())).max_rel == 0


def test_attention_behind_an_activation_stays_when_the_activation_is_replaced():
    x = torch.randn(1, 3, 64, 64)
    model = add_attention(_create("resnet18"), "coord", x, "stage", "act1")
    changed = replace_activation(model, MetaAcon, x)
    assert isinstance(changed.act1, MetaAcon)
    assert isinstance(changed.act1.attention, CoordinateAttention)
    assert len(changed.layer1) == 2


def test_a_classifier_gets_attention_behind_the_stages_that_timm_names():
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("resnet18", num_classes=10).eval()
    changed = add_attention(model, "coord", x, "stage")
    names = [n for n, m in changed.named_modules() if isinstance(m, CoordinateAttention)]
    assert names == [f"{end}.attention" for end in ("act1", "layer1", "layer2", "layer3", "layer4")]
    assert torch.equal(model(x), changed(x))


def test_feature_maps_that_timm_takes_by_hooks_are_the_changed_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.feature_info = [{"num_chs": 4, "reduction": 1, "module": "act"}]
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(x)).mean()

    x = torch.randn(1, 3, 8, 8)
    model = FeatureHookNet(Net(), (0,))
    changed = replace_activation(model, "acon-c", x)
    again = add_attention(copy.deepcopy(changed), _Double, x, "stage")
    for net, factor in ((model, 1), (changed, 1), (again, 2)):
        conv = net.get_submodule("body.conv")
        act = net.get_submodule("body.act")
        plain = nn.ReLU() if net is model else AconC.like(nn.ReLU(), 4)
        assert isinstance(act, type(plain))
        torch.testing.assert_close(net(x)[0], factor * plain(conv(x)))


def test_export_gives_the_same_function():
    x = torch.randn(1, 3, 64, 64)
    model = _move(add_attention(_create("test_resnet"), "coord", x, "block"))
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert difference(model(x), exported(x)).max_rel < 1e-6


class _Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        return x + self.act(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, x: replace_activation(m, "acon", x), "did you mean acon-"),
        (lambda m, x: replace_activation(m, "acon-c", x, "layr4"), "did you mean layer4"),
        (lambda _, x: replace_activation(_Overwrites(), "acon-c", x), "overwrites its input"),
        (lambda _, x: replace_activation(nn.Conv2d(3, 3, 1), "acon-c", x), "no activation"),
        (lambda m, x: replace_activation(m, lambda c: nn.Conv2d(c, 2, 1), x), "fails on the"),
        (lambda m, x: add_attention(m, "cord", x, "stage"), "did you mean coord"),
        (lambda m, x: add_attention(m, "coord", x, "stages"), "did you mean stage"),
        (lambda m, x: add_attention(m, "coord", x, "se"), "no such place"),
        (lambda m, x: add_attention(m, "coord", x, "block", "act1"), "selects none of the 8"),
        (lambda m, x: add_attention(m, lambda c: nn.Conv2d(c, 2, 1), x, "stage"), "stage|fails"),
        (lambda _, x: add_attention(nn.ReLU(), "coord", x, "block"), "no such place"),
    ],
)
def test_mistakes_are_told_in_one_line(change, words):
    with pytest.raises(ValueError, match=words) as told:
        change(timm.create_model("resnet18", features_only=True), torch.randn(1, 3, 64, 64))
    assert "\n" not in str(told.value)


def test_names_of_the_models_that_all_ideas_are_tried_on_are_timms():
    assert min(len(set(BACKBONES)), len(set(GATED))) >= 30
    assert all(timm.is_model(name) for name in BACKBONES + GATED)


def _run_all(names):
    for idea in IDEAS:
        for name in names or (GATED if idea == "se" else BACKBONES):
            start = time.perf_counter()
            try:
                change, new = _check(name, idea)
                outcome = f"ok, {new} new weights, function changed by {change:.2g}"
            except Exception as error:
                # Whatever is wrong with one network, the others are still tried.
                outcome = f"{type(error).__name__} {str(error).splitlines()[:1]}"
            seconds = time.perf_counter() - start
            sys.stdout.write(f"{name:28} {idea:9} {outcome}, {seconds:.0f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    _run_all(sys.argv[1:])
