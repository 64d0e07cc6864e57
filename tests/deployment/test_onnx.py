import json

import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tinydet.config import Data  # noqa: E402
from tinydet.deployment import onnx as onnx_export  # noqa: E402
from tinydet.deployment.images import SampleImages, random_images  # noqa: E402
from tinydet.deployment.onnx import (  # noqa: E402
    export_checkpoint,
    export_detector,
    write_checked,
)
from tinydet.deployment.reparameterize import fold_detector  # noqa: E402
from tinydet.deployment.runtime import OnnxNetwork, unpack  # noqa: E402
from tinydet.training.checkpoint import load_detector  # noqa: E402
from tinydet.yolof.decode import decode_boxes  # noqa: E402


@pytest.fixture(scope="module")
def folded(detector):
    return fold_detector(detector)[0]


@pytest.fixture(scope="module")
def model(folded):
    return export_detector(folded, Data(image_size=96, short_side=64))


def _detections(model, images):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs = session.run(["boxes", "scores", "labels", "count"], {"images": images.numpy()})
    return unpack(*[torch.from_numpy(x) for x in outputs])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_detections_are_the_detectors(detector, model, batch, size):
    images = random_images(batch, size, seed=batch)
    expected = detector.detect(images)  # the unfolded one: folding is part of what is shipped
    found = _detections(model, images)
    assert len(found) == batch
    for a, b in zip(expected, found, strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(b.boxes, a.boxes, rtol=0, atol=1e-2)
        assert torch.equal(a.labels, b.labels)


def test_graph(model):
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


def test_metadata(model, detector):
    values = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert values["classes"] == list(detector.classes)
    assert values["stride"] == 32
    assert values["score_threshold"] == 0.05
    assert values["nms_iou"] == 0.6
    assert values["max_detections"] == 50
    assert values["size"] is None
    assert "uint8 RGB" in values["input"]
    assert (values["image_size"], values["keep_ratio"], values["short_side"]) == (96, True, 64)


@pytest.mark.parametrize("size", [None, (64, 96)])
def test_export_checkpoint__compares_photographs_where_there_are_any(
    size, make_checkpoint, make_detector, monkeypatch
):
    grey = SampleImages((torch.full((1, 3, 64, 128), 77, dtype=torch.uint8),), "a photograph", True)
    compared = []

    def write(model, path, detector, batches):
        compared.extend(batches)
        return write_checked(model, path, detector, batches)

    monkeypatch.setattr(onnx_export, "sample_images", lambda *_: grey)
    monkeypatch.setattr(onnx_export, "write_checked", write)
    result = export_checkpoint(make_checkpoint(make_detector()), size=size)
    assert result.checked_on.startswith("a photograph; ")
    assert {len(batch) for batch in compared} == {1, 3}
    assert all((batch == 77).all() for batch in compared)
    if size:
        assert {tuple(batch.shape[-2:]) for batch in compared} == {size}


def test_export_checkpoint__training_form_and_fixed_size(make_checkpoint, make_detector):
    source = make_checkpoint(make_detector())
    result = export_checkpoint(source, size=(64, 96))
    assert result.folded_first
    assert result.path == source.with_name("best.onnx")
    model = onnx.load(result.path)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims[1:]] == [3, 64, 96]
    assert dims[0].dim_param
    # Anchors and clipping limits of one size are constants, not made anew for each image.
    names = [output for node in model.graph.node for output in node.output]
    network = list(model.graph.node)[: names.index("pair_scores") + 1]
    assert not {"Range", "Shape", "ConstantOfShape", "Expand"} & {n.op_type for n in network}
    images = random_images(2, (64, 96))
    for a, b in zip(load_detector(source).detect(images), _detections(model, images), strict=True):
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)
    assert sorted(p.name for p in source.parent.iterdir()) == ["best.onnx", "best.pt"]


def test_export_checkpoint__without_nms(make_checkpoint, make_detector):
    source = make_checkpoint(make_detector())
    result = export_checkpoint(source, size=(64, 96), nms=False)
    assert "NonMaxSuppression" not in {n.op_type for n in onnx.load(result.path).graph.node}
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    detector, images = load_detector(source), random_images(3, (64, 96))
    scores, boxes = session.run(["scores", "boxes"], {"images": images.numpy()})
    with torch.inference_mode():
        logits, deltas = detector(images)
        expected = decode_boxes(detector.anchors((64, 96)), deltas, detector.config.center_clamp)
    torch.testing.assert_close(torch.from_numpy(scores), logits.sigmoid(), rtol=0, atol=1e-4)
    limit = torch.tensor([96, 64, 96, 64])
    torch.testing.assert_close(
        torch.from_numpy(boxes), expected.clamp(min=0).minimum(limit), rtol=0, atol=0.01
    )
    with pytest.raises(ValueError, match="exported with --no-nms"):
        OnnxNetwork(result.path)


@pytest.mark.parametrize("layer", ["cls_score", "box_delta"])
def test_refuses_a_model_that_differs(model, make_detector, tmp_path, layer):
    other, _ = fold_detector(make_detector())
    getattr(other.head, layer).bias.data += 0.02
    path = tmp_path / "x.onnx"
    path.write_text("old")
    with pytest.raises(ValueError, match="differs from torch"):
        write_checked(model, path, other, [random_images(2, (64, 64))])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_when_nothing_is_found_but_the_boxes_differ(model, make_detector, tmp_path):
    quiet, _ = fold_detector(make_detector())
    quiet.head.cls_score.bias.data -= 20
    silenced = onnx.ModelProto()
    silenced.CopyFrom(model)
    (bias,) = [t for t in silenced.graph.initializer if t.name.endswith("head.cls_score.bias")]
    bias.CopyFrom(
        onnx.numpy_helper.from_array(quiet.head.cls_score.bias.detach().numpy(), bias.name)
    )
    images = [random_images(2, (64, 64))]
    check = write_checked(silenced, tmp_path / "a.onnx", quiet, images)
    assert check.agreement.matched == 0
    quiet.head.box_delta.bias.data += 0.02
    with pytest.raises(ValueError, match="differs from torch"):
        write_checked(silenced, tmp_path / "b.onnx", quiet, images)


def test_size_must_be_a_multiple_of_32(folded):
    with pytest.raises(ValueError, match="multiples of 32"):
        export_detector(folded, Data(), (64, 100))
