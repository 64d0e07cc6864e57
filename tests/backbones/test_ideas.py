"""Ideas of an experiment on a backbone: all together, each alone, and what is refused."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from tinydet.backbones.ideas import apply_ideas
from tinydet.config import ConfigError, Model
from tinydet.layers import AconC, CoordinateAttention
from tinydet.reparam import expanded_names, fold

PLAIN = Model(backbone="efficientnet_b0")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return timm.create_model("efficientnet_b0", features_only=True, out_indices=(3,)).eval()


def test_no_idea_is_the_backbone_itself(backbone):
    assert apply_ideas(backbone, PLAIN) is backbone


def test_all_together_begin_as_the_same_function_and_fold(backbone):
    config = replace(PLAIN, activation="acon-c", attention="coord", attention_place="block")
    config = replace(config, expand="dbb", expand_where="3x3 depthwise")
    changed = apply_ideas(backbone, config).eval()
    kinds = {type(module) for module in changed.modules()}
    assert {AconC, CoordinateAttention} <= kinds
    assert nn.SiLU not in kinds
    assert expanded_names(changed)
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        # SiLU is an ACON, attention and branches begin as nothing.
        torch.testing.assert_close(changed(x)[0], backbone(x)[0], rtol=1e-4, atol=1e-5)
    kept = {k: v for k, v in changed.state_dict().items() if k in backbone.state_dict()}
    assert kept.keys() == backbone.state_dict().keys()
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in kept.items())
    folded, report = fold(changed, x)
    assert report.branches_after == 0
    with torch.no_grad():
        torch.testing.assert_close(folded(x)[0], changed(x)[0], rtol=1e-4, atol=1e-5)


def test_frozen_norms_keep_everything_while_the_convs_learn():
    model = timm.create_model("resnet18", features_only=True, out_indices=(2,))
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)[0]
    frozen = apply_ideas(model, Model(backbone="resnet18", freeze_norms=True)).train()
    found = frozen(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    norms = {name for name, m in frozen.named_modules() if "Frozen" in type(m).__name__}
    assert len(norms) == 10  # the stem, two stages of four, one shortcut
    trained = [name for name, p in frozen.named_parameters() if p.grad is not None]
    assert trained
    assert not [name for name in trained if name.rpartition(".")[0] in norms]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"activation_where": "blocks.1"},
            "model.activation_where=blocks.1: needs an idea, e.g. model.activation=",
        ),
        (
            {"attention_where": "blocks.1"},
            "model.attention_where=blocks.1: needs an idea, e.g. model.attention=",
        ),
        ({"expand_where": "3x3"}, "model.expand_where=3x3: needs an idea, e.g. model.expand="),
        ({"activation": "acon-c", "activation_where": "block.1"}, "did you mean blocks.1"),
        ({"attention": "coord", "attention_where": "block.1"}, "did you mean blocks.1"),
    ],
)
def test_refused_in_one_line(backbone, changes, words):
    with pytest.raises(ConfigError) as error:
        apply_ideas(backbone, replace(PLAIN, **changes))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
