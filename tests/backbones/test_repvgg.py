import re
from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.models.byobnet import ByoBlockCfg, RepVggBlock
from torch import nn

from tinydet.backbones.repvgg import convert_official_names
from tinydet.reparam import fold

# --- the authors' network, from the paper and the names in their checkpoints ---------------------


class _Excite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 16, 1)
        self.up = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x):
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu())
        return x * gate.sigmoid()


def _branch(inside, outside, kernel, stride, groups):
    conv = nn.Conv2d(
        inside, outside, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    branch = nn.Sequential()
    branch.add_module("conv", conv)
    branch.add_module("bn", nn.BatchNorm2d(outside))
    return branch


class _Block(nn.Module):
    def __init__(self, inside, outside, stride, groups, excite):
        super().__init__()
        self.rbr_dense = _branch(inside, outside, 3, stride, groups)
        self.rbr_1x1 = _branch(inside, outside, 1, stride, groups)
        if inside == outside and stride == 1:
            self.rbr_identity = nn.BatchNorm2d(inside)
        if excite:
            self.se = _Excite(outside)

    def forward(self, x):
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if hasattr(self, "rbr_identity"):
            y = y + self.rbr_identity(x)
        if hasattr(self, "se"):
            y = self.se(y)
        return y.relu()


@dataclass
class _Plan:
    """Of a variant: widths of the stem and the four stages, depths of the stages."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    groups: int = 1
    excite: bool = False


class _Official(nn.Module):
    def __init__(self, plan, classes=1000):
        super().__init__()
        self.stage0 = _Block(3, plan.widths[0], 2, 1, plan.excite)
        layer = 1  # The stem is layer 0; every even one after it has groups, up to layer 26.
        for i, depth in enumerate(plan.depths):
            blocks = []
            for j in range(depth):
                inside = plan.widths[i] if j == 0 else plan.widths[i + 1]
                groups = plan.groups if layer % 2 == 0 and layer <= 26 else 1
                stride = 2 if j == 0 else 1
                blocks.append(_Block(inside, plan.widths[i + 1], stride, groups, plan.excite))
                layer += 1
            self.add_module(f"stage{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(plan.widths[-1], classes)

    def stages(self, x):
        for i in range(5):
            x = self.get_submodule(f"stage{i}")(x)
            yield x

    def forward(self, x):
        *_, x = self.stages(x)
        return self.linear(x.mean((2, 3)))


_A, _B = (2, 4, 14, 1), (4, 6, 16, 1)
_PLANS = {
    "repvgg_a0": _Plan((48, 48, 96, 192, 1280), _A),
    "repvgg_a1": _Plan((64, 64, 128, 256, 1280), _A),
    "repvgg_a2": _Plan((64, 96, 192, 384, 1408), _A),
    "repvgg_b0": _Plan((64, 64, 128, 256, 1280), _B),
    "repvgg_b1": _Plan((64, 128, 256, 512, 2048), _B),
    "repvgg_b1g2": _Plan((64, 128, 256, 512, 2048), _B, groups=2),
    "repvgg_b1g4": _Plan((64, 128, 256, 512, 2048), _B, groups=4),
    "repvgg_b2": _Plan((64, 160, 320, 640, 2560), _B),
    "repvgg_b2g2": _Plan((64, 160, 320, 640, 2560), _B, groups=2),
    "repvgg_b2g4": _Plan((64, 160, 320, 640, 2560), _B, groups=4),
    "repvgg_b3": _Plan((64, 192, 384, 768, 2560), _B),
    "repvgg_b3g2": _Plan((64, 192, 384, 768, 2560), _B, groups=2),
    "repvgg_b3g4": _Plan((64, 192, 384, 768, 2560), _B, groups=4),
    "repvgg_d2se": _Plan((64, 160, 320, 640, 2560), (8, 14, 24, 1), excite=True),
}
# Small ones to run: timm's name, its words that make it small, and the same plan.
_SMALL = {
    "a0": ("repvgg_a0", {"width_factor": 0.5}, _Plan((24, 24, 48, 96, 640), _A)),
    "b1g2": (
        "repvgg_b1g2",
        {"width_factor": 0.25},
        _Plan((16, 32, 64, 128, 512), _B, groups=2),
    ),
    "b1g4": (
        "repvgg_b1g4",
        {"width_factor": 0.25},
        _Plan((16, 32, 64, 128, 512), _B, groups=4),
    ),
    "d2se": (
        "repvgg_d2se",
        {"width_factor": 0.2, "stem_chs": 80},
        _Plan((16, 32, 64, 128, 512), (8, 14, 24, 1), excite=True),
    ),
}


# Two blocks in the last stage as well: only the second is dilated.
_SHALLOW = {
    "stem_chs": 16,
    "blocks": tuple(
        ByoBlockCfg("rep", 2, c, gs=lambda channels, i: channels // 2 if i else 0)
        for c in (16, 32, 48, 64)
    ),
}
_SMALL["grouped"] = (
    "repvgg_b1g2",
    _SHALLOW,
    _Plan((16, 16, 32, 48, 64), (2, 2, 2, 2), groups=2),
)
_SMALL["excited"] = (
    "repvgg_d2se",
    _SHALLOW,
    _Plan((16, 16, 32, 48, 64), (2, 2, 2, 2), groups=2, excite=True),
)


def _trained(name):
    """The authors' small network in float64, with affine weights and statistics of its own."""
    torch.manual_seed(3)
    model = _Official(_SMALL[name][2], classes=10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1.0  # Statistics of the data, so that no signal dies or grows.
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64, dtype=torch.double))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.clamp_(min=0.1)
    return model.eval()


