"""What a run shows of itself, in its folder and in TensorBoard."""

import base64
import inspect
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tinydet.data.dataset import load_split
from tinydet.evaluation import evaluate
from tinydet.evaluation.errors import image_errors
from tinydet.report.draw import DETECTION_COLOR, TRUTH_COLOR
from tinydet.training.evaluate import ground_truth
from tinydet.training.loop import train
from tinydet.training.pictures import draw_samples, ranked_images
from tinydet.training.results import evaluate_again


@pytest.fixture(scope="module")
def run(tiny_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "1"
    train(tiny_experiment, folder)
    return folder


@pytest.fixture(scope="module")
def split(tiny_experiment):
    return load_split(tiny_experiment.data, "test")


def _metrics(index, change):
    """Perfect detections, changed by image."""
    found = []
    for i, truth in enumerate(ground_truth(index)):
        scores = np.full(len(truth.labels), 0.9)
        found.append(change(i, (truth.boxes, scores, truth.labels)))
    return evaluate(found, ground_truth(index), index.classes)


def _empty(boxes, scores, labels):
    return boxes[:0], scores[:0], labels[:0]


def test_the_worst_image_is_the_one_with_most_mistakes(split):
    counts = [len(truth.labels) for truth in ground_truth(split)]
    crowded = int(np.argmax(counts))

    def change(i, found):
        boxes, scores, labels = found
        if i == crowded:
            return _empty(*found)  # all missed
        if i == (crowded + 1) % len(counts):  # each found twice, the second less surely
            return np.tile(boxes, (2, 1)), np.append(scores, 0.4 * scores / 0.9), np.tile(labels, 2)
        return found

    assert ranked_images(_metrics(split, lambda _, found: found), split)["worst"] == []
    worst = ranked_images(_metrics(split, change), split)["worst"]
    assert [w["name"] for w in worst] == [
        split.image_ids[crowded],
        split.image_ids[(crowded + 1) % len(counts)],
    ]
    assert worst[0]["caption"] == (
        f"{counts[crowded]} of {counts[crowded]} objects missed, 0 false detections"
    )
    assert "the surest at 0.40" in worst[1]["caption"]
    drawing = Image.open(io.BytesIO(base64.b64decode(worst[0]["jpeg"])))
    assert drawing.size == (worst[0]["width"], worst[0]["height"])
    assert max(drawing.size) == 384  # 96 pixels would be too few to read names in


def test_images_are_ranked_by_their_errors(split):
    """Half of the objects of image 0 are missed, a third of those of image 1, and so on."""
    truth = ground_truth(split)

    def change(i, found):
        missed = len(found[2]) // (i + 2)
        return tuple(part[missed:] for part in found)

    def missed(i):
        return len(truth[i].labels) // (i + 2)

    ranked = ranked_images(_metrics(split, change), split, count=2)
    numbers = {
        rank: [split.image_ids.index(image["name"]) for image in images]
        for rank, images in ranked.items()
    }
    assert [*numbers] == ["worst", "median", "best"]
    assert [len(images) for images in ranked.values()] == [2, 1, 1]
    by_errors = sorted(map(missed, range(len(split))))
    assert [missed(i) for i in numbers["worst"]] == by_errors[:-3:-1]
    assert missed(numbers["median"][0]) == by_errors[len(split) // 2]
    (best,) = numbers["best"]
    assert missed(best) == by_errors[0]
    equal = [i for i in range(len(split)) if missed(i) == missed(best)]
    assert len(truth[best].labels) == max(len(truth[i].labels) for i in equal)
    everything = ranked_images(_metrics(split, change), split, count=2 * len(split))
    names = [image["name"] for images in everything.values() for image in images]
    assert sorted(names) == sorted(split.image_ids)


def test_an_image_that_is_gone_is_not_drawn(split):
    gone = replace(split, image_files=["gone.jpg", *split.image_files[1:]])
    metrics = _metrics(split, lambda _, found: _empty(*found))
    ranked = ranked_images(metrics, gone, count=len(split))
    names = [image["name"] for image in ranked["worst"]]
    assert len(names) == len(split) - 1
    assert ranked["median"] == ranked["best"] == []  # All are among the worst.
    assert split.image_ids[0] not in names
    assert split.image_ids[0] not in draw_samples(metrics, gone)


def test_the_page_is_made_of_what_was_measured(run):
    details = json.loads((run / "report.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    for name, curve in details["curves"].items():
        assert np.mean(curve[::10]) == pytest.approx(
            metrics["per_class"][name]["AP50_11pt"], abs=1e-4
        )
    assert [split["split"] for split in details["data"]] == [
        "trainval, 24 images",
        "test, 8 images",
    ]
    (session,) = json.loads((run / "sessions.json").read_text())
    page = (run / "report.html").read_text()
    assert session["torch"] in page
    lost = details["lost"]["all"]
    known = [row["AP50"] for row in metrics["per_class"].values() if row["AP50"] is not None]
    assert all(0 <= value <= 1 - np.mean(known) + 1e-6 for value in lost.values())
    assert "Where AP50 is lost" in page
    assert 0 < len(details["worst"]) <= 6
    images = [image for rank in ("worst", "median", "best") for image in details[rank]]
    assert len(images) > len(details["worst"])
    assert all(image["jpeg"] in page for image in images)
    least = inspect.signature(image_errors).parameters["min_score"].default
    assert f"scores below {least} are ignored" in page


def test_a_resumed_run_tells_each_of_its_starts(run, tiny_experiment, tmp_path):
    folder = tmp_path / "longer"
    for source, epochs in ((run, 3), (folder, 4)):
        longer = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=epochs))
        train(longer, folder, resume_from=source / "last.pt")
    assert len(json.loads((folder / "sessions.json").read_text())) == 2
    assert (folder / "report.html").read_text().count("<dt>started</dt>") == 2


def test_an_evaluation_again_finds_the_same(run, tmp_path):
    before = json.loads((run / "report.json").read_text())
    for name in ("experiment.json", "best.pt"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    evaluate_again(tmp_path, "cpu")
    after = json.loads((tmp_path / "report.json").read_text())
    assert after == {**before, "notes": []}


def test_tensorboard_has_curves_classes_and_pictures(run):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run), {"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/loss_cls", "train/lr", "val/AP50", "val/AP"} <= set(
        tags["scalars"]
    )
    metrics = json.loads((run / "metrics.json").read_text())
    best = metrics["best_epoch"]
    for name, row in metrics["per_class"].items():
        if row["AP50"] is not None:
            values = events.Scalars(f"AP50_per_class/{name}")
            assert [v.step for v in values] == [3, 6]  # 24 images in batches of 8
            assert values[best - 1].value == pytest.approx(row["AP50"], abs=1e-6)
    assert len(tags["images"]) == 4
    for tag in tags["images"]:
        pictures = events.Images(tag)
        assert [p.step for p in pictures] == [3, 6]
        for picture in pictures:
            assert max(picture.width, picture.height) == 320
            assert Image.open(io.BytesIO(picture.encoded_image_string)).format == "PNG"


def test_a_page_that_cannot_be_written_does_not_end_the_run(tiny_experiment, tmp_path, caplog):
    folder = tmp_path / "1"
    (folder / "report.html").mkdir(parents=True)
    once = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=1))
    train(once, folder)
    assert (folder / "last.pt").is_file()
    assert "report.html cannot be written" in caplog.text


def test_boxes_are_drawn_where_the_objects_are(split):
    metrics = _metrics(split, lambda _, found: found)
    truth = ground_truth(split)
    for name, drawing in draw_samples(metrics, split).items():
        boxes = truth[split.image_ids.index(name)].boxes * (320 / 96)
        color = torch.tensor(DETECTION_COLOR, dtype=torch.uint8)[:, None, None]
        ys, xs = torch.nonzero((drawing == color).all(0)).numpy().T
        drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        expected = [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]
        np.testing.assert_allclose(drawn, expected, atol=1.5)
    nothing = _metrics(split, lambda _, found: _empty(*found))
    for name, drawing in draw_samples(nothing, split).items():
        color = torch.tensor(TRUTH_COLOR, dtype=torch.uint8)[:, None, None]
        ys, _ = torch.nonzero((drawing == color).all(0)).numpy().T
        lowest = truth[split.image_ids.index(name)].boxes[:, 3].max() * (320 / 96)
        assert ys.max() + 1 == pytest.approx(lowest, abs=2.5)  # a line is two pixels wide
