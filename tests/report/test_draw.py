import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tinydet.report.draw import class_color, draw_detections, save_image

CLASSES = tuple(f"class{i}" for i in range(20))


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
