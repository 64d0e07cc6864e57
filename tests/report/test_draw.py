import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinydet.report.draw import (
    DETECTION_COLOR,
    TRUTH_COLOR,
    class_color,
    draw_detections,
    draw_errors,
    encode_jpeg,
    grid,
    resize_between,
    save_image,
    side_by_side,
)

CLASSES = tuple(f"class{i}" for i in range(20))
GREY = torch.full((3, 300, 400), 128, dtype=torch.uint8)
BOX = np.array([[100.0, 100.0, 200.0, 180.0]])
NONE, YES, NO = np.zeros((0, 4)), np.array([True]), np.array([False])
EMPTY = np.zeros(0, bool)


def grey(height=200, width=300):
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def draw(image, boxes, labels, scores=None, classes=CLASSES):
    return draw_detections(image, torch.tensor(boxes, dtype=torch.float), labels, scores, classes)


def test_box_is_drawn_in_its_class_color_inside_its_pixels():
    image = grey()
    out = draw(image, [[50, 60, 120, 160]], [3])
    assert out.dtype == torch.uint8
    assert out.shape == image.shape
    color = torch.tensor(class_color(3), dtype=torch.uint8)
    for y, x in [(60, 80), (159, 80), (100, 50), (100, 119)]:  # each side's outermost pixel
        torch.testing.assert_close(out[:, y, x], color)
    for y, x in [(160, 80), (100, 49), (100, 120), (110, 85)]:  # just outside, and the middle
        torch.testing.assert_close(out[:, y, x], torch.full((3,), 100, dtype=torch.uint8))


def test_image_given_is_left_alone():
    image = grey()
    draw(image, [[50, 60, 120, 160]], [3])
    torch.testing.assert_close(image, grey())
    pil = Image.new("RGB", (300, 200))
    out = draw(pil, [[50, 60, 120, 160]], [3])
    assert not np.array(pil).any()
    assert out.shape == (3, 200, 300)


def test_nothing_to_draw_changes_nothing():
    torch.testing.assert_close(draw(grey(), [], []), grey())


def test_name_stands_above_its_box_and_never_outside_the_image():
    changed = (draw(grey(), [[50, 60, 120, 160]], [3]) != 100).any(0)  # (H, W)
    assert changed[:60, 50:].any()
    # At the top, left and right edges the text moves inside instead of being cut.
    text_area = (draw(grey(), [[50.0, 60, 51, 61]], [3]) != 100).any(0).sum()
    for box in ([0, 0, 1, 1], [299, 0, 300, 1], [299, 199, 300, 200], [-20, -20, -1, -1]):
        assert (draw(grey(), [box], [3]) != 100).any(0).sum() > 0.9 * text_area


def test_score_is_written_after_the_name():
    plain = draw(grey(), [[50, 60, 120, 160]], [3])
    scored = draw(grey(), [[50, 60, 120, 160]], [3], [0.875])
    assert (scored != 100).any(0)[:60].sum() > (plain != 100).any(0)[:60].sum()


@pytest.mark.usefixtures("no_system_fonts")
def test_letters_beyond_ascii_are_no_empty_boxes():
    # One missing glyph looks like another.
    letters = [draw(grey(), [[50, 60, 120, 160]], [0], classes=[c]) for c in "éЖωł"]
    for one, other in itertools.combinations(letters, 2):
        assert (one != other).any()


@pytest.mark.usefixtures("cat_font")
def test_a_name_is_drawn_in_the_system_font_that_has_it():
    cat, omega, e = (
        draw(grey(), [[50, 60, 120, 160]], [0], [0.5], [name]) for name in ("猫 1", "Ω 1", "é 1")
    )
    torch.testing.assert_close(cat, omega)  # as the font has it
    assert (cat != e).any()


@pytest.mark.usefixtures("no_system_fonts")
def test_a_name_that_no_font_has_is_a_number_and_said_once(caplog):
    classes = ["cat", "猫", "犬"]
    for _ in range(2):  # as for the frames of a video
        named = draw(grey(), [[50, 60, 120, 160]], [1], [0.5], classes)
    # The colour is the label's: another class of this label, named 1.
    torch.testing.assert_close(
        named, draw(grey(), [[50, 60, 120, 160]], [1], [0.5], ["cat", "1", "2"])
    )
    (line,) = caplog.messages
    assert "猫, 犬" in line


