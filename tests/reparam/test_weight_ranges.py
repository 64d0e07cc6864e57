"""The spread of a layer's channels: a loop over the channels, and int8 rounding itself."""

import statistics

import pytest
import torch
from torch import nn

from tinydet.reparam import fold, weight_ranges


def _channels(layer):
    """The weights that each output channel is made of, by one input channel's response at a time.

    An output channel of a layer depends on exactly the weights with a gradient.
    """
    axes = layer.weight.ndim - 2
    columns = layer.in_channels if axes else layer.in_features
    side = 9 if axes else 0
    y = layer(torch.ones(1, columns, *[side] * axes, dtype=torch.float64))
    for channel in y[0]:
        (gradient,) = torch.autograd.grad(channel.sum(), layer.weight, retain_graph=True)
        yield layer.weight[gradient != 0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 7),
        nn.Conv1d(6, 4, 3, groups=2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(6, 6, (1, 3), groups=6),
        nn.Conv3d(2, 3, 2),
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 3, 3, groups=3),
        nn.ConvTranspose3d(2, 5, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_channels_one_by_one(layer, seed):
    torch.manual_seed(seed)
    layer = layer.double()
    nn.init.normal_(layer.weight)
    largest = [weights.abs().max().item() for weights in _channels(layer)]
    (found,) = weight_ranges(nn.ModuleDict({"it": layer}))
    assert found.name == "it"
    assert found.largest == max(largest)
    assert found.spread == pytest.approx(max(largest) / statistics.median(largest))


def test_a_channel_at_the_median_keeps_127_steps_divided_by_the_spread():
    torch.manual_seed(0)
    layer = nn.Linear(4000, 3, bias=False)
    with torch.no_grad():
        layer.weight.uniform_(-1, 1).mul_(torch.tensor([[0.02], [0.1], [1.0]]))
    (found,) = weight_ranges(layer)
    rounded = (layer.weight / (found.largest / 127)).round()
    steps = [row.unique().numel() // 2 for row in rounded]  # of either sign
    assert steps == [3, 13, 127]
    assert 127 / found.spread == pytest.approx(steps[1], abs=0.5)


def test_channels_without_weights_do_not_count():
    layer = nn.Conv2d(2, 5, 1)
    with torch.no_grad():
        layer.weight.zero_()
        assert weight_ranges(layer)[0].spread == 1
        layer.weight[:3, 0, 0, 0] = torch.tensor([1.0, -2.0, 8.0])
    assert weight_ranges(layer)[0].spread == 4
    assert weight_ranges(nn.ReLU()) == []


def test_the_report_shows_what_folding_a_norm_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    factors = torch.tensor([1.0, 2.0, 4.0, 8.0, 80.0])
    with torch.no_grad():
        model[0].weight[:, 0, 0, 0] = 1  # The largest of each channel.
        model[1].weight.copy_(factors)
    _, report = fold(model.eval(), torch.zeros(1, 3, 9, 9))
    before, after = report.ranges_before, report.ranges_after
    assert [found.name for found in before] == [found.name for found in after] == ["0", "3"]
    assert before[0].spread == pytest.approx(1)
    assert after[0].spread == pytest.approx(20)
    assert after[0].largest == pytest.approx(80 / (1 + model[1].eps) ** 0.5)
    assert after[1] == before[1]
    assert report.ranges_line() == (
        "ranges      largest channel 20.0 times the median in 0, 1.0 before"
    )


def test_merged_branches_have_no_counterpart():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    _, report = fold(nn.Sequential(Block(), nn.ReLU()).eval(), torch.zeros(1, 4, 9, 9))
    assert [found.name for found in report.ranges_before] == ["0.a", "0.b"]
    assert [found.name for found in report.ranges_after] == ["0"]
    assert report.ranges_line().endswith("the median in 0")
