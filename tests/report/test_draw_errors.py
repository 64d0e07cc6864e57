import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinydet.report.draw_errors import (
    DETECTION_COLOR,
    TRUTH_COLOR,
    draw_errors,
    encode_jpeg,
    resize_between,
    side_by_side,
)

GREY = torch.full((3, 300, 400), 128, dtype=torch.uint8)
BOX = np.array([[100.0, 100.0, 200.0, 180.0]])
NONE, YES, NO = np.zeros((0, 4)), np.array([True]), np.array([False])
EMPTY = np.zeros(0, bool)


def _count(image, color):
    return int((image == torch.tensor(color, dtype=torch.uint8)[:, None, None]).all(0).sum())


def _truth(missed, names=("a",)):
    return draw_errors(GREY, BOX, names, missed, NONE, [], EMPTY)


def _found(wrong, names=("a",)):
    return draw_errors(GREY, NONE, [], EMPTY, BOX, names, wrong)


def test_truth_and_detections_differ_in_colour_and_in_pattern():
    truth, found = _truth(NO), _found(NO)
    assert _count(truth, DETECTION_COLOR) == _count(found, TRUTH_COLOR) == 0
    side = found[:, 100, 100:200]  # the box's upper side
    assert (side == torch.tensor(DETECTION_COLOR, dtype=torch.uint8)[:, None]).all()
    dashed = (truth[:, 100, 100:200] == torch.tensor(TRUTH_COLOR, dtype=torch.uint8)[:, None]).all(
        0
    )
    assert 0.3 < dashed.float().mean() < 0.8
    assert dashed[0]
    assert dashed[-1]


@pytest.mark.usefixtures("cat_font")
def test_letters_beyond_ascii_are_no_empty_boxes():
    drawings = [
        [_truth(YES, [name]) for name in ("é", "Ж", "猫", "Ω")],
        [side_by_side([GREY], [caption], "") for caption in ("é", "Ж", "猫", "Ω")],
        [side_by_side([GREY], [""], below) for below in ("é", "Ж", "猫", "Ω")],
    ]
    for e, zh, cat, omega in drawings:
        assert (e != zh).any()
        assert (cat == omega).all()  # as the font has it


@pytest.mark.usefixtures("no_system_fonts")
def test_a_letter_that_no_font_has_is_a_question_mark():
    assert (side_by_side([GREY], ["猫 é"], "") == side_by_side([GREY], ["? é"], "")).all()


def test_mistakes_are_thicker_and_named():
    assert _count(_truth(YES), TRUTH_COLOR) > 1.7 * _count(_truth(NO), TRUTH_COLOR)
    assert _count(_found(YES), DETECTION_COLOR) > 1.7 * _count(_found(NO), DETECTION_COLOR)
    longer = _found(YES, ["a much longer name"])
    assert _count(longer, DETECTION_COLOR) > _count(_found(YES), DETECTION_COLOR)
    assert torch.equal(_found(NO, ["another name"]), _found(NO))


@settings(max_examples=50, deadline=None)
@given(
    name=st.text(max_size=40) | st.just("x" * 10_000),
    box=st.lists(st.floats(-500, 900), min_size=4, max_size=4),
)
def test_any_name_and_any_box_can_be_drawn(name, box):
    x1, y1, x2, y2 = box
    boxes = np.array([[min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]])
    out = draw_errors(GREY, boxes, [name], YES, boxes, [name], YES)
    assert out.shape == GREY.shape
    assert out.dtype == torch.uint8


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(50, 100, (200, 400)), (300, 500, (300, 500)), (900, 300, (600, 200))],
)
def test_sizes_are_kept_within_bounds(height, width, expected):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    resized, factor = resize_between(image, 400, 600)
    assert tuple(resized.shape[1:]) == expected
    assert factor == pytest.approx(expected[0] / height)


@settings(max_examples=20, deadline=None)
@given(captions=st.lists(st.text(max_size=300), min_size=1, max_size=3))
def test_pictures_stand_side_by_side_under_any_captions(captions):
    pictures = [torch.full((3, 90, 120), 50 + 60 * i, dtype=torch.uint8) for i in range(3)]
    out = side_by_side(pictures[: len(captions)], captions, captions[0])
    assert out.dtype == torch.uint8
    above = (out.shape[1] - 90) // 2
    step = (out.shape[2] - 120) // max(1, len(captions) - 1) if len(captions) > 1 else 0
    for i in range(len(captions)):
        panel = out[:, above : above + 90, i * step : i * step + 120]
        assert (panel == 50 + 60 * i).all()
    assert (out[:, :above, -2:] == 255).all()  # no caption runs out of its place


def test_a_jpeg_is_the_image():
    image = Image.open(io.BytesIO(encode_jpeg(GREY)))
    assert image.format == "JPEG"
    assert image.size == (400, 300)
    assert abs(np.asarray(image).astype(int) - 128).max() <= 2
