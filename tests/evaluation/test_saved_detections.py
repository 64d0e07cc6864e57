import numpy as np
import pytest

from tinydet.evaluation.boxes import ImageDetections
from tinydet.evaluation.saved_detections import load_detections, save_detections

_NONE = ImageDetections(
    np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
)
_TWO = ImageDetections(
    np.array([[0.1, 1, 2, 3], [4, 5, 6, 7]], np.float32),
    np.array([0.9, 1 / 3], np.float32),
    np.array([1, 0]),
)


@pytest.mark.parametrize("found", [[_NONE], [_TWO, _NONE, _TWO], [_NONE, _TWO]])
def test_what_is_read_is_what_was_written(found, tmp_path):
    names = [f"bild {i} äö" for i in range(len(found))]
    save_detections(tmp_path / "new" / "d.npz", names, ("cat", "dog"), found)
    read = load_detections(tmp_path / "new" / "d.npz")
    assert (read.image_ids, read.classes) == (tuple(names), ("cat", "dog"))
    assert len(read.detections) == len(found)
    for one, two in zip(read.detections, found, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert read.same_as(load_detections(tmp_path / "new" / "d.npz"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["d.npz"]


def test_the_smallest_difference_is_seen(tmp_path):
    scores = np.nextafter(_TWO.scores, np.float32(1))
    for name, found in (("a", _TWO), ("b", _TWO._replace(scores=scores)), ("c", _NONE)):
        save_detections(tmp_path / f"{name}.npz", ["i"], ["c", "d"], [found])
    one, *others = (load_detections(tmp_path / f"{name}.npz") for name in "abc")
    assert not any(one.same_as(other) for other in others)


@pytest.mark.parametrize("damage", ["missing", "cut short", "an object", "a part missing"])
def test_damage_is_one_line(damage, tmp_path):
    path = tmp_path / "d.npz"
    save_detections(path, ["i"], ["c", "d"], [_TWO])
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "an object":  # Pickled, and never to be unpickled.
        np.savez(path, image_ids=np.array([{}], dtype=object))
    else:
        np.savez(path, image_ids=np.array(["i"]))
    with pytest.raises(ValueError, match=r"d\.npz: cannot read detections"):
        load_detections(path)
