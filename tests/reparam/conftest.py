import pytest
import torch

from tinydet.reparam import fold
from tinydet.reparam.norms import count_norms


def _randomise(model, seed=0):
    """Give norms statistics of order one, weights of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_var", None) is None:
            continue
        with torch.no_grad():
            if hasattr(module, "running_mean"):
                module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 3.0, generator=generator)
            if module.weight is not None:
                module.weight.normal_(generator=generator)
                module.bias.normal_(generator=generator)
    return model


def _check_fold(model, x, left=0):
    """Randomise a float64 model, fold it, and compare both; `left` norms stay."""
    model = _randomise(model).eval()
    folded, report = fold(model, x)
    with torch.no_grad():
        torch.testing.assert_close(folded(x.clone()), model(x.clone()), rtol=1e-9, atol=1e-9)
    assert report.norms_after == count_norms(folded) == left
    return folded, report


@pytest.fixture
def randomise():
    return _randomise


@pytest.fixture
def check_fold():
    return _check_fold
