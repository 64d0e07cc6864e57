import sys
import time

import pytest
import torch
from fold_cost import measured


def test_measured__returns_what_the_call_returns():
    result, cost = measured(lambda: "it")
    assert result == "it"
    assert cost.cpu_seconds >= 0


def test_measured__counts_work_and_not_waiting():
    def work():
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    assert measured(work)[1].cpu_seconds >= 0.2
    assert measured(lambda: time.sleep(0.2))[1].cpu_seconds < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_measured__memory_that_is_freed_again_counts():
    def allocate():
        return torch.ones(25_000_000).sum().item()  # 100 MB

    kept = torch.ones(50_000_000)
    for _ in range(2):  # The first call's peak does not count in the second.
        peak = measured(allocate)[1].peak_mb
        assert 95 < peak < 130
    assert measured(lambda: None)[1].peak_mb < 20
    assert kept.sum() > 0


def test_measured__no_peak_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr("fold_cost._CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert measured(lambda: None)[1].peak_mb is None
