"""INT8: what is quantised, what stays in float, and that the detections stay."""

from dataclasses import replace

import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tinydet.config import Data  # noqa: E402
from tinydet.data.shapes import render_shapes  # noqa: E402
from tinydet.deployment.equalize import prepare_for_int8  # noqa: E402
from tinydet.deployment.images import random_images  # noqa: E402
from tinydet.deployment.onnx import export_network  # noqa: E402
from tinydet.deployment.onnx_detector import RAW, OnnxDetector, SplitOnnxDetector  # noqa: E402
from tinydet.deployment.onnx_graph import find_convs  # noqa: E402
from tinydet.deployment.quantize import (  # noqa: E402  # noqa: E402
    Quantizer,
    quantizable,
    quantize_checkpoint,
    sensitivity,
)
from tinydet.training.checkpoint import load_checkpoint  # noqa: E402

_SIZE = (64, 96)


@pytest.fixture(scope="module")
def images():
    return [random_images(1, _SIZE, seed=i) for i in range(6)]


def _int8_weights(model):
    """Return the weights that are int8, by the names they had in float."""
    int8 = onnx.TensorProto.INT8
    tensors = [t for t in model.graph.initializer if t.data_type == int8 and len(t.dims) == 4]
    return {t.name.removesuffix("_quantized"): t for t in tensors}


def test_every_convolution_is_in_int8_with_a_scale_for_each_channel(exported_fixed, images):
    quantized = Quantizer(exported_fixed, images).quantize()
    onnx.checker.check_model(quantized, full_check=True)
    convs = find_convs(exported_fixed)
    weights = _int8_weights(quantized)
    assert {conv.node.input[1] for conv in convs.values()} == set(weights)
    scales = {t.name: t for t in quantized.graph.initializer if t.name.endswith("_scale")}
    for name, tensor in weights.items():
        assert list(scales[f"{name}_scale"].dims) == [tensor.dims[0]]
    # Decoding and selection are not: no quantised value goes into or comes out of them.
    after = {"Exp", "NonMaxSuppression", "TopK", "GatherND"}
    makers = {name: node for node in quantized.graph.node for name in node.output}
    for node in quantized.graph.node:
        if node.op_type in after:
            kinds = {makers[name].op_type for name in node.input if name in makers}
            assert "DequantizeLinear" not in kinds
    assert {p.key: p.value for p in quantized.metadata_props} == {
        p.key: p.value for p in exported_fixed.metadata_props
    }


def test_detections_are_near_those_in_float(exported_fixed, images):
    improved, places = prepare_for_int8(exported_fixed, images)
    assert places > 0
    quantized = OnnxDetector(Quantizer(improved, images).quantize())
    found, expected = (
        net.detect(torch.cat(images)) for net in (quantized, OnnxDetector(exported_fixed))
    )
    best = [float(e.scores[0]) for e in expected]
    assert min(best) > 0.2
    for f, e in zip(found, expected, strict=True):
        assert float(f.scores[0]) == pytest.approx(float(e.scores[0]), abs=0.1)


def test_nodes_to_keep_stay_in_float_and_only_leaves_all_others(exported_fixed, images):
    quantizer = Quantizer(exported_fixed, images)
    convs = list(find_convs(exported_fixed).values())
    kept = {convs[3].node.name, convs[-1].node.name}
    weights = _int8_weights(quantizer.quantize(keep=kept))
    float_ones = {c.node.input[1] for c in convs if c.node.name in kept}
    assert set(weights) == {c.node.input[1] for c in convs} - float_ones
    only = _int8_weights(quantizer.quantize(only=[convs[5].node.name]))
    assert set(only) == {convs[5].node.input[1]}


def _three_convs():
    """A network whose first channel is zero in float, whatever weights read it."""
    torch.manual_seed(0)
    first, second, third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight[0] = 0
        first.bias[0] = -1  # ReLU turns it to zero.
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third).eval()


