from dataclasses import replace

import pytest
import torch
from torch import nn

from tinydet.training.ema import AveragedWeights
from tinydet.training.loop import prepare


def test_average_follows_the_formula_for_weights_and_running_statistics():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = AveragedWeights(net, decay=0.5)
    mean_weight = net[0].weight.detach().clone()
    mean_var = net[1].running_var.clone()
    for step in range(12):
        with torch.no_grad():
            net[0].weight.normal_()
            net[1].running_var.uniform_(1, 2)
            net[1].num_batches_tracked += 1
        ema.update()
        # The first update copies; then the decay rises from 2/11 to 0.5, reached at n = 8.
        decay = 0.0 if step == 0 else min(0.5, (1 + step) / (10 + step))
        mean_weight = decay * mean_weight + (1 - decay) * net[0].weight.detach()
        mean_var = decay * mean_var + (1 - decay) * net[1].running_var
    torch.testing.assert_close(ema.module[0].weight.detach(), mean_weight)
    torch.testing.assert_close(ema.module[1].running_var, mean_var)
    assert int(ema.module[1].num_batches_tracked) == 12


def test_the_trained_network_is_left_alone():
    net = nn.Linear(2, 2)
    ema = AveragedWeights(net, decay=0.9)
    before = net.weight.detach().clone()
    ema.update()
    ema.module.weight.data.zero_()
    torch.testing.assert_close(net.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_averages_have_the_layout_of_the_weights(tiny_experiment, memory_format):
    settings = replace(tiny_experiment.train, memory_format=memory_format)
    state, *_ = prepare(replace(tiny_experiment, train=settings), torch.device("cpu"))
    averages = dict(state.ema.module.named_parameters())
    for name, weight in state.detector.named_parameters():
        assert averages[name].stride() == weight.stride(), name
