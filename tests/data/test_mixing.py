"""Mosaics of four images with a rectangle of its own colour each, and mixup."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.config import Augment, Data
from tinydet.data.mixing import Tile, draw_tiles, mixup, mosaic
from tinydet.data.sample import Sample
from tinydet.data.transforms import network_size, train_transform

OFF = Augment(hflip=0.0, shift=0.0)
MOSAIC = dataclasses.replace(OFF, mosaic=1.0)
AUGMENTS = {
    "mosaic": MOSAIC,
    "flips": dataclasses.replace(MOSAIC, hflip=0.5, vflip=0.5),
    "scale": dataclasses.replace(MOSAIC, scale=(0.5, 2.0)),
    "zoom": dataclasses.replace(MOSAIC, zoom=(0.6, 1.5), translate=0.2),
}
COLORS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]])


def painted(number, width, height, box):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[:, y1:y2, x1:x2] = COLORS[number].byte()[:, None, None]
    return Sample(
        image=image,
        boxes=torch.tensor([box], dtype=torch.float32),
        labels=torch.tensor([number]),
        difficult=torch.tensor([number % 2 == 1]),
        image_id=f"image {number}",
        size=(height, width),
        unreadable=(f"lost {number}",),
    )


def found(image, number):
    """Return where the colour of a number's rectangle is, (H, W) bool."""
    wanted = COLORS[number][:, None, None] > 0
    return ((image > 125) == wanted).all(0) & ((image < 90) == ~wanted).all(0)


def bounds(mask):
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)


@st.composite
def four_pictures(draw):
    samples = []
    for number in range(4):
        width, height = draw(st.integers(60, 220)), draw(st.integers(60, 220))
        x1, y1 = draw(st.integers(0, width - 30)), draw(st.integers(0, height - 30))
        x2, y2 = draw(st.integers(x1 + 30, width)), draw(st.integers(y1 + 30, height))
        samples.append(painted(number, width, height, (x1, y1, x2, y2)))
    return samples


@pytest.mark.parametrize("name", AUGMENTS)
@settings(max_examples=25, deadline=None)
@given(samples=four_pictures(), seed=st.integers(0, 2**32), keep_ratio=st.booleans())
def test_mosaic__boxes_bound_the_painted_pixels(name, samples, seed, keep_ratio):
    transform = train_transform(Data(image_size=160, keep_ratio=keep_ratio, augment=AUGMENTS[name]))
    others = iter(samples[1:])
    out = transform(samples[0], torch.Generator().manual_seed(seed), another=lambda: next(others))
    assert next(others, None) is None  # all three were taken
    assert tuple(out.image.shape[1:]) == network_size(samples[0].size, 160, keep_ratio)
    assert (out.image_id, out.size) == ("image 0", samples[0].size)
    assert out.unreadable == tuple(f"lost {i}" for i in range(4))
    assert len(out.boxes) == len(out.labels) == len(out.difficult)
    assert len(set(out.labels.tolist())) == len(out.labels)
    at = {int(label): i for i, label in enumerate(out.labels)}
    for number in range(4):
        seen = found(out.image, number)
        if number not in at:
            factor = max(network_size(samples[number].size, 160, keep_ratio)) / min(
                samples[number].size
            )
            full = (samples[number].boxes[:, 2:] - samples[number].boxes[:, :2]).prod()
            least = AUGMENTS[name].min_visible
            assert seen.sum() <= least * full * (2 * 1.5 * factor) ** 2 + 400
            continue
        assert bool(out.difficult[at[number]]) == (number % 2 == 1)
        if seen.any():
            box = out.boxes[at[number]]
            torch.testing.assert_close(box, bounds(seen), atol=2.0, rtol=0)


def test_mosaic__shows_most_objects_of_four_images():
    samples = [painted(i, 100, 100, (35, 35, 65, 65)) for i in range(4)]
    counts, areas = [], []
    for seed in range(200):
        others = iter(samples[1:])
        out = train_transform(Data(image_size=128, augment=MOSAIC))(
            samples[0], torch.Generator().manual_seed(seed), another=lambda it=others: next(it)
        )
        counts.append(len(out.boxes))
        areas += (out.boxes[:, 2:] - out.boxes[:, :2]).amax(1).tolist()
    assert sum(counts) / len(counts) > 2.5
    full = 30 * 1.28
    assert max(areas) <= full + 1  # never enlarged; and shrunk to a half at most, where not cut
    assert min(counts) < 4  # some are cut away
    assert 0.5 * full < sum(areas) / len(areas) < full


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_draw_tiles__cover_the_canvas_exactly_once(height, width, seed):
    tiles = draw_tiles(height, width, torch.Generator().manual_seed(seed))
    covered = torch.zeros(height, width, dtype=torch.int64)
    for top, left, tall, wide in tiles:
        covered[top : top + tall, left : left + wide] += 1
        if min(height, width) >= 2:
            assert min(tall, wide) >= 1
    assert (covered == 1).all()


