from dataclasses import replace

import pytest
import torch
from torch import nn

from tinydet.config import Optim
from tinydet.reparam import expand
from tinydet.training.optim import learning_rate_factor, make_optimizer, make_schedule


def test_plan_scales_rate_up_and_warmup_down_with_the_batch():
    schedule = make_schedule(Optim(lr=0.03, warmup_iters=1500), total_batch=32, iterations=10_000)
    assert schedule.lr == pytest.approx(0.06)
    assert schedule.warmup_iters == 750
    assert "0.03 -> 0.06" in schedule.lines[0]
    assert "1500 -> 750" in schedule.lines[0]


def test_plan_says_nothing_at_the_base_batch_and_when_scaling_is_off():
    assert make_schedule(Optim(), 16, 10_000).lines == ()
    schedule = make_schedule(Optim(lr=0.03, scale_with_batch=False), 64, 10_000)
    assert (schedule.lr, schedule.warmup_iters, schedule.lines) == (0.03, 1500, ())


def test_plan_cuts_a_warmup_longer_than_a_third_of_the_run():
    schedule = make_schedule(Optim(warmup_iters=1500), 16, 300)
    assert schedule.warmup_iters == 100
    assert "1500 -> 100" in schedule.lines[0]


def test_step_schedule_by_hand():
    # 12 epochs of 100 iterations, drops after epochs 8 and 11, warm-up over 100 from 0.1.
    optim = Optim(warmup_iters=100, warmup_factor=0.1)
    schedule = make_schedule(optim, 16, 1200)
    expected = {0: 0.1, 50: 0.55, 100: 1.0, 799: 1.0, 800: 0.1, 1099: 0.1, 1100: 0.01, 1199: 0.01}
    got = {i: learning_rate_factor(optim, schedule, i) for i in expected}
    assert got == pytest.approx(expected)


def test_cosine_schedule_by_hand():
    optim = Optim(schedule="cosine", warmup_iters=0)
    schedule = make_schedule(optim, 16, 100)
    got = [learning_rate_factor(optim, schedule, i) for i in (0, 25, 50, 75, 100)]
    assert got == pytest.approx([1, 0.5 + 2**0.5 / 4, 0.5, 0.5 - 2**0.5 / 4, 0], abs=1e-12)


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(2, 4))


def _groups(net, optim):
    schedule = make_schedule(optim, 16, 100)
    return make_optimizer(net, optim, schedule)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay_and_the_backbone_is_slower(name):
    net = _Net()
    optim = Optim(optimizer=name, lr=0.9, weight_decay=0.5, backbone_lr_factor=1 / 3)
    optimizer = _groups(net, optim)
    found = {
        id(p): (group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(found) == len(list(net.parameters()))
    conv, norm, layer_norm = net.backbone
    assert found[id(conv.weight)] == pytest.approx((0.3, 0.5))
    for parameter in (conv.bias, norm.weight, norm.bias, layer_norm.weight, layer_norm.bias):
        assert found[id(parameter)] == pytest.approx((0.3, 0))
    assert found[id(net.head[0].weight)] == pytest.approx((0.9, 0.5))
    assert found[id(net.head[1].weight)] == pytest.approx((0.9, 0))


def test_scales_of_branches_inside_a_weight_do_not_decay():
    net = _Net()
    net.backbone = expand(nn.Conv2d(3, 4, 3, padding=1), "dbb", online=True)
    optimizer = _groups(net, Optim(weight_decay=0.5))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    found = {
        name.rpartition(".branches.")[2]: decays[id(p)]
        for name, p in net.backbone.named_parameters()
        if ".branches." in name
    }
    scales = {"0.1.weight", "1.1.weight", "1.3.weight", "2.1.weight", "2.3.weight"}
    kernels = {"0.0.weight", "1.0.weight", "1.2.weight", "2.0.weight"}
    assert found == dict.fromkeys(scales, 0.0) | dict.fromkeys(kernels, 0.5)


def test_frozen_parameters_are_left_out():
    net = _Net()
    net.backbone[0].requires_grad_(False)
    optimizer = _groups(net, Optim())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(net.parameters())) - 2


def test_sgd_step_equals_the_formula():
    net = _Net()
    optim = replace(Optim(), lr=0.1, momentum=0.9, weight_decay=0.01, warmup_iters=0)
    optimizer = _groups(net, optim)
    weight = net.head[0].weight
    start, grad = weight.detach().clone(), torch.randn_like(weight)
    expected, velocity = start.clone(), torch.zeros_like(start)
    for _ in range(2):
        weight.grad = grad.clone()
        velocity = 0.9 * velocity + grad + 0.01 * expected
        expected = expected - 0.1 * velocity
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)
