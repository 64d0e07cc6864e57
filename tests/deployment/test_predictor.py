"""A predictor finds the same from an ONNX file and from the checkpoint it was exported from."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tinydet.config import Data  # noqa: E402
from tinydet.data.transforms import network_size  # noqa: E402
from tinydet.deployment.images import random_images  # noqa: E402
from tinydet.deployment.predictor import Predictor  # noqa: E402
from tinydet.training.checkpoint import CheckpointError  # noqa: E402

# Larger and smaller than the network's input, upright and lying, one and three a batch.
SIZES = [[(200, 150)], [(70, 90), (90, 70), (64, 128)]]
_RULE = ("image_size", "keep_ratio", "short_side")
RULES = {
    "longer side": {"image_size": 128},
    "short side": {"image_size": 128, "short_side": 64},
    "square": {"image_size": 96, "keep_ratio": False},
}


@pytest.fixture(params=RULES)
def files(request, exported, detector, make_checkpoint, tmp_path):
    """A checkpoint, its ONNX file in a folder of its own, and how images are resized."""
    data = Data(root=str(tmp_path / "none"), source="folder", **RULES[request.param])
    checkpoint = make_checkpoint(detector, data)
    # Exporting takes seconds, and the rules only differ in the metadata.
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
    first, second = Predictor(checkpoint), Predictor(file)
    assert second.classes == first.classes
    assert all(getattr(second.data, name) == getattr(data, name) for name in _RULE)
    for a, b, (height, width) in zip(first(images), second(images), sizes, strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(b.boxes, a.boxes, rtol=0, atol=0.01 * max(sizes[0]) / 64)
        assert torch.equal(a.labels, b.labels)
        assert a.boxes.min() >= 0
        assert (a.boxes.amax(0) <= torch.tensor([width, height] * 2)).all()


def test_boxes_are_in_pixels_of_the_image(files):
    checkpoint, file, data = files
    size = (128, 128)
    height, width = network_size(size, data.image_size, data.keep_ratio, data.short_side)
    image = random_images(1, size)[0]
    for path in (checkpoint, file):
        predictor = Predictor(path)
        (found,) = predictor([image])
        small = (
            torch.nn.functional.interpolate(
                image[None].float(), (height, width), mode="bilinear", antialias=True
            )
            .round()
            .to(torch.uint8)
        )
        (raw,) = predictor.model.detect(small, [(height, width)])
        factor = torch.tensor([width / 128, height / 128] * 2)
        torch.testing.assert_close(found.boxes * factor, raw.boxes, rtol=0, atol=0.05)


def test_a_score_threshold_drops_the_lower_ones(files):
    image = random_images(1, (128, 96))[0]
    for path in files[:2]:
        (every,) = Predictor(path)([image])
        middle = float(every.scores.median())
        (some,) = Predictor(path, score_threshold=middle)([image])
        kept = every.scores > middle
        assert 0 < kept.sum() < len(kept)
        torch.testing.assert_close(some.boxes, every.boxes[kept])


def test_mistakes_are_one_line(files, tmp_path):
    file = files[1]
    (tmp_path / "text.onnx").write_text("no model")
    other = onnx.load(file)
    kept = [prop for prop in other.metadata_props if prop.key != "image_size"]
    del other.metadata_props[:]
    other.metadata_props.extend(kept)
    onnx.save(other, tmp_path / "other.onnx")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    for load, words in [
        (lambda: Predictor(tmp_path / "none.onnx"), r"none\.onnx: no such file"),
        (lambda: Predictor(tmp_path / "text.onnx"), r"text\.onnx: ONNX Runtime rejects it"),
        (lambda: Predictor(tmp_path / "other.onnx"), "has no 'image_size'"),
        (lambda: Predictor(file, score_threshold=0.01), r"exported with 0\.05"),
        (lambda: Predictor(file, score_threshold=30), r"score threshold 30: must be from 0 to 1"),
        (lambda: Predictor(file, score_threshold=float("nan")), r"must be from 0 to 1"),
        (lambda: Predictor(file, device="meta"), "device meta: this ONNX Runtime only has"),
        (lambda: Predictor(file)([image[:1]]), r"must be uint8 \(3, H, W\)"),
        (lambda: Predictor(file)(image[:, :0]), "not empty"),
        (lambda: Predictor(file)([image], batch_size=0), "batch_size is 0; it must be at least 1"),
        (lambda: Predictor(file)(3), "an image is a path, .* not of type int"),
        (lambda: Predictor(file)([None]), "an image is a path, .* not of type NoneType"),
        (lambda: Predictor(file)([image.float()]), r"must be uint8 \(3, H, W\)"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            load()
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError):
        Predictor(tmp_path / "none.pt")


def test_a_checkpoint_is_read_once_also_with_overrides(
    make_checkpoint, detector, tmp_path, monkeypatch
):
    checkpoint = make_checkpoint(detector)
    read, torch_load = [], torch.load

    def load(path, **options):
        read.append(path)
        return torch_load(path, **options)

    monkeypatch.setattr(torch, "load", load)
    overrides = ["model.max_detections=3", "data.image_size=96"]
    predictor = Predictor(checkpoint, score_threshold=0.1, overrides=overrides)
    assert read == [checkpoint]
    assert predictor.data.image_size == 96
    (found,) = predictor([random_images(1, (96, 96))[0]])
    assert len(found.scores) == 3
    assert found.scores.min() > 0.1
    with pytest.raises(ValueError, match="--set changes an experiment"):
        Predictor(tmp_path / "net.onnx", overrides=overrides)


@pytest.fixture
def photo(tmp_path):
    """A picture of noise, upright only by its EXIF orientation, and as it is viewed."""
    pixels = random_images(1, (90, 70))[0].permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / "a.png"
    Image.fromarray(pixels).save(path, exif=exif)
    return path, np.rot90(pixels, -1)


def test_images_of_every_kind_give_the_same(files, photo):
    path, viewed = photo
    with Image.open(path) as opened:
        opened.load()
    tensor = torch.from_numpy(viewed.copy()).permute(2, 0, 1)
    bgr = np.ascontiguousarray(viewed[..., ::-1])
    predictor = Predictor(files[0])
    expected = predictor(path)
    assert len(expected) > 3
    assert expected.file == "a.png"
    assert np.array_equal(expected.image.permute(1, 2, 0).numpy(), viewed)
    for image in (str(path), opened, viewed, bgr[..., ::-1], tensor):
        found = predictor(image)
        assert torch.equal(found.boxes, expected.boxes)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.image, expected.image)


def test_one_gives_one_a_list_a_list_and_a_generator_reads_as_it_goes(files, photo):
    path, viewed = photo
    predictor = Predictor(files[0])
    one = predictor(path)
    for images in ([path, viewed], (path, viewed), np.stack([viewed, viewed])):
        found = predictor(images)
        assert isinstance(found, list)
        assert len(found) == 2
        for each in found:
            torch.testing.assert_close(each.boxes, one.boxes, rtol=1e-4, atol=0.01)
    assert predictor([]) == []
    for folder in (path.parent, f"{path.parent}/*.png"):
        (found,) = predictor(folder)
        assert torch.equal(found.boxes, one.boxes)
    read = []

    def photos():
        for i in range(5):
            read.append(i)
            yield path

    stream = predictor(photos(), batch_size=2)
    assert read == []
    next(stream)
    assert read == [0, 1]
    assert len(list(stream)) == 4


@pytest.mark.parametrize("batch_size", [2, 8])
def test_an_image_in_a_list_is_found_what_it_is_found_alone(files, batch_size):
    # Lying, upright and square ones, in turns: each would be padded to the others' shape.
    sizes = [(70, 128), (128, 70), (70, 128), (128, 128), (128, 70)]
    images = [random_images(1, size, seed=i)[0] for i, size in enumerate(sizes)]
    for path in files[:2]:
        predictor = Predictor(path)
        for alone, found, image in zip(
            map(predictor, images), predictor(images, batch_size), images, strict=True
        ):
            assert len(alone) > 3
            assert torch.equal(found.image, image)
            assert torch.equal(found.labels, alone.labels)
            torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.boxes, alone.boxes, rtol=1e-4, atol=0.01)


def test_grey_arrays_are_pictures_and_others_are_refused(files, tmp_path):
    predictor = Predictor(files[0])
    grey = np.random.default_rng(0).integers(0, 256, (64, 80), dtype=np.uint8)
    colours = np.stack([grey] * 3, axis=-1)
    assert torch.equal(predictor(grey).boxes, predictor(colours).boxes)
    for image, words in [
        (grey / 255, r"must be uint8 \(H, W, 3\) or \(H, W\), not float64"),
        (np.dstack([colours, grey]), r"not uint8 \(64, 80, 4\)"),
        (Image.fromarray(grey.astype(np.uint16)), "has more than 8 bits"),
        (tmp_path / "none.jpg", r"none\.jpg"),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            predictor(image)
