import json
from dataclasses import replace

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from tinydet.config import Data  # noqa: E402
from tinydet.deployment import onnx as onnx_export  # noqa: E402
from tinydet.deployment.fold_checkpoint import fold_detector  # noqa: E402
from tinydet.deployment.images import SampleImages, random_images  # noqa: E402
from tinydet.deployment.onnx import (  # noqa: E402
    export_checkpoint,
    export_detector,
    write_checked,
)
from tinydet.deployment.onnx_detector import OnnxDetector, SplitOnnxDetector, unpack  # noqa: E402
from tinydet.deployment.quantize import quantize_checkpoint  # noqa: E402
from tinydet.reparam.branches import ChannelScale  # noqa: E402
from tinydet.yolof.decode import decode_boxes  # noqa: E402


def _run(model, names, images):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(x) for x in session.run(names, {"images": images.numpy()})]


def _detections(model, images):
    return unpack(*_run(model, ["boxes", "scores", "labels", "count"], images))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_detections_are_the_detectors(detector, exported, batch, size):
    images = random_images(batch, size, seed=batch)
    expected = detector.detect(images)  # the unfolded one: folding is part of what is shipped
    found = _detections(exported, images)
    assert len(found) == batch
    for a, b in zip(expected, found, strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(b.boxes, a.boxes, rtol=0, atol=1e-2)
        assert torch.equal(a.labels, b.labels)


def test_graph(exported):
    model = exported
    onnx.checker.check_model(model, full_check=True)
    operators = {node.op_type for node in model.graph.node}
    assert "BatchNormalization" not in operators
    assert "NonMaxSuppression" in operators
    assert all(not t.external_data for t in model.graph.initializer)
    images, sizes = model.graph.input
    assert sizes.name == "sizes"  # It has a value, and so may be left out.
    assert "sizes" in {t.name for t in model.graph.initializer}
    assert images.name == "images"
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    batch, channels, height, width = images.type.tensor_type.shape.dim
    assert channels.dim_value == 3
    assert all(d.dim_param for d in (batch, height, width))
    assert [o.name for o in model.graph.output] == ["boxes", "scores", "labels", "count"]


def test_branches_leave_no_node(make_detector, detector, exported):
    model = replace(detector.config, expand="orepa", expand_online=True)
    grown = make_detector(model)
    with torch.no_grad():
        for module in grown.modules():
            if isinstance(module, ChannelScale):
                module.weight.normal_()
    folded, _ = fold_detector(grown)
    own = export_detector(folded, Data(image_size=96, short_side=64))
    assert [n.op_type for n in own.graph.node] == [n.op_type for n in exported.graph.node]
    images = random_images(2, (96, 64))
    for a, b in zip(grown.detect(images), _detections(own, images), strict=True):
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)
        assert torch.equal(a.labels, b.labels)


def test_two_maps_as_one_keep_any_size(make_detector, detector):
    fused = make_detector(replace(detector.config, feature="P4"))
    model = export_detector(fold_detector(fused)[0], Data(image_size=96))
    for size in [(64, 96), (128, 32)]:
        images = random_images(2, size)
        for a, b in zip(fused.detect(images), _detections(model, images), strict=True):
            assert len(a.scores) > 3
            torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)
            torch.testing.assert_close(b.boxes, a.boxes, rtol=0, atol=1e-2)
            assert torch.equal(a.labels, b.labels)


def test_metadata(exported, detector):
    values = {p.key: json.loads(p.value) for p in exported.metadata_props}
    assert values["classes"] == list(detector.classes)
    assert values["stride"] == 32
    assert values["score_threshold"] == 0.05
    assert values["nms_iou"] == 0.6
    assert values["max_detections"] == 50
    assert values["size"] is None
    assert "uint8 RGB" in values["input"]
    assert (values["image_size"], values["keep_ratio"], values["short_side"]) == (96, True, 64)


def test_fixed_size(exported_fixed, detector):
    dims = exported_fixed.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims[1:]] == [3, 64, 96]
    assert dims[0].dim_param
    # Anchors and clipping limits of one size are constants, not computed for each image.
    names = [output for node in exported_fixed.graph.node for output in node.output]
    network = list(exported_fixed.graph.node)[: names.index("pair_scores") + 1]
    assert not {"Range", "Shape", "ConstantOfShape", "Expand"} & {n.op_type for n in network}
    images = random_images(2, (64, 96))
    for a, b in zip(detector.detect(images), _detections(exported_fixed, images), strict=True):
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)


