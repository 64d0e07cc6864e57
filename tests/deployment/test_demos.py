from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tinydet.config import Data
from tinydet.data.image import read_image
from tinydet.deployment.demos import draw_camera, draw_frames, draw_images, drawn_paths
from tinydet.deployment.predictor import Predictor
from tinydet.report.draw import save_image


@pytest.fixture(scope="module")
def finder(detector):
    """Finds some things in noise."""
    data = replace(Data(), image_size=96)
    return Predictor.of(detector, data, torch.device("cpu"), 0.25)


def _noise(count, size=(96, 96)):
    return list(torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8))


def test_folded_it_finds_the_same_without_norms(finder):
    folded = finder.folded()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.model.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in finder.model.modules())
    image = _noise(1)
    (one,), (two,) = finder(image), folded(image)
    assert len(one.scores) > 0
    torch.testing.assert_close(one.scores, two.scores, rtol=0, atol=1e-4)


def test_every_drawing_has_a_name_of_its_own(tmp_path):
    images = [Path("x/a.jpg"), Path("x/a.png"), Path("y/b.jpg"), Path("y/a.jpg")]
    names = ["a_detections.jpg", "a_2_detections.jpg", "b_detections.jpg", "a_3_detections.jpg"]
    assert drawn_paths(images, None) == [Path(name) for name in names]
    assert drawn_paths(images, tmp_path / "new") == [tmp_path / "new" / name for name in names]
    assert drawn_paths(images[:1], tmp_path) == [tmp_path / names[0]]
    assert drawn_paths(images[:1], tmp_path / "c.png") == [tmp_path / "c.png"]


def test_a_drawing_takes_the_place_of_no_other_picture(finder, tmp_path):
    folders = [tmp_path / name for name in "xyz"]
    images = [tmp_path / name for name in ("x/a.png", "y/a.png", "z/a_2.png")]
    images.append(tmp_path / "a_detections.jpg")
    for folder in folders:
        folder.mkdir()
    for image, pixels in zip(images, _noise(4), strict=True):
        save_image(pixels, image)
    paths = drawn_paths(images, tmp_path)
    assert len({*images, *paths}) == 8
    before = images[-1].read_bytes()
    told = list(draw_images(finder, images, paths))
    assert all(path.is_file() for path in paths)
    assert images[-1].read_bytes() == before
    assert told[-1].endswith(" detections in 4 images")


@pytest.mark.parametrize(
    ("out", "count", "says"),
    [
        ("itself.png", 2, r"is .*itself\.png itself"),
        ("a.txt", 1, "not the name of an image file"),
        ("gone/a.jpg", 1, "there is no folder .*gone"),
        ("itself.png", 1, r"is .*itself\.png itself"),
    ],
)
def test_an_impossible_place(tmp_path, out, count, says):
    image = tmp_path / "itself.png"
    save_image(_noise(1)[0], image)
    with pytest.raises(ValueError, match=says):
        drawn_paths([image] * count, tmp_path / out)


def test_a_broken_image_of_several_is_skipped(finder, tmp_path, caplog):
    good, bad, gone = (tmp_path / name for name in ("good.png", "bad.jpg", "gone.jpg"))
    save_image(_noise(1)[0], good)
    bad.write_text("no image")
    images = [bad, gone, good]
    *_, line, last = draw_images(finder, images, drawn_paths(images, tmp_path / "out"))
    assert line.startswith(f"3/3 {good}: ")
    assert last.endswith(" detections in 1 image, 2 skipped")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good_detections.jpg"]
    logged = [record.getMessage() for record in caplog.records]
    assert [f"{path}" in text for path, text in zip((bad, gone), logged, strict=True)] == [
        True,
        True,
    ]
    with pytest.raises(ValueError, match="none of the 2 images"):
        list(draw_images(finder, [bad, gone], [tmp_path / "a.jpg"] * 2))
    with pytest.raises(ValueError, match=r"bad\.jpg: cannot be decoded"):
        list(draw_images(finder, [bad], [tmp_path / "a.jpg"]))


def test_drawings_of_several_images_in_one_picture(finder, tmp_path):
    images = [tmp_path / name for name in ("a.png", "bad.png", "b.png", "c.png")]
    for path in images:
        save_image(_noise(1)[0], path)
    images[1].write_text("no image")
    out = tmp_path / "all.png"
    *_, last = draw_images(finder, images, drawn_paths(images, out))
    assert last.endswith(f" detections in 3 images, 1 skipped, drawn in {out}")
    # Two columns and two rows, the last cell of which is empty, with borders of 4 pixels.
    sheet = read_image(out)
    height, width = read_image(images[0]).shape[1:]
    assert sheet.shape == (3, 2 * height + 12, 2 * width + 12)
    list(draw_images(finder, [images[2]], [tmp_path / "alone.png"]))
    second = sheet[:, 4 : 4 + height, 8 + width : 8 + 2 * width]
    assert torch.equal(second, read_image(tmp_path / "alone.png"))
    assert (sheet[:, 8 + height :, 8 + width :] == 255).all()


def test_an_image_alone_is_reported_box_by_box(finder, tmp_path):
    image = tmp_path / "a.png"
    save_image(_noise(1)[0], image)
    *boxes, line, last = draw_images(finder, [image], [tmp_path / "b.png"])
    assert len(boxes) > 0
    assert last == f"{len(boxes)} detections in 1 image"
    assert line.endswith(f" drawn in {tmp_path / 'b.png'}")
    nothing = Predictor.of(finder.model, finder.data, finder.device, 1.0)
    *_, hint = draw_images(nothing, [image], [tmp_path / "b.png"])
    assert hint == "no detection scores above 1; try a lower --score-threshold"


def test_frames_in_batches_are_drawn_as_frames_alone(finder):
    frames = _noise(5)
    alone = list(draw_frames(finder, frames, 1))
    assert sum(found for _, found in alone) > 0
    read = []
    together = draw_frames(finder, (read.append(0) or frame for frame in frames), 3)
    first = next(together)
    assert len(read) == 3  # No more of a long video is in memory.
    for (one, found), (two, also) in zip(alone, [first, *together], strict=True):
        assert found == also
        assert (one != two).float().mean() < 0.01  # Scores differ by rounding, as they are written.


def test_a_camera_continues_until_stopped_and_counts_skipped_frames(finder):
    shown = []

    def show(picture, new):
        shown.append((tuple(picture.shape), new))
        return len(shown) < 3

    frames = zip(_noise(9), [1, 4, 2, 1, 1, 1, 1, 1, 1], strict=True)
    drawn, skipped, seconds = draw_camera(finder, frames, show)
    assert (drawn, skipped) == (3, 4)
    assert shown == [((3, 96, 96), new) for new in (1, 4, 2)]
    assert seconds > 0


def test_ctrl_c_stops_a_camera(finder):
    def frames():
        yield _noise(1)[0], 1
        raise KeyboardInterrupt

    assert draw_camera(finder, frames(), lambda *_: True)[:2] == (1, 0)


def test_the_rate_stands_in_the_corner(finder):
    blank = torch.zeros(3, 200, 300, dtype=torch.uint8)
    nothing, pictures = Predictor.of(finder.model, finder.data, finder.device, 1.0), []
    draw_camera(nothing, [(blank, 1)], lambda picture, _: pictures.append(picture))
    (picture,) = pictures
    assert picture[:, :20, :60].any()
    assert not picture[:, 20:].any()
