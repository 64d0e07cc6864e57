import fold_peers
import pytest
import torch
from fold_cost import Cost
from fold_peers import NETWORKS, TOOLS, LargeKernel, measure_in_turns

from tinydet.reparam import compare_outputs, fold

_WORK = """
import os
from fold_cost import Cost

def work(tool, network):
    if tool == "torch.fx":
        return "TraceError"
    return Cost(float(os.getpid()), None)
"""


@pytest.mark.slow
def test_measure_in_turns__each_run_has_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "peers_work.py").write_text(_WORK)
    monkeypatch.syspath_prepend(tmp_path)
    from peers_work import work

    costs = measure_in_turns("resnet101", 1, work)
    assert list(costs) == list(TOOLS)
    assert costs["torch.fx"] == "TraceError"
    assert costs["fold"].cpu_seconds != costs["timm"].cpu_seconds


def test_measure_in_turns__unknown_network():
    with pytest.raises(ValueError, match="resnit: not one of repvgg_b1, "):
        measure_in_turns("resnit", 1)


def test_median():
    costs = [Cost(3.0, 10.0), Cost(1.0, 30.0), Cost(2.0, 20.0)]
    assert fold_peers._median(costs) == Cost(2.0, 20.0)
    assert fold_peers._median([*costs, "TraceError"]) == "TraceError"
    assert fold_peers._median([Cost(3.0, None)]) == Cost(3.0, None)


def test_cells():
    costs = {"fold": Cost(3.0, 100.0), "timm": Cost(0.5, None), "torch.fx": "TraceError"}
    cells = ["net", "3.00", "100", "0.50", "", "TraceError", "", "6.0"]
    assert fold_peers._cells("net", costs) == cells
    assert fold_peers._cells("net", {**costs, "timm": "KeyError"})[-1] == ""


def test_measure__a_tool_that_fails(monkeypatch):
    monkeypatch.setitem(NETWORKS, "small", lambda: (LargeKernel(2), torch.randn(1, 2, 14, 14)))
    monkeypatch.setitem(TOOLS, "timm", lambda *_: {}["missing"])
    assert fold_peers.measure("timm", "small") == "KeyError"
    assert isinstance(fold_peers.measure("fold", "small"), Cost)


def test_large_kernel__folds_into_one_layer():
    model = LargeKernel(2).eval()
    folded, _ = fold(model, torch.zeros(1, 2, 14, 14))
    (layer,) = (m for m in folded.modules() if not list(m.children()))
    assert layer.kernel_size == (31, 31)
    assert compare_outputs(model, folded, [torch.randn(2, 2, 9, 40)]).max_rel < 1e-5


def test_networks__yolof():
    model, example = NETWORKS["yolof_resnet50"]()
    with torch.no_grad():
        logits, deltas = model.eval()(example)
    assert logits.shape[-1] == 80
    assert deltas.shape[-1] == 4