def _loaded(name, official, **kwargs):
    timm_name, small, _ = _SMALL[name]
    model = timm.create_model(timm_name, num_classes=10, **small, **kwargs).double()
    state_dict = convert_official_names(official.state_dict())
    if kwargs.get("features_only"):
        # timm's wrapper flattens the stages and drops the classifier.
        state_dict = {
            re.sub(r"^stages\.", "stages_", k): v
            for k, v in state_dict.items()
            if not k.startswith("head.")
        }
    model.load_state_dict(state_dict, strict=True)
    return model.eval()


def _x(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.double)


# --- names and numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", _PLANS)
def test_every_variant_has_the_authors_tensors(name):
    with torch.device("meta"):
        official = _Official(_PLANS[name]).state_dict()
    ours = timm.create_model(name, device="meta").state_dict()
    converted = convert_official_names(official)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize(
    "name",
    ["b1g2", "grouped", "excited"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("a0", "b1g4", "d2se")],
)
def test_official_weights_give_the_authors_function(name):
    official = _trained(name)
    x = _x()
    with torch.no_grad():
        expected = official(x)
        assert 1e-2 < expected.std() < 1e2
        torch.testing.assert_close(_loaded(name, official)(x), expected)


def test_names_with_a_prefix_are_read_and_timms_are_left_alone():
    official = _trained("grouped").state_dict()
    wanted = convert_official_names(official)
    for prefix in ("module.", "model.backbone."):
        named = {"head.weight": None} | {f"{prefix}{k}": v for k, v in official.items()}
        found = convert_official_names(named)
        assert list(found) == list(wanted)
        assert all(found[k] is official[old] for k, old in zip(wanted, official, strict=True))
    assert convert_official_names(wanted) == wanted


def test_deploy_form_and_strange_names_are_refused():
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match=r"deploy form.*give the training form"):
        convert_official_names({"stage0.rbr_reparam.weight": tensor, "linear.bias": tensor})
    with pytest.raises(ValueError, match="deploy form"):
        convert_official_names({"backbone.stage0.rbr_reparam.weight": tensor})
    official = {"stage0.rbr_dense.conv.weight": tensor}
    for strange in ("stage1_aux.1.weight", "stage5.0.rbr_1x1.bn.bias", "stage1.0.rbr_avg.bn.bias"):
        with pytest.raises(ValueError, match=strange):
            convert_official_names({**official, strange: tensor})


