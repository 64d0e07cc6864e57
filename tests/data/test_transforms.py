"""Boxes have to follow the pixels: a rectangle of its own colour is found after transforms."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinydet.config import Augment, Data
from tinydet.data.canvas import MIN_SIDE, PAD_VALUE
from tinydet.data.sample import Sample
from tinydet.data.transforms import (
    network_size,
    padded_size,
    test_transform,
    train_transform,
)

OFF = Augment(hflip=0.0, shift=0.0)
AUGMENTS = {
    "resize": OFF,
    "hflip": dataclasses.replace(OFF, hflip=1.0),
    "vflip": dataclasses.replace(OFF, vflip=1.0),
    "shrink": dataclasses.replace(OFF, scale=(0.4, 0.8)),
    "enlarge": dataclasses.replace(OFF, scale=(1.2, 2.0)),
    "shift": dataclasses.replace(OFF, shift=1.0),
    "all": Augment(hflip=0.5, vflip=0.5, scale=(0.5, 2.0), shift=0.5),
}


def painted(width, height, box, *more_boxes):
    """Return a sample of black ground with rectangles, numbered by their red value from 250 down.

    Blue is 0 where there is image, unlike the grey of padding.
    """
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = [box, *more_boxes]
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        image[0, y1:y2, x1:x2] = 250 - 40 * i
    return Sample(
        image=image,
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.arange(len(boxes)) + 5,
        difficult=torch.arange(len(boxes)) % 2 == 1,
        image_id="a",
        size=(height, width),
    )


def bounds(mask):
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)


@st.composite
def pictures(draw):
    width, height = draw(st.integers(40, 220)), draw(st.integers(40, 220))
    x1, y1 = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    x2, y2 = draw(st.integers(x1 + 12, width)), draw(st.integers(y1 + 12, height))
    return painted(width, height, (x1, y1, x2, y2))


@pytest.mark.parametrize("name", AUGMENTS)
@settings(max_examples=40, deadline=None)
@given(
    sample=pictures(),
    seed=st.integers(0, 2**32),
    keep_ratio=st.booleans(),
    image_size=st.sampled_from([96, 160]),
)
def test_train_transform__boxes_bound_the_painted_pixels(
    name, sample, seed, keep_ratio, image_size
):
    data = Data(image_size=image_size, keep_ratio=keep_ratio, augment=AUGMENTS[name])
    out = train_transform(data)(sample, torch.Generator().manual_seed(seed))
    height, width = out.image.shape[-2:]
    assert (height, width) == network_size(sample.size, image_size, keep_ratio)
    assert out.image.dtype == torch.uint8
    assert type(out.boxes) is torch.Tensor
    seen = (out.image[0] > 125) & (out.image[2] < PAD_VALUE // 2)
    if not len(out.boxes):
        # Only cutting loses boxes, and then only those of which little is left.
        assert name in ("enlarge", "shift", "all")
        factor = 2.0 * max(height / sample.size[0], width / sample.size[1])
        full = (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod() * factor**2
        assert seen.sum() <= data.augment.min_visible * full + height + width
        return
    assume(seen.any())
    assert (out.boxes >= 0).all()
    assert (out.boxes <= torch.tensor([width, height, width, height])).all()
    torch.testing.assert_close(out.boxes[0], bounds(seen), atol=1.5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_train_transform__labels_stay_with_their_boxes(seed):
    sample = painted(120, 90, (2, 3, 30, 40), (50, 10, 80, 30), (85, 60, 118, 88), (5, 60, 40, 85))
    data = Data(image_size=128, augment=AUGMENTS["all"])
    out = train_transform(data)(sample, torch.Generator().manual_seed(seed))
    assert len(out.boxes) == len(out.labels) == len(out.difficult)
    for box, label, difficult in zip(out.boxes, out.labels.tolist(), out.difficult, strict=True):
        x1, y1, x2, y2 = box.tolist()
        # The middle of the box has the colour of the object that has the label.
        red = out.image[0, int((y1 + y2) / 2), int((x1 + x2) / 2)]
        assert red == 250 - 40 * (label - 5)
        assert bool(difficult) == (label % 2 == 0)


@pytest.mark.parametrize("least", [0.2, 0.6])
def test_train_transform__drops_what_is_mostly_cut_off(least):
    # Enlarged twice, the canvas shows half of each axis; over many draws all cases occur.
    augment = dataclasses.replace(OFF, scale=(2.0, 2.0), min_visible=least)
    data = Data(image_size=100, augment=augment)
    sample = painted(100, 100, (40, 40, 60, 60))
    areas = []
    for seed in range(300):
        out = train_transform(data)(sample, torch.Generator().manual_seed(seed))
        visible = int((out.image[0] > 125).sum()) / (40 * 40)
        if len(out.boxes):
            width, height = (out.boxes[0, 2:] - out.boxes[0, :2]).tolist()
            assert visible >= least - 0.05
            assert min(width, height) >= MIN_SIDE
            areas.append(visible)
        else:
            assert visible <= least + 0.05
    assert len(areas) > 100
    assert min(areas) < least + 0.3


def test_train_transform__shift_reaches_as_far_as_asked_and_no_further():
    data = Data(image_size=100, augment=dataclasses.replace(OFF, shift=1.0, max_shift=7))
    sample = painted(100, 100, (40, 50, 60, 70))
    moves = {
        tuple(train_transform(data)(sample, torch.Generator().manual_seed(s)).boxes[0, :2])
        for s in range(400)
    }
    for axis, start in ((0, 40), (1, 50)):
        steps = sorted({int(move[axis]) - start for move in moves})
        assert steps == list(range(-7, 8))


def test_train_transform__padding_is_grey_and_not_recoloured():
    augment = dataclasses.replace(OFF, scale=(0.5, 0.5), color_jitter=0.5, hue=0.5)
    sample = painted(64, 64, (0, 0, 64, 64))
    out = train_transform(Data(image_size=64, augment=augment))(
        sample, torch.Generator().manual_seed(1)
    )
    x1, y1, x2, y2 = out.boxes[0].int().tolist()
    out.image[:, y1:y2, x1:x2] = PAD_VALUE
    assert (out.image == PAD_VALUE).all()


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    keep_ratio=st.booleans(),
)
def test_train_transform__any_shape_of_image(width, height, seed, keep_ratio):
    augment = Augment(0.4, 0.1, (0.1, 3.0), 0.5, 0.5, 1.0, 32, (0.5, 1.5))
    sample = painted(width, height, (0, 0, width, height))
    transform = train_transform(Data(image_size=64, keep_ratio=keep_ratio, augment=augment))
    out = transform(sample, torch.Generator().manual_seed(seed))
    assert tuple(out.image.shape[1:]) == network_size((height, width), 64, keep_ratio)


def test_train_transform__no_boxes():
    sample = painted(80, 60, (0, 0, 9, 9))
    empty = dataclasses.replace(
        sample,
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        difficult=torch.zeros(0, dtype=torch.bool),
    )
    augment = AUGMENTS["all"]
    for transform in (
        train_transform(Data(image_size=64, augment=augment)),
        test_transform(Data(image_size=64)),
    ):
        out = transform(empty, torch.Generator().manual_seed(0))
        assert out.boxes.shape == (0, 4)
        assert out.labels.shape == out.difficult.shape == (0,)


def test_train_transform__depends_on_the_generator_only():
    sample = painted(80, 60, (5, 5, 50, 50))
    transform = train_transform(Data(image_size=64, augment=Augment(0.4, 0.1, (0.5, 2.0))))
    outs = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        outs.append(transform(sample, torch.Generator().manual_seed(7)))
    assert torch.equal(outs[0].image, outs[1].image)
    assert torch.equal(outs[0].boxes, outs[1].boxes)
    other = transform(sample, torch.Generator().manual_seed(8))
    assert not torch.equal(outs[0].image, other.image)
    # And the sample that came in is as it was.
    assert torch.equal(sample.image, painted(80, 60, (5, 5, 50, 50)).image)
    assert sample.boxes.tolist() == [[5, 5, 50, 50]]


@pytest.mark.parametrize(
    ("keep_ratio", "size", "expected"),
    [
        (True, (375, 500), (312, 416)),
        (True, (500, 375), (416, 312)),
        (True, (10, 1000), (4, 416)),
        (False, (375, 500), (416, 416)),
    ],
)
def test_test_transform__size_and_scale(keep_ratio, size, expected):
    sample = painted(size[1], size[0], (0, 0, size[1], size[0]))
    out = test_transform(Data(image_size=416, keep_ratio=keep_ratio))(sample)
    assert tuple(out.image.shape[1:]) == expected
    assert out.scale == (expected[0] / size[0], expected[1] / size[1])
    assert out.size == size
    # The way back to original pixels.
    sy, sx = out.scale
    torch.testing.assert_close(out.boxes / torch.tensor([sx, sy, sx, sy]), sample.boxes)


def test_padded_size():
    assert padded_size((1, 32)) == (32, 32)
    assert padded_size((33, 416)) == (64, 416)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # detectron2's rule: 800, unless the longer side passes 1333
        ((640, 480), (1067, 800)),
        ((300, 640), (625, 1333)),
        ((500, 500), (800, 800)),
    ],
)
def test_shorter_side_is_bounded_where_asked(size, expected):
    data = Data(image_size=1333, short_side=800, augment=OFF)
    assert network_size(size, 1333, True, 800) == expected
    sample = painted(size[1], size[0], (8, 8, 80, 90))
    assert tuple(test_transform(data)(sample).image.shape[1:]) == expected
    train = train_transform(data)
    assert tuple(train(sample, torch.Generator()).image.shape[1:]) == expected
    # A batch's own size, half as long, halves both bounds.
    half = train(sample, torch.Generator(), 666).image.shape[1:]
    assert all(abs(2 * a - b) <= 2 for a, b in zip(half, expected, strict=True))