class _Scores(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        out = self.net(images.float() / 255)
        return out.sigmoid().flatten(1), out


def test_sensitivity_finds_the_layer_that_int8_destroys(images, every_step_said):
    net = _three_convs()
    changes = []
    for huge in (False, True):
        if huge:  # Of the int8 values of each row, the others have none left.
            with torch.no_grad():
                net[2].weight[:, 0] = 300 * net[2].weight.abs().max()
        model = export_network(_Scores(net), images[0], {}, RAW)
        changes.append(dict(sensitivity(Quantizer(model, images), images[:2])))
    usual, destroyed = changes
    assert "quantizing layer by layer: 3/3 layers" in every_step_said()
    names = [conv.node.name for conv in find_convs(model).values()]
    assert list(usual) == list(destroyed) == names
    worse = [destroyed[name] / usual[name] for name in names]
    assert worse[1] > 10
    assert worse[0] == pytest.approx(1)
    assert worse[2] == pytest.approx(1)


def test_quantizable_ends_at_the_last_convolutions(exported_fixed):
    names = set(quantizable(exported_fixed))
    kinds = {n.op_type for n in exported_fixed.graph.node if n.name in names}
    assert {"Conv", "Relu", "Add"} <= kinds
    assert not kinds & {"Sub", "Cast", "Exp", "Max", "Min", "TopK", "Shape", "Gather"}


@pytest.fixture
def checkpoint(detector, exported_fixed, make_checkpoint, tmp_path, monkeypatch):
    # Exporting takes seconds.
    monkeypatch.setattr("tinydet.deployment.quantize.export_detector", lambda *_: exported_fixed)
    root = tmp_path / "shapes"
    render_shapes(root, 4, 3, 96)
    return make_checkpoint(detector, Data(root=str(root), image_size=96, short_side=64))


def test_quantize_checkpoint(checkpoint, every_step_said, capfd):
    lines = list(quantize_checkpoint(checkpoint, size=_SIZE, images=3, budget=1.0))
    said = [line.split(", ")[0] for line in every_step_said()]
    assert "onnxruntime" not in capfd.readouterr().err
    assert said.count("measuring ranges: 3/3 images") == 2  # as it is, and equalized
    assert said.count("measuring activations: 3 batches") == 2
    assert said.count("evaluating: 3/3 images") == 3
    assert said.count("timing: 150/150 images") == 1
    assert sum("img/s" in line for line in lines) == 1
    rows = [line for line in lines if line.startswith(("float32", "int8"))]
    assert [row[:11].strip() for row in rows] == ["float32", "int8, naive", "int8"]
    file = checkpoint.with_name("best.int8.onnx")
    assert lines[-1].startswith(f"wrote       {file}")
    assert OnnxDetector(file).detect(random_images(2, _SIZE))
    float_size, int8_size = (float(rows[i].split()[-3]) for i in (0, 2))
    assert int8_size < float_size


def test_figures_are_percent_and_of_the_threads_that_are_said(checkpoint, monkeypatch, caplog):
    asked = []

    def split(model, threads=0):
        asked.append(threads)
        return SplitOnnxDetector(model, threads)

    monkeypatch.setattr("tinydet.deployment.quantize.SplitOnnxDetector", split)
    monkeypatch.setattr("tinydet.deployment.quantize._ap50", lambda *_: 0.8593)
    lines = list(quantize_checkpoint(checkpoint, size=_SIZE, images=2))
    threads = torch.get_num_threads()
    assert asked == [threads] * 3
    assert f"timed       in ONNX Runtime, {threads} threads" in lines
    assert any(line.split()[:3] == ["float32", "85.93", "0.00"] for line in lines)
    assert "finds nothing" not in caplog.text
    monkeypatch.setattr("tinydet.deployment.quantize._ap50", lambda *_: 0.0)
    list(quantize_checkpoint(checkpoint, size=_SIZE, images=2))
    assert "finds nothing in float32 either" in caplog.text


@pytest.mark.parametrize("budget", [float("nan"), -0.1, 1.5])
def test_a_budget_that_is_no_share_is_refused(checkpoint, budget):
    with pytest.raises(ValueError, match=f"--budget {budget:g}: must be from 0 to 1"):
        list(quantize_checkpoint(checkpoint, budget=budget))


def test_the_experiment_s_data_set_in_place_of_a_moved_one(make_checkpoint, detector, tmp_path):
    source = make_checkpoint(detector)
    experiment = load_checkpoint(source).experiment
    data = replace(experiment.data, root=str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError, match="new: no such folder"):
        list(quantize_checkpoint(source, experiment=replace(experiment, data=data)))


def test_test_images_without_objects_are_refused(checkpoint, tmp_path):
    for path in (tmp_path / "shapes" / "Annotations").glob("test_*.xml"):
        path.write_text(path.read_text().replace("<difficult>0<", "<difficult>1<"))
    with pytest.raises(ValueError, match=r"shapes \(test\): its 3 images have no object to find"):
        list(quantize_checkpoint(checkpoint, size=_SIZE, images=2))


def test_layers_are_kept_in_float_until_the_budget_is_held(checkpoint, monkeypatch):
    """Accuracy is made up: each of the first three layers kept wins a third of the loss back."""

    def ap50(model, *_):
        quantized = len(_int8_weights(model))
        most.append(quantized)
        kept = max(most) - quantized
        return 0.9 if not quantized else 0.6 + 0.1 * min(kept, 3)

    def all_alike(quantizer, _):
        return [(conv.node.name, 0.5) for conv in find_convs(quantizer.model).values()]

    most = []
    monkeypatch.setattr("tinydet.deployment.quantize._ap50", ap50)
    monkeypatch.setattr("tinydet.deployment.quantize.sensitivity", all_alike)
    lines = list(quantize_checkpoint(checkpoint, images=2, budget=0.05, size=_SIZE))
    assert [line.split()[0] for line in lines if "in float: AP50" in line] == ["1", "2", "4"]
    assert lines[-1].endswith("4 layers in float")
    model = onnx.load(checkpoint.with_name("best.int8.onnx"))
    assert len(_int8_weights(model)) == max(most) - 4


def test_nothing_is_written_when_the_budget_cannot_be_held(checkpoint, monkeypatch):
    monkeypatch.setattr(
        "tinydet.deployment.quantize._ap50",
        lambda model, *_: (
            0.0 if any(n.op_type == "QuantizeLinear" for n in model.graph.node) else 1
        ),
    )
    monkeypatch.setattr(
        "tinydet.deployment.quantize.sensitivity", lambda *_: [("node_conv2d", 1.0)]
    )
    with pytest.raises(ValueError, match=r"loses 100\.00 points of AP50, more .* --budget 0\.01"):
        list(quantize_checkpoint(checkpoint, size=_SIZE, images=2))
    assert not list(checkpoint.parent.glob("*.onnx"))