# Millions, deploy form with the classifier, as the paper and the authors' page give them.
_PUBLISHED = {
    "repvgg_a0": 8.30,
    "repvgg_a1": 12.78,
    "repvgg_a2": 25.49,
    "repvgg_b0": 14.33,
    "repvgg_b1": 51.82,
    "repvgg_b1g2": 41.36,
    "repvgg_b1g4": 36.12,
    "repvgg_b2": 80.31,
    "repvgg_b2g4": 55.77,
    "repvgg_b3": 110.96,
    "repvgg_b3g4": 75.62,
}


def _deploy_parameters(model):
    blocks = [m for m in model.modules() if isinstance(m, RepVggBlock)]
    convs = [block.conv_kxk.conv for block in blocks]
    kept = nn.ModuleList([model.head, *(block.attn for block in blocks)])
    folded = sum(conv.weight.numel() + conv.out_channels for conv in convs)
    return folded + sum(p.numel() for p in kept.parameters())


@pytest.mark.parametrize("name", _PUBLISHED)
def test_deploy_parameters_are_the_published_ones(name):
    count = _deploy_parameters(timm.create_model(name, device="meta"))
    assert count // 10_000 == round(100 * _PUBLISHED[name])  # The paper cuts its digits off.


def test_training_parameters_are_the_published_ones():
    model = timm.create_model("repvgg_a0", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 9.11


# --- folded, dilated, as features ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["grouped", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a0", "excited"))]
)
def test_fold_leaves_a_plain_network_of_the_same_function(name):
    official = _trained(name)
    model, x = _loaded(name, official), _x()
    folded, report = fold(model, x)
    assert (report.norms_after, report.branches_after) == (0, 0)
    assert report.params_after == _deploy_parameters(model)
    convs = [m for m in folded.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) == 1 + sum(_SMALL[name][2].depths)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), official(x))


@pytest.mark.parametrize("name", ["grouped", "excited"])
def test_features_are_the_authors_stages(name):
    official = _trained(name)
    model = _loaded(name, official, features_only=True, out_indices=(1, 3, 4))
    x = _x(96)
    with torch.no_grad():
        stages = list(official.stages(x))
        features = model(x)
    assert model.feature_info.reduction() == [4, 16, 32]
    assert model.feature_info.channels() == [f.shape[1] for f in features]
    for feature, i in zip(features, (1, 3, 4), strict=True):
        torch.testing.assert_close(feature, stages[i])


@pytest.mark.parametrize("output_stride", [16, pytest.param(8, marks=pytest.mark.slow)])
def test_dilated_features_hold_the_strided_ones(output_stride):
    # Without its strides but with dilation a network answers between its old cells as well.
    official = _trained("grouped")
    model = _loaded(
        "grouped", official, features_only=True, out_indices=(4,), output_stride=output_stride
    )
    assert any(m.dilation != (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))
    x = _x()
    step = 32 // output_stride
    with torch.no_grad():
        *_, last = official.stages(x)
        (feature,) = model(x)
        (folded,) = fold(model, x)[0](x)
    assert model.feature_info.reduction() == [output_stride]
    assert feature.shape[-2:] == (64 // output_stride, 64 // output_stride)
    torch.testing.assert_close(feature[..., ::step, ::step], last)
    torch.testing.assert_close(folded, feature)


@pytest.mark.slow
def test_folded_network_is_the_same_in_onnx(tmp_path):
    official = _trained("excited")
    folded = fold(_loaded("excited", official), _x())[0].float()
    x = _x().float()
    path = tmp_path / "folded.onnx"
    torch.onnx.export(folded, (x,), dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(answer, official(x.double()), rtol=1e-4, atol=1e-4)
