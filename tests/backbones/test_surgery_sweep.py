"""Modifications of networks of many families: forward, backward, checkpoint, fold.

Every network of `BACKBONES` gets one modification, in turn, and every one of `GATED` attention in
place of its own; all but a few of the smallest are slow.
"""

import copy
import re
import warnings

import pytest
import timm
import torch
from torch import nn

from tinydet.backbones.surgery import ACTIVATIONS, add_attention, replace_activation
from tinydet.reparam import fold
from tinydet.reparam.branches import BLOCKS
from tinydet.reparam.expand import expand, expanded_names
from tinydet.reparam.verify import difference

FAST = [
    ("test_resnet", "acon-c"),
    ("test_efficientnet", "se"),
    ("test_resnet", "block"),
]
MODIFICATIONS = ("acon-c", "block", "stage", "dbb", "repvgg", "meta-acon", "acon-a", "acon-b")
BACKBONES = [
    *("resnetv2_18", "mobilenetv2_035", "rexnet_100", "regnety_002", "mixnet_s", "tinynet_e"),
    *("ghostnet_050", "repghostnet_050", "convnext_atto", "inception_next_atto", "repvgg_a0"),
    *("mobileone_s0", "fastvit_t8", "repvit_m0_9", "starnet_s050", "edgenext_xx_small"),
    *("efficientvit_b0", "mobilevit_xxs", "poolformer_s12", "swin_tiny_patch4_window7_224"),
]
# Networks with channel attention, which Coordinate Attention can replace.
GATED = [
    *("mobilenetv3_small_050", "lcnet_050", "ghostnet_050", "seresnet18", "ese_vovnet19b_dw"),
    *("repvit_m0_9", "eca_resnext26ts"),
]
SWEEP = [
    ("test_efficientnet", "meta-acon"),
    ("test_convnext", "stage"),
    ("test_resnet", "dbb"),
    *((name, MODIFICATIONS[i % len(MODIFICATIONS)]) for i, name in enumerate(BACKBONES)),
    *((name, "se") for name in GATED),
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


def _change(model, modification, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Activations in code stay.
        if modification in ACTIVATIONS:
            return replace_activation(model, modification, x)
        if modification in BLOCKS:
            return expand(model, modification)
        return add_attention(model, "coord", x, modification)


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


def _check(name, modification):
    """Check function, weights, gradients, a checkpoint and the folded form of a changed network."""
    model = _create(name)
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    changed = _change(model, modification, x[:1])
    with torch.no_grad():
        was, now = model(x), changed(x)
    change = difference(was, now).max_rel
    assert change < float("inf")
    if modification in ("block", "stage", *BLOCKS):
        assert change == 0
    # What was not touched has its weights under its names; the network given is as it was.
    after = changed.state_dict()
    kept = before.keys() & after.keys()
    assert kept == before.keys() or modification == "se"
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    new = {key: p for key, p in changed.named_parameters() if key not in before}
    assert new
    # A checkpoint loads into a network with the same changes.
    again = _change(_create(name), modification, x[:1])
    again.load_state_dict(_move(changed, before).state_dict())
    with torch.no_grad():
        assert difference(changed(x), again(x)).max_rel == 0
    changed.train()
    maps = changed(x)
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    without = [key for key, p in new.items() if p.grad is None or not p.grad.abs().max() > 0]
    # A shift before a batch norm has no gradient but rounding's, and over two values not even that.
    shift = re.compile(r"branches\.\d+\.1\.bias$" if modification in BLOCKS else r"conv1\.bias$")
    assert all(shift.search(key) for key in without), without
    changed = changed.double().eval()
    folded, _ = fold(changed, x[:1].double())
    assert not expanded_names(folded)
    other = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        assert difference(changed(other), folded(other)).max_rel < 1e-9


@pytest.mark.parametrize(("name", "modification"), FAST)
def test_small_networks_run_learn_load_and_fold(name, modification):
    _check(name, modification)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modification"), SWEEP)
def test_networks_run_learn_load_and_fold(name, modification):
    _check(name, modification)
