"""Copies of networks whose weights are the results of computations."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tinydet.reparam.deep_copy import deep_copy


def test_copy_of_a_network_that_holds_results_of_differentiable_code():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated, and still in use.
        layer = nn.utils.weight_norm(nn.Conv2d(4, 4, 3))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    twin = deep_copy(layer)
    assert twin.weight_g is not layer.weight_g
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(twin(x), layer(x))
    twin.weight_g.data.mul_(2)
    assert not torch.equal(twin(x), layer(x))
    twin(x).sum().backward()
    assert twin.weight_v.grad is not None
    assert layer.weight_v.grad is None
