"""Images at reduced scale and from memory are what they are without."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinydet.config import Augment, ConfigError, Data
from tinydet.data import sources
from tinydet.data.dataset import DetectionDataset
from tinydet.data.loader import make_train_loader
from tinydet.data.sources import TrainingImages, largest_reduction
from tinydet.data.transforms import network_size, train_transform
from tinydet.data.voc import read_index

DATA = Data(image_size=64, augment=Augment(hflip=0.5, shift=0.5))


def paint(tree, name, size, box, **save):
    """Write an image of `size` (width, height) with a white box (x1, y1, x2, y2) on black."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 255
    suffix = save.pop("suffix", ".jpg")
    path = tree.root / "JPEGImages" / f"{name}{suffix}"
    Image.fromarray(pixels).save(path, **save)
    tree.annotation(name, [("cat", (x1 + 1, y1 + 1, x2, y2))], size)


@pytest.fixture
def decodes(tmp_path, monkeypatch):
    """A list of what was decoded at which reduction, by this process and its children."""
    log = tmp_path / "decodes"
    log.touch()
    decode = sources.read_image

    def read_image(path, orientation, reduction):
        with log.open("a") as file:
            file.write(f"{path.stem} {reduction}\n")
        return decode(path, orientation, reduction)

    monkeypatch.setattr(sources, "read_image", read_image)

    def take():
        lines = log.read_text().splitlines()
        log.write_text("")
        return sorted(lines)

    return take


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
)
def test_largest_reduction__never_below_four_thirds_of_what_is_needed(size, needed):
    r = largest_reduction(size, needed)
    assert r in (1, 2, 4, 8)
    for n in (2, 4, 8):
        fits = all(3 * (size[axis] // n) >= 4 * needed[axis] for axis in (0, 1))
        assert fits == (n <= r)


@pytest.mark.parametrize("size", [(640, 480), (641, 483), (647, 470), (333, 501)])
def test_read__boxes_are_exact_at_reduced_scale(tree, size):
    # On whole blocks of 16 pixels, so that JPEG keeps the edges sharp.
    paint(tree, "a", size, (96, 160, 256, 320), quality=95, subsampling=0)
    dataset = DetectionDataset(read_index(tree.split("a"), "train"))
    sample = TrainingImages(dataset, lambda _: (100, 80), 0).read(0)
    reduction = largest_reduction(size[::-1], (100, 80))
    assert reduction in (2, 4)
    assert tuple(sample.image.shape[1:]) == tuple(-(-s // reduction) for s in size[::-1])
    assert sample.size == size[::-1]
    assert sample.scale == (1 / reduction, 1 / reduction)
    ys, xs = torch.nonzero(sample.image[0] > 127, as_tuple=True)
    seen = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
    assert sample.boxes.tolist() == [seen] == [[c / reduction for c in (96, 160, 256, 320)]]


@pytest.mark.parametrize("augment", [Augment(), Augment(scale=(0.5, 1.4), mosaic=0.5)])
def test_transform__after_reduced_decoding_boxes_and_pixels_agree(tree, augment):
    paint(tree, "a", (643, 485), (100, 150, 300, 330), quality=95)
    dataset = DetectionDataset(read_index(tree.split("a"), "train"))
    transform = train_transform(dataclasses.replace(DATA, image_size=160, augment=augment))
    images = TrainingImages(dataset, lambda size: transform.largest_size(size, 160), 0)
    whole = dataset.read(0)
    reduced = images.read(0)
    assert reduced.image.shape[-1] == 322
    for seed in range(20):
        one, two = (
            transform(s, torch.Generator().manual_seed(seed), another=lambda s=s: s)
            for s in (whole, reduced)
        )
        assert one.image.shape == two.image.shape
        torch.testing.assert_close(one.boxes, two.boxes, atol=0.6, rtol=0)
        assert (one.image.float() - two.image.float()).abs().mean() < 1.5
        assert one.labels.tolist() == two.labels.tolist()
        assert two.scale == pytest.approx(one.scale, rel=0.003)  # 243 rows stand for 242.5


def test_reductions__jpeg_alone_and_nothing_rotated(tree, decodes, caplog):
    box = (100, 100, 200, 200)
    paint(tree, "a", (400, 400), box)
    paint(tree, "b", (100, 100), (10, 10, 50, 50))
    paint(tree, "c", (400, 400), box, suffix=".png")
    # A file of another format than its name says.
    paint(tree, "d", (400, 400), box, suffix=".JPG", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(tree, "e", (400, 300), box, exif=exif)
    tree.annotation("e", [("cat", (1, 1, 50, 50))], (300, 400))
    dataset = DetectionDataset(read_index(tree.split(*"abcde"), "train"))
    with caplog.at_level(logging.INFO):
        images = TrainingImages(dataset, lambda size: network_size(size, 64, True), cache_mb=4)
    assert "2 of 5 training images are decoded at 1/4 of" in caplog.text
    for _ in range(2):
        samples = [images.read(i) for i in range(5)]
        assert [s.image.shape[-1] for s in samples] == [100, 100, 400, 400, 300]
        assert [s.scale[0] for s in samples] == [0.25, 1, 1, 1, 1]
        assert samples[3].boxes.tolist() == [[100, 100, 200, 200]]
    # The one that lies about its format has no place in the memory.
    assert decodes() == ["a 4", "b 1", "c 1", "d 4", "d 4", "e 1"]


@pytest.fixture
def dataset(tree):
    for i in range(6):
        paint(tree, f"{i}", (100 + 60 * i, 80 + 50 * i), (10, 10, 50, 60))
    return DetectionDataset(read_index(tree.split(*map(str, range(6))), "train"))


def batches(dataset, data, epochs=2):
    loader = make_train_loader(dataset, data, batch_size=2, seed=1)
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        yield list(loader)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_cache__same_batches_and_one_decode_an_image(dataset, decodes, workers):
    mosaic = dataclasses.replace(DATA.augment, mosaic=0.5)
    data = dataclasses.replace(DATA, workers=0, augment=mosaic)
    without = list(batches(dataset, data))
    decodes()
    cached = batches(dataset, dataclasses.replace(data, workers=workers, cache_mb=4))
    first = next(cached)
    seen = decodes()
    assert len({line.split()[0] for line in seen}) == 6
    if workers < 2:  # two processes may decode the same image at the same time
        assert len(seen) == 6
    second = next(cached)
    assert decodes() == []
    for expected, found in zip(without, (first, second), strict=True):
        for one, two in zip(expected, found, strict=True):
            assert one.image_ids == two.image_ids
            assert torch.equal(one.images, two.images)
            for a, b in zip(one.targets, two.targets, strict=True):
                assert torch.equal(a["boxes"], b["boxes"])


def test_cache__budget_decides_how_many_and_one_line_says_so(dataset, decodes, caplog):
    data = dataclasses.replace(DATA, image_size=256, cache_mb=1, workers=0)
    with caplog.at_level(logging.INFO):
        loader = make_train_loader(dataset, data, batch_size=6)
    fits, total = 0, 0
    for height, width in dataset.index.sizes:
        total += 3 * int(height) * int(width) + 1
        fits += total <= 2**20
    assert 0 < fits < 6
    lines = [r.getMessage() for r in caplog.records if "cache_mb" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"{fits} of 6 decoded training images fit into data.cache_mb=1")
    for epoch in range(2):
        loader.set_epoch(epoch)
        list(loader)
    assert len(decodes()) == fits + 2 * (6 - fits)


def test_cache__more_than_the_machines_memory_is_refused(dataset):
    with pytest.raises(ConfigError, match=r"data.cache_mb=\d+: this machine has \d+ MB"):
        TrainingImages(dataset, None, cache_mb=10**9)


def test_loader__decodes_whole_images_where_asked_or_for_an_own_transform(tree, decodes):
    paint(tree, "a", (400, 400), (100, 100, 200, 200))
    index = read_index(tree.split("a"), "train")
    data = dataclasses.replace(DATA, workers=0)
    list(make_train_loader(DetectionDataset(index), data, 1))
    assert decodes() == ["a 4"]
    list(
        make_train_loader(DetectionDataset(index), dataclasses.replace(data, reduced_jpeg=False), 1)
    )
    list(make_train_loader(DetectionDataset(index, lambda sample, _: sample), data, 1))
    assert decodes() == ["a 1", "a 1"]
    # Random scale and the batch's own size can ask for 64 * 1.5 * 1.5 pixels.
    large = dataclasses.replace(data.augment, scale=(0.5, 1.5), multiscale=(0.5, 1.5))
    list(make_train_loader(DetectionDataset(index), dataclasses.replace(data, augment=large), 1))
    assert decodes() == ["a 2"]