def test_control_characters_of_a_name_are_spaces():
    names = [draw(grey(), [[50, 60, 120, 160]], [0], classes=[c]) for c in ("a\nb\x00", "a b")]
    torch.testing.assert_close(*names)


def test_surest_box_is_on_top():
    box = [[50, 60, 120, 160]] * 2
    for scores, winner in (([0.9, 0.2], 0), ([0.2, 0.9], 1)):
        out = draw(grey(), box, [0, 1], scores)
        assert tuple(out[:, 159, 80].tolist()) == class_color(winner)


def test_letters_and_lines_grow_with_the_image():
    small = (draw(grey(), [[50, 60, 120, 160]], [3]) != 100).any(0)
    large = (draw(grey(2000, 3000), [[500, 600, 1200, 1600]], [3]) != 100).any(0)
    assert large.sum() > 25 * small.sum()


def test_colors_of_a_class_list_can_be_told_apart():
    colors = [np.array(class_color(i)) for i in range(20)]
    distances = [np.abs(a - b).sum() for a, b in itertools.combinations(colors, 2)]
    assert min(distances) > 40


def test_arrays_and_boxes_beyond_the_image_are_taken():
    boxes = np.array([[-50.0, -50, 900, 900], [20, 30, 10, 5]])  # too large; inside out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = draw_detections(grey(), boxes, np.array([0, 1]), np.array([0.5, 0.6]), CLASSES)
    assert out.shape == (3, 200, 300)


@pytest.mark.parametrize(
    ("image", "boxes", "labels", "scores", "message"),
    [
        (grey().float(), [], [], None, "must be uint8"),
        (grey()[:1], [], [], None, "must be uint8"),
        (grey(), [[0, 0, 1, 1]], [], None, "1 boxes, 0 labels"),
        (grey(), [[0, 0, 1, 1]], [0], [0.5, 0.6], "2 scores"),
        (grey(), [[0, 0, 1, 1]], [20], None, "20 classes"),
        (grey(), [[0, 0, 1, 1]], [-1], None, "20 classes"),
    ],
)
def test_what_does_not_fit_is_refused(image, boxes, labels, scores, message):
    with pytest.raises(ValueError, match=message):
        draw(image, boxes, labels, scores)


def test_saved_image_is_read_back(tmp_path):
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    save_image(image, tmp_path / "new" / "a.png")
    pixels = np.array(Image.open(tmp_path / "new" / "a.png"))
    torch.testing.assert_close(torch.from_numpy(pixels).permute(2, 0, 1), image)
    save_image(image, tmp_path / "b.JPG")
    assert Image.open(tmp_path / "b.JPG").format == "JPEG"
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["a.png", "b.JPG"]


def test_failed_write_leaves_the_old_image(tmp_path, monkeypatch):
    save_image(grey(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(grey(8, 8), tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize("name", ["picture", "picture.txt", "picture.mp4"])
def test_unknown_image_ending_is_refused_before_writing(tmp_path, name):
    with pytest.raises(ValueError, match=r"end it in \.jpg or \.png"):
        save_image(grey(), tmp_path / name)
    assert not list(tmp_path.iterdir())


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
def test_draw_errors__letters_beyond_ascii_are_no_empty_boxes():
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


@pytest.mark.parametrize(
    ("number", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3)]
)
def test_a_grid_of_pictures_of_different_sizes(number, rows, columns):
    sizes = [(50, 80), (60, 40), (30, 30)] * 3
    pictures = [torch.full((3, *size), i, dtype=torch.uint8) for i, size in enumerate(sizes)]
    drawn = grid(pictures[:number])
    height = max(h for h, _ in sizes[:number])
    width = max(w for _, w in sizes[:number])
    border = 4 if number > 1 else 0
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (
        3,
        rows * (height + border) + border,
        columns * (width + border) + border,
    )
    for i, (h, w) in enumerate(sizes[:number]):
        top = border + i // columns * (height + border)
        left = border + i % columns * (width + border)
        cell = drawn[:, top : top + height, left : left + width]
        assert (cell[:, :h, :w] == i).all()
        assert (cell[:, h:] == 255).all()
        assert (cell[:, :, w:] == 255).all()


def test_a_grid_of_large_pictures_has_cells_of_at_most_640_pixels():
    large = torch.zeros(3, 1000, 2000, dtype=torch.uint8)
    assert grid([large, large]).shape == (3, 320 + 8, 2 * 640 + 12)