@pytest.fixture
def checkpoint(make_checkpoint, detector):
    return make_checkpoint(detector)


@pytest.mark.parametrize("size", [None, (64, 96)])
def test_export_checkpoint__compares_photographs_where_there_are_any(
    size, checkpoint, exported, monkeypatch
):
    grey = SampleImages((torch.full((1, 3, 64, 128), 77, dtype=torch.uint8),), "a photograph", True)
    compared = []

    def write(model, path, detector, batches):
        compared.extend(batches)
        return write_checked(model, path, detector, batches)

    monkeypatch.setattr(onnx_export, "sample_images", lambda *_: grey)
    monkeypatch.setattr(onnx_export, "write_checked", write)
    monkeypatch.setattr(onnx_export, "export_detector", lambda *_: exported)
    result = export_checkpoint(checkpoint, size=size)
    assert result.checked_on.startswith("a photograph; ")
    assert {len(batch) for batch in compared} == {1, 3}
    assert all((batch == 77).all() for batch in compared)
    if size:
        assert {tuple(batch.shape[-2:]) for batch in compared} == {size}
    assert result.folded_first
    assert result.path == checkpoint.with_name("best.onnx")
    assert result.path.read_bytes() == exported.SerializeToString()
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["best.onnx", "best.pt"]


def test_export_checkpoint__never_takes_the_place_of_its_source(checkpoint):
    before = checkpoint.read_bytes()
    for export in (export_checkpoint, lambda *paths: list(quantize_checkpoint(*paths))):
        with pytest.raises(ValueError, match=r"best\.pt: end the name in \.onnx"):
            export(checkpoint, checkpoint)
    assert checkpoint.read_bytes() == before


@pytest.mark.slow
def test_export_checkpoint__without_nms(checkpoint, detector):
    result = export_checkpoint(checkpoint, size=(64, 96), nms=False)
    model, images = onnx.load(result.path), random_images(3, (64, 96))
    assert "NonMaxSuppression" not in {n.op_type for n in model.graph.node}
    scores, boxes = _run(model, ["scores", "boxes"], images)
    with torch.inference_mode():
        logits, deltas = detector(images)
        expected = decode_boxes(detector.anchors((64, 96)), deltas, detector.config.center_clamp)
    torch.testing.assert_close(scores, logits.sigmoid(), rtol=0, atol=1e-4)
    limit = torch.tensor([96, 64, 96, 64])
    torch.testing.assert_close(boxes, expected.clamp(min=0).minimum(limit), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="exported with --no-nms"):
        OnnxDetector(result.path)
    with pytest.raises(ValueError, match="without --no-nms"):
        SplitOnnxDetector(result.path)


@pytest.mark.parametrize("layer", ["cls_score", "box_delta"])
def test_refuses_a_model_that_differs(exported, make_detector, tmp_path, layer):
    other, _ = fold_detector(make_detector())
    getattr(other.head, layer).bias.data += 0.02
    path = tmp_path / "x.onnx"
    path.write_text("old")
    with pytest.raises(ValueError, match="differs from torch"):
        write_checked(exported, path, other, [random_images(2, (64, 64))])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_when_nothing_is_found_but_the_boxes_differ(exported, make_detector, tmp_path):
    quiet, _ = fold_detector(make_detector())
    quiet.head.cls_score.bias.data -= 20
    silenced = onnx.ModelProto()
    silenced.CopyFrom(exported)
    (bias,) = [t for t in silenced.graph.initializer if t.name.endswith("head.cls_score.bias")]
    bias.CopyFrom(
        onnx.numpy_helper.from_array(quiet.head.cls_score.bias.detach().numpy(), bias.name)
    )
    images = [random_images(2, (64, 64))]
    check = write_checked(silenced, tmp_path / "a.onnx", quiet, images)
    assert check.detections.matched == 0
    quiet.head.box_delta.bias.data += 0.02
    with pytest.raises(ValueError, match="differs from torch"):
        write_checked(silenced, tmp_path / "b.onnx", quiet, images)


def test_size_must_be_a_multiple_of_32(folded):
    with pytest.raises(ValueError, match="multiples of 32"):
        export_detector(folded, Data(), (64, 100))
