import pytest
import torch

from tinydet.deployment import gemm


def test_peak_is_that_of_the_fastest_size_and_growth_ends(monkeypatch):
    """A made-up machine: 1 GFLOP/s up to 512, 2 above, so that 1024 takes long enough."""

    def seconds(a, b):
        sides.append(len(a))
        assert a.shape == b.shape == (len(a), len(a))
        assert a.dtype == torch.bfloat16
        return 2 * len(a) ** 3 / (2e12 if len(a) > 512 else 1e12) * (100 if len(a) > 512 else 1)

    sides = []
    monkeypatch.setattr(gemm, "_seconds", seconds)
    monkeypatch.setattr(gemm, "_SECONDS", 0.05)
    peak = gemm.gemm_peak(torch.device("cpu"), torch.bfloat16)
    assert peak == pytest.approx(1e12)
    assert max(sides) == 1024
