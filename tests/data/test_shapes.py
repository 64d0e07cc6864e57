import numpy as np
import pytest
from PIL import Image

from tinydet.data.shapes import SHAPES, annotate, draw_scene, render_shapes, shape_mask
from tinydet.data.voc import read_index


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_render_shapes__same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        render_shapes(tmp_path / name, num_train=3, num_test=2, image_size=96, seed=seed)
    first, second, other = (files(tmp_path / name) for name in "abc")
    assert len(first) == 2 * 5 + 2
    assert first == second
    assert all(first[path] != other[path] for path in first if path.suffix == ".jpg")
    # More images leave the first ones as they are.
    render_shapes(tmp_path / "d", num_train=4, num_test=2, image_size=96, seed=1)
    more = files(tmp_path / "d")
    assert all(more[path] == data for path, data in first.items() if path.suffix != ".txt")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_render_shapes__a_clean_data_set(tmp_path):
    render_shapes(tmp_path / "shapes", num_train=40, num_test=10)
    train, test = (read_index(tmp_path / "shapes", split) for split in ("trainval", "test"))
    assert (len(train), len(test)) == (40, 10)
    assert train.classes == SHAPES == tuple(sorted(SHAPES))
    assert not train.problems
    assert not test.problems
    assert not set(train.image_ids) & set(test.image_ids)
    assert not train.difficult.all()
    sides = (train.boxes[:, 2:] - train.boxes[:, :2])[~train.difficult]
    assert sides.min() >= 3
    assert sides.max() <= 112
    images = [np.asarray(Image.open(train.image_path(i))) for i in range(3)]
    assert not np.array_equal(images[0], images[1])


def test_annotate__boxes_are_tight_on_what_is_seen():
    for seed in range(20):
        _, owner, kinds, areas = draw_scene(128, np.random.default_rng(seed))
        objects = annotate(owner, kinds, areas)
        found = 0
        for number, area in enumerate(areas):
            mask = owner == number
            if mask.sum() < 0.08 * area:
                continue
            kind, (xmin, ymin, xmax, ymax), difficult = objects[found]
            found += 1
            assert kind == kinds[number]
            assert difficult == (mask.sum() < 0.3 * area)
            # 1-based inclusive: all of the shape inside, and some of it in each outermost line.
            inside = mask[ymin - 1 : ymax, xmin - 1 : xmax]
            assert inside.sum() == mask.sum()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        assert found == len(objects)


def test_draw_scene__shapes_are_seen_where_their_owner_says():
    differing = 0
    for seed in range(10):
        pixels, owner, kinds, _ = draw_scene(128, np.random.default_rng(seed))
        for number in range(len(kinds)):
            mask = owner == number
            ring = np.zeros_like(mask)
            ring[1:-1, 1:-1] = mask[2:, 1:-1] | mask[:-2, 1:-1] | mask[1:-1, 2:] | mask[1:-1, :-2]
            ring &= owner == -1
            if mask.sum() > 50 and ring.sum() > 10:
                step = pixels[mask].mean(0) - pixels[ring].mean(0)
                differing += np.linalg.norm(step) > 25
    assert differing > 15


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_shape_mask__is_cut_to_the_shape(kind, angle):
    mask = shape_mask(kind, 40.0, angle)
    covered = mask > 0.5
    assert covered[1].any()
    assert covered[-2].any()
    assert covered[:, 1].any()
    assert covered[:, -2].any()
    assert not covered[[0, -1]].any()
    assert not covered[:, [0, -1]].any()
    assert 25 <= max(mask.shape) - 2 <= 42


def test_shape_mask__areas():
    # Areas in units of the radius squared, from school geometry.
    areas = {
        "circle": np.pi * 0.81,
        "ring": np.pi * 0.81 * (1 - 0.55**2),
        "square": 2.0,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 4 * 0.62 * 0.95 - 0.62**2,
        "star": 5 * 0.42 * np.sin(np.pi / 5),
    }
    for kind, area in areas.items():
        assert shape_mask(kind, 100.0, 0.3).sum() == pytest.approx(2500 * area, rel=0.03)


def test_render_shapes__leaves_what_is_there(tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists already"):
        render_shapes(tmp_path / "shapes", num_train=1, num_test=1)
    assert files(tmp_path) == {(tmp_path / "shapes/mine.txt").relative_to(tmp_path): b"keep"}


def test_render_shapes__nothing_half_done_stays(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("tinydet.data.shapes.annotation_xml", fail)
    with pytest.raises(OSError, match="disk full"):
        render_shapes(tmp_path / "shapes", num_train=1, num_test=1)
    assert not list(tmp_path.iterdir())


def test_render_shapes__another_process_was_faster(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    original = draw_scene
    started = []

    def meanwhile(*args):
        if not started:
            started.append(True)
            render_shapes(root, num_train=1, num_test=1, image_size=64, seed=5)
        return original(*args)

    monkeypatch.setattr("tinydet.data.shapes.draw_scene", meanwhile)
    render_shapes(root, num_train=1, num_test=1, image_size=64)
    assert len(read_index(root, "test")) == 1
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["shapes"]


def test_render_shapes__refuses_impossible_numbers(tmp_path):
    with pytest.raises(ValueError, match="num_train=0"):
        render_shapes(tmp_path / "shapes", num_train=0)


def test_render_shapes__says_how_far_it_is(tmp_path, every_step_said):
    render_shapes(tmp_path / "shapes", num_train=3, num_test=2, image_size=64)
    assert [line.split(", ")[0] for line in every_step_said()] == [
        f"rendering: {i}/5 images" for i in range(1, 6)
    ]
