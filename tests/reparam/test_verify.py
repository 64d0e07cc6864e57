import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tinydet.reparam.verify import OutputDifference, compare_outputs, difference


@dataclass
class _Pair:
    boxes: torch.Tensor
    scores: torch.Tensor


def test_difference__hand_computed():
    found = difference(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0]))
    assert (found.max_abs, found.max_rel) == (0.5, 0.125)


def test_difference__nested_outputs():
    a = {"x": [torch.zeros(2), (torch.ones(3),)], "y": _Pair(torch.ones(4), torch.full((2,), 2.0))}
    b = {"x": [torch.zeros(2), (torch.ones(3),)], "y": _Pair(torch.ones(4), torch.full((2,), 3.0))}
    assert difference(a, a) == difference(b, b)
    assert difference(a, b).max_abs == 1.0
    assert difference(a, b).max_rel == 0.5


def test_difference__zero_reference():
    assert difference(torch.zeros(2), torch.zeros(2)).max_rel == 0.0
    assert difference(torch.zeros(2), torch.ones(2)).max_rel == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_difference__not_finite_is_infinite(bad):
    assert difference(torch.tensor([bad]), torch.tensor([1.0])).max_rel == math.inf
    assert difference(torch.tensor([bad]), torch.tensor([bad])).max_rel == math.inf


def test_difference__complex_numbers():
    a, b = torch.tensor([3 + 4j]), torch.tensor([3 + 5j])
    assert difference(a, b) == OutputDifference(max_abs=1.0, max_rel=0.25)


def test_difference__other_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        difference(torch.zeros(1, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="differ in shape"):
        difference([torch.zeros(1)], [])


def test_difference__empty_tensors_are_equal():
    assert difference(torch.zeros(0, 4), torch.zeros(0, 4)).max_abs == 0.0


def test_compare__inputs_survive_inplace_models():
    x = torch.tensor([-1.0, 2.0])
    assert compare_outputs(nn.ReLU(inplace=True), nn.ReLU(), [x, (x,)]).max_abs == 0.0
    assert x.tolist() == [-1.0, 2.0]
    assert compare_outputs(nn.ReLU(), nn.Identity(), [x]).max_abs == 1.0


def test_compare__no_inputs():
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_outputs(nn.Identity(), nn.Identity(), [])


def test_compare__nothing_to_compare():
    class Mute(nn.Module):
        def forward(self, x):
            return str(x.shape)

    with pytest.raises(ValueError, match="no tensor"):
        compare_outputs(Mute(), Mute(), [torch.zeros(1)])
