"""Errors of checkpoints: of detectors that find what the test says, from files to pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from tinydet.comparison import error_analysis
from tinydet.comparison.error_analysis import error_lines
from tinydet.data.dataset import load_split
from tinydet.evaluation.boxes import ImageDetections
from tinydet.evaluation.errors import compare_errors
from tinydet.evaluation.tide import tide
from tinydet.evaluation.tide_table import tide_lines
from tinydet.experiment_file import experiment_to_dict
from tinydet.report.draw import DETECTION_COLOR
from tinydet.training.checkpoint import save_checkpoint
from tinydet.training.evaluate import ground_truth
from tinydet.training.pictures import draw_change
from tinydet.yolof.build import build_detector


@pytest.fixture(scope="module")
def index(tiny_experiment):
    return load_split(tiny_experiment.data, "test")


def _checkpoint(path, experiment, classes):
    torch.manual_seed(0)
    detector = build_detector(experiment.model, classes)
    content = {"experiment": experiment_to_dict(experiment), "classes": list(classes), "epoch": 1}
    save_checkpoint(path, {"form": "training", "model": detector.state_dict(), **content})
    return path


@pytest.fixture(scope="module")
def run(tiny_experiment, index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "1"
    for name in ("best.pt", "last.pt"):
        _checkpoint(folder / name, tiny_experiment, index.classes)
    return folder


@pytest.fixture
def perfect_but(monkeypatch):
    """Detectors find all but what is changed by a function of the checkpoint's name and image."""

    def set_up(change):
        def detect(loaded, index, device):
            assert device.type == "cpu"
            found = []
            for i, truth in enumerate(ground_truth(index)):
                scores = np.full(len(truth.labels), 0.9)
                found.append(change(loaded.path.name, i, truth.boxes, scores, truth.labels))
            return [ImageDetections(*of_image) for of_image in found]

        monkeypatch.setattr(error_analysis, "_detect", detect)

    return set_up


def test_a_run_s_table_is_that_of_its_detections(run, index):
    lines = list(error_lines(run, device="cpu"))
    assert f"tiny ({run / 'best.pt'}), 8 images of" in lines[0]
    loaded = error_analysis._load(run / "best.pt", (), torch.device("cpu"))
    found = error_analysis._detect(loaded, index, torch.device("cpu"))
    table = tide_lines(tide(found, ground_truth(index), len(index.classes)), index.classes)
    assert lines[-len(table) :] == table
    assert lines == list(error_lines(run / "best.pt", device="cpu"))


def test_what_changed_is_named_and_drawn(run, index, perfect_but, tmp_path):
    def change(name, i, boxes, scores, labels):
        if (name, i) in (("best.pt", 2), ("last.pt", 5)):  # the idea finds 2, and misses 5
            return boxes[:0], scores[:0], labels[:0]
        return boxes, scores, labels

    perfect_but(change)
    left_over = tmp_path / "worsened_2.jpg"
    left_over.touch()
    lines = list(error_lines(run / "best.pt", run / "last.pt", device="cpu", out=tmp_path))
    counts = [len(truth.labels) for truth in ground_truth(index)]
    improved = next(line for line in lines if index.image_ids[2] in line)
    worsened = next(line for line in lines if index.image_ids[5] in line)
    assert improved.split()[1:5] == [str(counts[2]), "0", "0", "0"]
    assert worsened.split()[1:5] == ["0", str(counts[5]), "0", "0"]
    assert improved.endswith(str(tmp_path / "improved_1.jpg"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["improved_1.jpg", "worsened_1.jpg"]
    assert sum("1 of 8 images" in line for line in lines) == 2
    picture = Image.open(tmp_path / "improved_1.jpg")
    assert picture.width > 2 * 384 >= picture.height
    # The two halves differ: what is missed is thick on the left.
    pixels = np.asarray(picture.convert("RGB"), int)
    assert abs(pixels[:, :384] - pixels[:, -384:]).max() > 100


def test_without_a_change_there_is_no_picture(run, perfect_but, tmp_path):
    perfect_but(lambda *found: found[2:])
    lines = list(error_lines(run, run / "last.pt", device="cpu", out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    assert lines[-1] == "worsened, at scores of 0.3 or more: 0 of 8 images"
    row = next(line for line in lines if line.startswith("all "))
    assert row.split()[1] == "100.00"


def test_what_both_do_wrong_is_drawn_thin(index):
    truth = ground_truth(index)[0]
    right = ImageDetections(truth.boxes, np.full(len(truth.labels), 0.9), truth.labels)
    false = ImageDetections(np.array([[70, 70, 94, 94]]), np.array([0.5]), truth.labels[:1])
    both = ImageDetections(*map(np.concatenate, zip(right, false, strict=True)))
    orange = []
    for idea in (both, right):
        changes = compare_errors([both], [idea], [truth], len(index.classes))
        picture = draw_change(changes.images[0], index, ["base", "idea"])
        color = torch.tensor(DETECTION_COLOR, dtype=torch.uint8)[:, None, None]
        orange.append(int((picture[:, :, :384] == color).all(0).sum()))
    assert orange[0] < orange[1] - 200


def test_mistakes_are_told_before_work_is_done(run, tiny_experiment, tmp_path):
    other = _checkpoint(tmp_path / "other.pt", tiny_experiment, ("cat", "dog"))
    (tmp_path / "file").touch()
    for paths, options, says in (
        ([run], {"out": tmp_path}, "--out needs a second checkpoint"),
        ([run, other], {"out": tmp_path / "file"}, "is a file; give a folder"),
        ([run, other], {}, r"other\.pt: has the classes cat, dog, but .*best\.pt"),
        ([tmp_path], {}, r"holds no best\.pt or last\.pt"),
        ([tmp_path / "a.onnx"], {}, "ONNX file does not say"),
        ([run], {"overrides": ["data.rot=x"]}, "did you mean data.root"),
    ):
        with pytest.raises((ValueError, OSError), match=says):
            list(error_lines(*paths, device="cpu", **options))