def test_mosaic__pixels_and_boxes_move_with_their_tile():
    samples = [painted(i, 8, 6, (1, 2, 5, 4)) for i in range(4)]
    tiles = [Tile(0, 0, 6, 8), Tile(0, 8, 6, 8), Tile(6, 0, 6, 8), Tile(6, 8, 6, 8)]
    out = mosaic(samples, tiles)
    assert out.image.shape == (3, 12, 16)
    for sample, (top, left, _, _) in zip(samples, tiles, strict=True):
        assert torch.equal(out.image[:, top : top + 6, left : left + 8], sample.image)
    assert out.boxes.tolist() == [[1, 2, 5, 4], [9, 2, 13, 4], [1, 8, 5, 10], [9, 8, 13, 10]]
    assert out.labels.tolist() == [0, 1, 2, 3]
    assert out.difficult.tolist() == [False, True, False, True]


def test_mosaic__needs_others_and_off_takes_none():
    sample = painted(0, 60, 60, (5, 5, 40, 40))
    alone = train_transform(Data(image_size=64, augment=MOSAIC))(
        sample, torch.Generator().manual_seed(0)
    )
    plain = train_transform(Data(image_size=64, augment=OFF))(
        sample,
        torch.Generator().manual_seed(0),
        another=lambda: pytest.fail("a sample was read in vain"),
    )
    assert torch.equal(alone.image, plain.image)
    assert torch.equal(alone.boxes, plain.boxes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(900, 2), (2, 900)])
def test_mosaic__not_on_a_canvas_of_one_line(size):
    transform = train_transform(
        Data(image_size=64, augment=dataclasses.replace(MOSAIC, color_jitter=0.4))
    )
    sample = painted(0, *size, (0, 0, *size))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        image = transform(sample, generator, None, lambda: sample).image
        assert sorted(image.shape) == [1, 3, 64]


def blank(name, image, boxes, labels, size=None):
    return Sample(
        image=image,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        difficult=torch.tensor([label % 2 == 1 for label in labels], dtype=torch.bool),
        image_id=name,
        size=size or tuple(image.shape[1:]),
        unreadable=(f"lost {name}",),
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mixup__is_one_blend_for_all_pixels_and_all_boxes(seed):
    random = torch.Generator().manual_seed(seed)
    one, two = (
        torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8, generator=random) for _ in range(2)
    )
    first = blank("a", one, [[0, 0, 3, 3], [1, 1, 4, 4]], [2, 3])
    second = blank("b", two, [[2, 2, 7, 9]], [5])
    out = mixup(first, second, random)
    # Each pixel, known to a half, bounds the weight from both sides; some weight meets all bounds.
    a, b, c = one.double(), two.double(), out.image.double()
    differ = a != b
    half = 0.5 + 1e-4  # and what float32 makes of it
    bounds = torch.stack([c - half - b, c + half - b])[:, differ] / (a - b)[differ]
    low, high = bounds.amin(0).max(), bounds.amax(0).min()
    assert 0.39 < low <= high < 0.61
    assert torch.equal(c[~differ], a[~differ])
    assert out.boxes.tolist() == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2, 7, 9]]
    assert out.labels.tolist() == [2, 3, 5]
    assert out.difficult.tolist() == [False, True, True]
    assert (out.image_id, out.size, out.scale) == ("a", (9, 7), (1.0, 1.0))
    assert out.unreadable == ("lost a", "lost b")
    assert torch.equal(first.image, one)
    assert torch.equal(second.image, two)


def test_mixup__weights_vary():
    white = blank("w", torch.full((3, 2, 2), 255, dtype=torch.uint8), [], [])
    black = blank("b", torch.zeros(3, 2, 2, dtype=torch.uint8), [], [])
    values = {
        int(mixup(white, black, torch.Generator().manual_seed(s)).image[0, 0, 0])
        for s in range(300)
    }
    assert min(values) in range(102, 105)
    assert max(values) in range(150, 154)


def test_train_transform__a_wide_image_mixed_with_an_upright_one_keeps_its_shape():
    augment = Augment(hflip=0.0, shift=0.0, mixup=1.0)
    wide = torch.zeros(3, 60, 120, dtype=torch.uint8)
    wide[0, 10:50, 20:60] = 240
    upright = torch.zeros(3, 120, 60, dtype=torch.uint8)
    upright[1, 40:80, 10:50] = 240
    first = blank("wide", wide, [[20, 10, 60, 50]], [0])
    second = blank("upright", upright, [[10, 40, 50, 80]], [1])
    kept = 0
    for seed in range(30):
        out = train_transform(Data(image_size=120, augment=augment))(
            first, torch.Generator().manual_seed(seed), another=lambda: second
        )
        assert tuple(out.image.shape[1:]) == network_size((60, 120), 120, True)
        for box, label in zip(out.boxes.int().tolist(), out.labels.tolist(), strict=True):
            x1, y1, x2, y2 = box
            area = out.image[label, y1:y2, x1:x2]
            assert (area >= 0.39 * 240).all()
            assert 0 in out.labels.tolist()
            kept += label
    assert kept > 5


def test_train_transform__mixup_off_draws_nothing_more():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    data = Data(image_size=32, augment=dataclasses.replace(Augment(), mixup=0.0))
    generator = torch.Generator().manual_seed(3)
    train_transform(data)(blank("a", image, [], []), generator, another=lambda: 1 / 0)
    alone = torch.Generator().manual_seed(3)
    train_transform(data)(blank("a", image, [], []), alone)
    assert torch.equal(generator.get_state(), alone.get_state())
