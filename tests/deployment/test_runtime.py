"""A detector from an ONNX file and from the checkpoint it was made of: the same detections."""

import json

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tinydet.config import Data  # noqa: E402
from tinydet.data.transforms import network_size  # noqa: E402
from tinydet.deployment.agreement import compare_detections  # noqa: E402
from tinydet.deployment.images import random_images  # noqa: E402
from tinydet.deployment.onnx import export_checkpoint, export_detector  # noqa: E402
from tinydet.deployment.reparameterize import fold_detector  # noqa: E402
from tinydet.deployment.runtime import Detector, OnnxNetwork  # noqa: E402
from tinydet.training.checkpoint import CheckpointError  # noqa: E402

# Larger and smaller than the network's input, upright and lying, one and three a batch.
SIZES = [[(200, 150)], [(70, 90), (90, 70), (64, 128)]]
_RULE = ("image_size", "keep_ratio", "short_side")
RULES = {
    "longer side": {"image_size": 128},
    "short side": {"image_size": 128, "short_side": 64},
    "square": {"image_size": 96, "keep_ratio": False},
}


@pytest.fixture(scope="module")
def exported(make_detector):
    """The bytes of a file for any size."""
    return export_detector(fold_detector(make_detector())[0], Data())


@pytest.fixture(params=RULES)
def files(request, exported, make_detector, make_checkpoint, tmp_path):
    """A checkpoint, its ONNX file in a folder of its own, and how images are resized."""
    data = Data(root=str(tmp_path / "none"), source="folder", **RULES[request.param])
    checkpoint = make_checkpoint(make_detector(), data)
    # Exporting takes seconds: what differs by the rule is the metadata.
    props = {prop.key: prop.value for prop in exported.metadata_props}
    rule = {name: json.dumps(getattr(data, name)) for name in _RULE}
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    onnx.helper.set_model_props(model, {**props, **rule})
    (tmp_path / "alone").mkdir()
    onnx.save(model, tmp_path / "alone" / "net.onnx")
    return checkpoint, tmp_path / "alone" / "net.onnx", data


@pytest.mark.parametrize("sizes", SIZES, ids=["one", "three"])
def test_the_file_alone_finds_what_the_checkpoint_finds(files, sizes):
    checkpoint, file, data = files
    images = [random_images(1, size, seed=i)[0] for i, size in enumerate(sizes)]
    first, second = Detector.load(checkpoint), Detector.load(file)
    assert second.classes == first.classes
    assert all(getattr(second.data, name) == getattr(data, name) for name in _RULE)
    for a, b, (height, width) in zip(first(images), second(images), sizes, strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(b.boxes, a.boxes, rtol=0, atol=0.01 * max(sizes[0]) / 64)
        assert torch.equal(a.labels, b.labels)
        assert a.boxes.min() >= 0
        assert (a.boxes.amax(0) <= torch.tensor([width, height] * 2)).all()


def test_a_file_without_the_sizes_of_images_clips_in_the_end(exported):
    older = onnx.ModelProto()
    older.CopyFrom(exported)
    del older.graph.input[1]
    images, sizes = random_images(2, (96, 128)), [(60, 128), (96, 70)]
    for found, size in zip(OnnxNetwork(older).detect(images, sizes), sizes, strict=True):
        assert len(found.scores) > 3
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
        assert (found.boxes <= torch.tensor([*size[::-1]] * 2)).all()


@pytest.mark.parametrize("sizes", [None, [(60, 128), (96, 70)]])
def test_a_box_in_the_padding_takes_no_place(exported, make_detector, sizes):
    images = random_images(2, (96, 128))
    detector = fold_detector(make_detector())[0]
    found, expected = (d.detect(images, sizes) for d in (OnnxNetwork(exported), detector))
    agreement = compare_detections(expected, found, detector.config)
    assert agreement.unmatched == 0
    assert agreement.matched > 80  # Without padding, 50 an image: all it may find.


def test_boxes_are_in_pixels_of_the_image(files):
    checkpoint, file, data = files
    size = (128, 128)
    height, width = network_size(size, data.image_size, data.keep_ratio, data.short_side)
    image = random_images(1, size)[0]
    for path in (checkpoint, file):
        detector = Detector.load(path)
        (found,) = detector([image])
        small = (
            torch.nn.functional.interpolate(
                image[None].float(), (height, width), mode="bilinear", antialias=True
            )
            .round()
            .to(torch.uint8)
        )
        (raw,) = detector.network.detect(small, [(height, width)])
        factor = torch.tensor([width / 128, height / 128] * 2)
        torch.testing.assert_close(found.boxes * factor, raw.boxes, rtol=0, atol=0.05)


def test_a_score_threshold_drops_the_lower_ones(files):
    image = random_images(1, (128, 96))[0]
    for path in files[:2]:
        (every,) = Detector.load(path)([image])
        middle = float(every.scores.median())
        (some,) = Detector.load(path, score_threshold=middle)([image])
        kept = every.scores > middle
        assert 0 < kept.sum() < len(kept)
        torch.testing.assert_close(some.boxes, every.boxes[kept])


def test_a_fixed_size_pads_what_is_smaller_and_refuses_what_is_larger(
    exported, make_checkpoint, make_detector, tmp_path
):
    data = Data(root="none", source="folder", image_size=128)
    checkpoint = make_checkpoint(make_detector(), data)
    export_checkpoint(checkpoint, tmp_path / "fixed.onnx", (96, 128))
    onnx.save(exported, tmp_path / "any.onnx")
    fixed, free = OnnxNetwork(tmp_path / "fixed.onnx"), OnnxNetwork(tmp_path / "any.onnx")
    assert (fixed.size, free.size) == ((96, 128), None)
    images = random_images(2, (64, 96))
    padded = torch.full((2, 3, 96, 128), 114, dtype=torch.uint8)
    padded[:, :, :64, :96] = images
    for a, b in zip(fixed.detect(images), free.detect(padded, [(64, 96)] * 2), strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="128x96 for a file of 96x128: export"):
        fixed.detect(random_images(1, (128, 96)))


def test_mistakes_are_told_in_one_line(files, tmp_path):
    file = files[1]
    (tmp_path / "text.onnx").write_text("no model")
    other = onnx.load(file)
    kept = [prop for prop in other.metadata_props if prop.key != "image_size"]
    del other.metadata_props[:]
    other.metadata_props.extend(kept)
    onnx.save(other, tmp_path / "other.onnx")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    for load, words in [
        (lambda: Detector.load(tmp_path / "none.onnx"), r"none\.onnx: no such file"),
        (lambda: Detector.load(tmp_path / "text.onnx"), r"text\.onnx: ONNX Runtime refuses it"),
        (lambda: Detector.load(tmp_path / "other.onnx"), "has no 'image_size'"),
        (lambda: Detector.load(file, score_threshold=0.01), r"exported with 0\.05"),
        (lambda: Detector.from_onnx(file, device="meta"), "device meta: this ONNX Runtime has"),
        (lambda: Detector.load(file)([image[:1]]), r"must be uint8 \(3, H, W\)"),
        (lambda: Detector.load(file)([image.float()]), r"must be uint8 \(3, H, W\)"),
    ]:
        with pytest.raises(ValueError, match=words) as told:
            load()
        assert "\n" not in str(told.value)
    with pytest.raises(CheckpointError):
        Detector.load(tmp_path / "none.pt")
