"""Boxes have to follow the pixels of painted rectangles through a random affine transform."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.config import Augment
from tinydet.data.canvas import PAD_VALUE, random_affine
from tinydet.data.sample import Sample

OFF = Augment()
AFFINES = {
    "rotate": dataclasses.replace(OFF, rotate=40.0),
    "shear": dataclasses.replace(OFF, shear=20.0),
    "translate": dataclasses.replace(OFF, translate=0.3),
    "zoom": dataclasses.replace(OFF, zoom=(0.6, 1.6)),
    "all": dataclasses.replace(OFF, rotate=25.0, shear=10.0, translate=0.2, zoom=(0.7, 1.4)),
}


def painted(width, height, box):
    """Return a sample of black ground with a red rectangle; blue is 0 where there is image."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    x1, y1, x2, y2 = box
    image[0, y1:y2, x1:x2] = 250
    return Sample(
        image=image,
        boxes=torch.tensor([box], dtype=torch.float32),
        labels=torch.tensor([7]),
        difficult=torch.tensor([True]),
        image_id="a",
        size=(height, width),
        scale=(1.0, 1.0),
        unreadable=("b",),
    )


def bounds(mask):
    ys, xs = torch.nonzero(mask, as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=torch.float32)


@st.composite
def pictures(draw):
    width, height = draw(st.integers(60, 200)), draw(st.integers(60, 200))
    x1, y1 = draw(st.integers(0, width - 16)), draw(st.integers(0, height - 16))
    return painted(
        width,
        height,
        (x1, y1, draw(st.integers(x1 + 16, width)), draw(st.integers(y1 + 16, height))),
    )


@pytest.mark.parametrize("name", AFFINES)
@settings(max_examples=25, deadline=None)
@given(sample=pictures(), seed=st.integers(0, 2**32))
def test_random_affine__boxes_bound_the_painted_pixels(name, sample, seed):
    out = random_affine(sample, AFFINES[name], torch.Generator().manual_seed(seed))
    height, width = sample.size
    assert out.image.shape == sample.image.shape
    assert out.image.dtype == torch.uint8
    assert type(out.boxes) is torch.Tensor
    assert (out.image_id, out.size, out.unreadable) == ("a", sample.size, ("b",))
    seen = (out.image[0] > 160) & (out.image[2] < 60)
    if not len(out.boxes):
        # The box around the rotated corners is larger than what is painted, at most three times.
        factor = 1.6**2 * 3
        full = (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod() * factor
        assert seen.sum() <= AFFINES[name].min_visible * full + height + width
        assert len(out.labels) == len(out.difficult) == 0
        return
    assert (out.labels.tolist(), out.difficult.tolist()) == ([7], [True])
    edges = torch.tensor([width, height, width, height])
    assert (out.boxes >= 0).all()
    assert (out.boxes <= edges).all()
    if not seen.any():
        return
    found, box = bounds(seen), out.boxes[0]
    # All of it is in the box; and where nothing is cut off, the box is no larger.
    assert (found[:2] >= box[:2] - 1.5).all()
    assert (found[2:] <= box[2:] + 1.5).all()
    if name in ("translate", "zoom") or ((box > 0).all() and (box < edges).all()):
        torch.testing.assert_close(box, found, atol=2.0, rtol=0)


@pytest.mark.parametrize("least", [0.2, 0.6])
def test_random_affine__drops_what_is_mostly_cut_off(least):
    augment = dataclasses.replace(OFF, translate=0.5, min_visible=least)
    sample = painted(100, 100, (20, 20, 60, 60))
    kept, dropped = [], []
    for seed in range(200):
        out = random_affine(sample, augment, torch.Generator().manual_seed(seed))
        visible = int((out.image[0] > 160).sum()) / (40 * 40)
        (kept if len(out.boxes) else dropped).append(visible)
    assert least - 0.05 <= min(kept) <= least + 0.2
    assert least - 0.2 <= max(dropped) <= least + 0.05


def test_random_affine__rotates_about_the_centre():
    sample = painted(64, 64, (20, 20, 40, 30))
    rotated = [
        random_affine(
            sample, dataclasses.replace(OFF, rotate=90.0), torch.Generator().manual_seed(s)
        )
        for s in range(40)
    ]
    before = torch.tensor([30.0, 25.0]) - 32
    for out in rotated:
        after = (out.boxes[0, :2] + out.boxes[0, 2:]) / 2 - 32
        assert float(after.norm()) == pytest.approx(float(before.norm()), abs=1e-3)
    moves = [(out.boxes[0] - sample.boxes[0]).abs().max() for out in rotated]
    assert max(moves) > 10


def test_random_affine__comes_in_grey_and_blends_with_it_at_the_edge():
    sample = painted(80, 80, (0, 0, 80, 80))
    sample.image[:] = 200
    for seed in range(5):
        out = random_affine(sample, AFFINES["all"], torch.Generator().manual_seed(seed))
        assert out.image.min() >= PAD_VALUE
        assert out.image.max() <= 200
        assert (out.image == PAD_VALUE).any()


def test_random_affine__off_is_the_same_sample_and_draws_nothing():
    sample = painted(60, 60, (5, 5, 30, 30))
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    assert random_affine(sample, OFF, generator) is sample
    assert torch.equal(generator.get_state(), state)


def test_random_affine__no_boxes():
    sample = painted(60, 60, (5, 5, 30, 30))
    empty = dataclasses.replace(
        sample,
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        difficult=torch.zeros(0, dtype=torch.bool),
    )
    out = random_affine(empty, AFFINES["all"], torch.Generator().manual_seed(0))
    assert out.boxes.shape == (0, 4)
    assert out.labels.shape == out.difficult.shape == (0,)


def test_random_affine__angles_and_moves_reach_as_far_as_asked():
    sample = painted(100, 100, (40, 40, 60, 60))
    moves = []
    for seed in range(200):
        out = random_affine(sample, AFFINES["translate"], torch.Generator().manual_seed(seed))
        moves.append((out.boxes[0, :2] - 40).tolist())
    moves = torch.tensor(moves)
    assert moves.abs().max() <= 30
    assert (moves.amax(0) > 25).all()
    assert (moves.amin(0) < -25).all()
