import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.yolof.head import Head, fuse_objectness

ROWS = 5 * 13 * 5  # anchors of the rows that the reference file keeps


def test_fused_objectness_is_the_reference(reference, flatten):
    part = reference["head"]["eval"]
    fused = fuse_objectness(flatten(part["raw_cls"], 20), flatten(part["raw_obj"], 1))
    torch.testing.assert_close(fused, flatten(part["cls_score"], 20), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.floats(-15, 15), st.floats(-15, 15))
def test_fused_probability_is_the_product(cls, obj):
    fused = fuse_objectness(*torch.tensor([[cls], [obj]], dtype=torch.float64))
    product = 1 / (1 + math.exp(-cls)) / (1 + math.exp(-obj))
    assert fused.sigmoid().item() == pytest.approx(product, rel=1e-9)


def test_fusion_of_extreme_logits_is_capped_and_finite():
    logits = torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0])
    cls, obj = torch.meshgrid(logits, logits, indexing="ij")
    cls = cls.clone().requires_grad_()
    fused = fuse_objectness(cls, obj)
    fused.sum().backward()
    assert fused.isfinite().all()
    assert cls.grad.isfinite().all()
    # c + o - log(1 + min(e^c, 1e8) + min(e^o, 1e8)): both caps in force at 200 and 200.
    assert fused[4, 4].item() == pytest.approx(400 - math.log(1 + 2e8))
    assert fused[4, 0].item() == pytest.approx(-math.log(1 + 1e8), rel=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_are_the_reference(head, reference, flatten, mode):
    part = reference["head"][mode]
    cls_logits, deltas = head.train(mode == "train")(reference["head"]["x"])
    assert cls_logits.shape == (2, 650, 20)
    assert deltas.shape == (2, 650, 4)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(cls_logits[:1, :ROWS], flatten(part["cls_score"], 20), **close)
    torch.testing.assert_close(deltas[:1, :ROWS], flatten(part["bbox_pred"], 4), **close)


def test_running_statistics_are_the_reference(head, reference, names):
    head.train()(reference["head"]["x"])
    state = head.state_dict()
    after = reference["head"]["train"]["state_dict_after"]
    assert len(after) == 12
    for name, value in after.items():
        torch.testing.assert_close(state[names["head"](name)], value, rtol=1e-4, atol=1e-5)


def test_fresh_weights_have_the_statistics_of_the_reference(reference, names):
    torch.manual_seed(0)
    parameters = dict(Head(64, 20, 5).named_parameters())
    expected = reference["head"]["init_mean_std"]
    trained = {k: v for k, v in expected.items() if "running" not in k}
    assert {names["head"](name) for name in trained} == set(parameters)
    for name, (mean, std) in trained.items():
        value = parameters[names["head"](name)]
        # The standard error of the mean and of the deviation, eight times over.
        slack = 8 * std / math.sqrt(value.numel())
        assert value.mean().item() == pytest.approx(mean, abs=slack + 1e-6), name
        deviation = value.std(correction=0).item()
        assert deviation == pytest.approx(std, abs=slack + 1e-6), name
    assert parameters["cls_score.bias"].unique().item() == pytest.approx(-math.log(99))


def test_outputs_are_float32_under_autocast(head, reference):
    with torch.autocast("cpu", torch.bfloat16):
        cls_logits, deltas = head(reference["head"]["x"])
    assert cls_logits.dtype == deltas.dtype == torch.float32


def test_towers_have_the_depth_asked_for():
    head = Head(8, 3, 2, cls_convs=0, reg_convs=1)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in head.modules()) == 4
    cls_logits, deltas = head(torch.zeros(1, 8, 2, 3))
    assert cls_logits.shape == (1, 12, 3)
    assert deltas.shape == (1, 12, 4)
