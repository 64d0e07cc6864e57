"""COCO sets: the index by hand, what the files may get wrong, and pycocotools on the same file."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tinydet.config import Augment, ConfigError, Data, Experiment, Model, Optim, Train
from tinydet.data.coco import read_index, split_names
from tinydet.data.dataset import fetch, is_missing, load_split
from tinydet.data.loader import make_train_loader
from tinydet.data.voc import DetectionDataset
from tinydet.evaluation import ImageDetections, evaluate, evaluate_coco
from tinydet.training.evaluate import ground_truth
from tinydet.training.loop import train
from tinydet.yolof.detector import Detector

CAT, BUS, DOG = 2, 90, 7


def test_read_index__by_hand(coco_tree):
    coco_tree.image(20, size=(60, 40))
    coco_tree.image(3, size=(50, 80))
    coco_tree.image(100)
    coco_tree.object(20, BUS, (0, 0, 60, 40), area=123.5)
    coco_tree.object(3, DOG, (10.25, 20.5, 30, 0.75))
    coco_tree.object(20, CAT, (1.5, 2, 3, 4), crowd=1)
    coco_tree.object(3, CAT, (40, 70, 15, 10))  # 5 pixels over the right edge
    index = read_index(coco_tree.write(), "train")
    assert index.classes == ("cat", "dog", "bus")  # ids 2, 7, 90
    assert index.image_ids == ["3", "20", "100"]
    assert index.image_files == [f"train/{n:012d}.jpg" for n in (3, 20, 100)]
    assert index.sizes.tolist() == [[80, 50], [40, 60], [40, 60]]
    assert index.offsets.tolist() == [0, 2, 4, 4]
    assert index.labels.tolist() == [1, 0, 2, 0]
    assert index.boxes.tolist() == [
        [10.25, 20.5, 40.25, 21.25],
        [40, 70, 50, 80],
        [0, 0, 60, 40],
        [1.5, 2, 4.5, 6],
    ]
    assert index.difficult.tolist() == [False, False, False, True]
    assert index.coco.crowd.tolist() == [False, False, False, True]
    assert index.coco.areas.tolist() == [22.5, 150, 123.5, 12]
    assert index.coco.boxes[1].tolist() == [40, 70, 55, 80]
    assert index.coco_truth(0).areas.tolist() == [22.5, 150]
    assert index.problems.counts == {"clipped": 1}
    assert "000000000003.jpg: cat 40,70,15,10 in 50x80" in index.problems.summary()[0]


def test_read_index__memory_is_a_few_numbers_an_object(coco_tree):
    coco_tree.image(1)
    for i in range(1000):
        coco_tree.object(1, CAT, (i % 40, 1, 5, 5))
    index = read_index(coco_tree.write(), "train")
    values = [index.boxes, index.labels, index.difficult, *index.coco]
    assert all(isinstance(v, np.ndarray) and v.dtype != object for v in values)
    assert sum(v.nbytes for v in values) <= 70 * 1000


def test_read_index__classes_restrict_and_reorder(coco_tree):
    coco_tree.image(1)
    for category in (CAT, BUS, DOG, BUS):
        coco_tree.object(1, category, (1, 1, 9, 9 + category / 10))
    coco_tree.image(2)
    coco_tree.object(2, BUS, (1, 1, 9, 9))
    index = read_index(coco_tree.write(), "train", ("dog", "cat"))
    assert index.classes == ("dog", "cat")
    assert index.labels.tolist() == [1, 0]
    assert index.image_ids == ["1", "2"]  # an image without objects of these classes stays
    assert index.problems.unknown_classes == {"bus": 3}


def test_read_index__area_or_crowd_left_out(coco_tree):
    coco_tree.image(1)
    for area in (None, 7, "wide", float("nan")):
        coco_tree.object(1, CAT, (1, 1, 5, 6), area=area)
    del coco_tree.objects[0]["area"], coco_tree.objects[0]["iscrowd"]
    index = read_index(coco_tree.write(), "train")
    assert index.coco.areas.tolist() == [30, 7, 30, 30]
    assert not index.coco.crowd.any()


def test_read_index__objects_dropped(coco_tree):
    coco_tree.image(1, size=(60, 40))
    coco_tree.object(1, CAT, (10, 10, 0, 5))
    coco_tree.object(1, CAT, (10, 10, 5, -5))
    coco_tree.object(1, CAT, (60, 10, 5, 5))  # right of the image
    coco_tree.object(1, CAT, (10, -9, 5, 9))  # above it
    coco_tree.object(1, 4, (1, 1, 5, 5))  # a hole between the category ids
    coco_tree.object(77, CAT, (1, 1, 5, 5))
    coco_tree.object(1, CAT, (1, 1, 59.01, 5))  # a hundredth over the edge: rounding
    for box in ([1, 2, 3], None, "1 2 3 4", [1, 2, "3", 4], [1, 2, float("nan"), 4], [10**400] * 4):
        coco_tree.object(1, CAT, (1, 1, 5, 5))
        coco_tree.objects[-1]["bbox"] = box
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    del coco_tree.objects[-1]["bbox"]
    index = read_index(coco_tree.write(), "train")
    assert index.boxes.tolist() == [[1, 1, 60, 6]]
    assert index.coco.boxes[0].tolist() == pytest.approx([1, 1, 60.01, 6])
    assert index.problems.counts == {
        "unknown_image": 1,
        "unknown_category": 1,
        "bad_box": 7,
        "zero_area": 2,
        "outside": 2,
    }
    lines = "\n".join(index.problems.summary())
    assert len(lines.splitlines()) == 5
    assert "1 object belongs to an image that the annotation file does not list" in lines
    assert "(object 6: image 77)" in lines
    assert "1 object has a category id that the annotation file does not define" in lines
    assert "2 boxes have no area: dropped (000000000001.jpg: cat 10,10,0,5; " in lines


def test_read_index__images_left_out(coco_tree, tmp_path):
    for number in range(1, 9):
        coco_tree.image(number)
        coco_tree.object(number, CAT, (1, 1, 5, 5))
    rows = coco_tree.images
    (coco_tree.root / "train" / rows[0]["file_name"]).unlink()
    broken = coco_tree.root / "train" / rows[1]["file_name"]
    broken.write_bytes(broken.read_bytes()[:300])
    del rows[2]["file_name"]
    (tmp_path / "secret.jpg").write_bytes((broken.parent / rows[3]["file_name"]).read_bytes())
    rows[3]["file_name"] = "../../secret.jpg"
    rows[4]["file_name"] = rows[5]["file_name"]  # which of the two owns the file is anyone's guess
    rows.append(dict(rows[7]))  # listed twice
    index = read_index(coco_tree.write(), "train")
    assert index.image_ids == ["5", "7", "8"]
    assert len(index.labels) == 3
    assert index.problems.counts == {
        "missing_image": 2,
        "bad_image": 1,
        "duplicate_id": 2,
        "no_file_name": 1,
    }
    lines = "\n".join(index.problems.summary())
    assert "2 image files are missing" in lines
    assert "train/000000000001.jpg" in lines
    assert "1 image of the annotation file has no file name: left out (image 3)" in lines
    assert "000000000006.jpg: image 6" in lines


def test_read_index__two_files_of_one_id(coco_tree):
    coco_tree.image(1)
    coco_tree.image(1, file="other.jpg")
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    index = read_index(coco_tree.write(), "train")
    assert (index.image_ids, len(index.labels)) == (["1"], 1)
    assert index.problems.examples == {"duplicate_id": ["other.jpg: image 1"]}


def test_read_index__size_mode_and_orientation(coco_tree):
    coco_tree.image(1, size=(60, 40), stated=(600, 400))
    coco_tree.image(2, size=(60, 40), stated=(40, 60), orientation=6)
    coco_tree.image(3, size=(60, 40), orientation=6)
    coco_tree.image(4, mode="L")
    coco_tree.image(5)
    del coco_tree.images[-1]["width"]
    for number in range(1, 6):
        coco_tree.object(number, CAT, (1, 1, 100, 100))
    index = read_index(coco_tree.write(), "train")
    assert index.sizes.tolist() == [[40, 60], [60, 40], [40, 60], [40, 60], [40, 60]]
    assert index.boxes[:2].tolist() == [[1, 1, 60, 40], [1, 1, 40, 60]]
    counts = {"wrong_size": 1, "exif_applied": 1, "exif_ignored": 1, "not_rgb": 1, "clipped": 5}
    assert index.problems.counts == counts
    dataset = DetectionDataset(index)
    assert [tuple(dataset[i].image.shape) for i in (1, 3)] == [(3, 60, 40), (3, 40, 60)]


def test_read_index__images_in_folders_below(coco_tree):
    (coco_tree.root / "train" / "north").mkdir()
    coco_tree.image(1, file="north/a.jpg")
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    index = read_index(coco_tree.write(), "train")
    assert index.image_path(0) == coco_tree.root / "train/north/a.jpg"


def test_read_index__cached_until_something_changes(coco_tree, monkeypatch):
    coco_tree.image(1)
    coco_tree.object(1, CAT, (1, 1, 5, 5), area=9)
    coco_tree.object(1, DOG, (1, 1, 50, 50), crowd=1)
    root = coco_tree.write()
    first = read_index(root, "train")

    def refuse(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("tinydet.data.coco._read_json", refuse)
        again = read_index(root, "train")
        with pytest.raises(AssertionError, match="read again"):
            read_index(root, "train", ("cat",))
    for old, new in zip(first.coco, again.coco, strict=True):
        np.testing.assert_array_equal(old, new)
        assert old.dtype == new.dtype
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert again.image_ids == first.image_ids
    assert again.problems == first.problems

    coco_tree.image(1, size=(30, 30))  # an image file
    assert read_index(root, "train").size(0) == (30, 30)
    coco_tree.object(1, BUS, (2, 2, 5, 5))
    coco_tree.write()
    assert len(read_index(root, "train").labels) == 3


def _one(coco_tree):
    coco_tree.image(1)
    coco_tree.object(1, CAT, (1, 1, 5, 5))
    return json.loads((coco_tree.write() / "annotations/instances_train.json").read_text())


def _without(part, key):
    def change(content):
        del content[part][0][key]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("annotations"), 'has no list "annotations"'),
        (lambda c: c.update(images={}), 'has no list "images"'),
        (_without("images", "id"), "has no 'id'"),
        (_without("annotations", "image_id"), "has no 'image_id'"),
        (_without("annotations", "category_id"), "has no 'category_id'"),
        (_without("categories", "id"), "has no 'id'"),
        (_without("categories", "name"), "no annotated object .* no class name.* category 2"),
        (lambda c: c["images"].append("a.jpg"), "malformed"),
        (lambda c: c["annotations"][0].update(image_id=[1]), "malformed"),
        (lambda c: c["images"][0].update(id="one"), "image id 'one' is not a whole number"),
        (lambda c: c["categories"][0].update(id=1.5), "category id 1.5 is not a whole number"),
        (lambda c: c["categories"][0].update(id=DOG), "two categories have the same id"),
        (lambda c: c["images"].clear(), "no usable image"),
        (lambda c: c["images"][0].update(file_name="b.jpg"), r"no usable image: 1 .*train/b\.jpg"),
        (lambda c: c["annotations"].clear(), "no annotated object in 1 images"),
    ],
)
def test_read_index__files_that_are_refused(coco_tree, change, says):
    content = _one(coco_tree)
    change(content)
    coco_tree.file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances_train\.json: .*{says}") as error:
        read_index(coco_tree.root, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b'{"images": [', b"", b"\xff\xfe\x00", b"[" * 100_000, b"[1]"])
def test_read_index__not_json(coco_tree, content):
    coco_tree.file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"instances_train\.json: (not JSON|has no list|line 1 is not)"
    ):
        read_index(coco_tree.root, "train")


def test_read_index__none_of_the_classes(coco_tree):
    _one(coco_tree)
    with pytest.raises(ValueError, match=r"none of the classes cow occurs.*have cat"):
        read_index(coco_tree.root, "train", ("cow",))


def test_read_index__what_is_not_there(coco_tree, tmp_path):
    _one(coco_tree)
    root = coco_tree.root
    (root / "annotations/instances_val2017.json").write_text("{}")
    (tmp_path / "bare/annotations").mkdir(parents=True)
    assert split_names(root) == ["train", "val2017"]
    assert split_names(tmp_path) == []
    zips = r"train2017\.zip.*val2017\.zip.*annotations_trainval2017\.zip.*images\.cocodataset\.org"
    for folder, split, says in (
        (tmp_path / "nowhere", "train", f"no such folder.*{zips}"),
        (tmp_path, "train", r"has no annotations; did you mean .*coco\?|bare\?"),
        (root / "train", "train", f"has no annotations; .*{zips}"),
        (root, "val", r"val\.json: no such split; did you mean val2017\? \(there are: train, val"),
        (root, "val2017", f"val2017: no such folder; it holds the images of inst.*{zips}"),
        (tmp_path / "bare", "train", f"there are: none.*{zips}"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            read_index(folder, split)


def test_load_split__missing_coco_names_what_to_fetch(tmp_path):
    data = Data(root=str(tmp_path / "coco"), source="coco", train_split="train2017", classes=())
    assert is_missing(data)
    for attempt in (fetch, lambda d: load_split(d, "train2017")):
        with pytest.raises(FileNotFoundError, match=r"coco: no such.*train2017\.zip.*val2017\.zip"):
            attempt(data)


def test_load_split__unknown_class_names_the_nearest(coco_tree):
    _one(coco_tree)
    data = Data(root=str(coco_tree.root), source="coco", train_split="train", test_split="test")
    assert load_split(replace(data, classes=("cat", "dog")), "train").classes == ("cat", "dog")
    with pytest.raises(ConfigError, match=r"data\.classes: .*\(train\) know no dogg: did you mean"):
        load_split(replace(data, classes=("cat", "dogg")), "train")
    with pytest.raises(ConfigError, match=r"know no aeroplane; no bicycle;"):  # VOC's, the default
        load_split(data, "train")


def test_load_split__labels_are_those_of_the_training_split(coco_tree, caplog):
    _one(coco_tree)
    coco_tree.start("test")
    coco_tree.categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cow"}]
    coco_tree.image(5)
    coco_tree.object(5, 1, (1, 1, 5, 5))
    coco_tree.object(5, 2, (1, 1, 6, 6))
    coco_tree.write()
    root = str(coco_tree.root)
    data = Data(root=root, source="coco", train_split="train", test_split="test", classes=())
    index = load_split(data, "test")
    assert index.classes == ("cat", "dog", "bus")
    assert index.labels.tolist() == [1]
    assert "2 classes are not in the annotation file's list" in caplog.text
    assert "cow (1)" in caplog.text


def random_set(coco_tree, rng):
    """Write a set with all that COCO's evaluation treats in a way of its own; return its images."""
    numbers = rng.permutation(np.arange(1, 60))[:14].tolist()  # not in order
    for number in numbers:
        coco_tree.image(number, size=(320, 320))
    boxes = {}
    for number in numbers[3:]:  # three images are empty
        boxes[number] = []
        for _ in range(rng.integers(1, 7)):
            side = rng.choice([20, 60, 150])
            # Some reach over the edge, where ours are clipped.
            box = [*rng.uniform(-15, 320 - side / 2, 2), *rng.uniform(side / 2, side * 1.5, 2)]
            crowd = int(rng.random() < 0.25)
            category = int(rng.choice([CAT, DOG, BUS]))
            # Masks fill anything from a tenth of their box: other sizes than the boxes'.
            area = box[2] * box[3] * rng.uniform(0.1, 1)
            coco_tree.object(number, category, [float(v) for v in box], float(area), crowd)
            boxes[number].append((category, box, crowd))
    return numbers, boxes


def random_results(rng, numbers, boxes):
    """Return COCO result rows: jittered boxes, parts of crowds, and some in empty images."""
    rows = []

    def add(number, category, box):
        box = [float(v) for v in box]
        score = round(float(rng.random()), 1)  # many are equal: the order of images matters
        rows.append({"image_id": number, "category_id": category, "bbox": box, "score": score})

    for number in numbers:
        for category, (x, y, w, h), crowd in boxes.get(number, ()):
            for _ in range(3):
                other = int(rng.choice([CAT, DOG, BUS]))
                jitter = rng.normal(0, 3, 4)
                box = np.maximum(np.array([x, y, w, h]) + jitter, [-30, -30, 1, 1])
                add(number, category if rng.random() < 0.8 else other, box)
            if crowd:
                add(number, category, [x + w / 4, y + h / 4, w / 3, h / 3])
        add(number, CAT, [*rng.uniform(0, 200, 2), *rng.uniform(10, 90, 2)])
    for _ in range(130):  # more than the 100 that count
        add(numbers[-1], DOG, [*rng.uniform(0, 200, 2), 40, 40])
    return rows


def pycocotools_stats(file, rows):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def as_detections(index, rows, categories):
    """Our detections of each image of the index, from result rows."""
    label = {c["id"]: index.classes.index(c["name"]) for c in categories}
    found = []
    for image_id in index.image_ids:
        own = [r for r in rows if r["image_id"] == int(image_id)]
        boxes = np.array([r["bbox"] for r in own], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([label[r["category_id"]] for r in own], dtype=int)
        found.append(ImageDetections(boxes, np.array([r["score"] for r in own]), labels))
    return found


@pytest.mark.parametrize("classes", [(), ("bus", "cat", "dog")])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_those_of_pycocotools_on_the_file(coco_tree, seed, classes):
    rng = np.random.default_rng(seed)
    numbers, boxes = random_set(coco_tree, rng)
    rows = random_results(rng, numbers, boxes)
    root = coco_tree.write()
    stats = pycocotools_stats(coco_tree.file, rows)
    index = read_index(root, "train", classes)
    assert {"bus", "cat", "dog"} == set(index.classes)
    assert len(index) == len(numbers)
    assert index.coco.crowd.any()
    detections, truth = as_detections(index, rows, coco_tree.categories), ground_truth(index)
    metrics = evaluate(detections, truth, index.classes)
    coco, named = metrics.coco, metrics.as_dict()
    ours = [named["AP"], coco.ap50, named["AP75"]]
    ours += [named[f"AP_{size}"] for size in ("small", "medium", "large")]
    np.testing.assert_allclose(ours, stats[:6], rtol=0, atol=1e-12)
    assert (stats[:6] > 0.02).all()  # a case that says something
    # Each part of the rule matters in this case.
    for changed in (
        [replace(t, crowd=None) for t in truth],
        [replace(t, areas=None) for t in truth],
        [replace(t, difficult=t.crowd & False, crowd=None) for t in truth],
    ):
        other = evaluate_coco(detections, changed, 3)
        values = (other.ap, other.ap_small, other.ap_medium, other.ap_large)
        assert not np.allclose(values, np.take(stats, [0, 3, 4, 5]), rtol=0, atol=1e-6)


def test_voc_metric_takes_a_crowd_for_difficult(coco_tree):
    coco_tree.image(1, size=(200, 200))
    coco_tree.object(1, CAT, (100, 100, 50, 50), crowd=1)
    coco_tree.object(1, CAT, (0, 0, 50, 50))
    index = read_index(coco_tree.write(), "train")
    crowd, single = [100, 100, 150, 150], [0, 0, 50, 50]
    found = ImageDetections(np.array([crowd, single]), np.array([0.9, 0.8]), np.array([0, 0]))
    metrics = evaluate([found], ground_truth(index), index.classes)
    assert metrics.ap50 == pytest.approx(1.0)
    assert metrics.voc.num_boxes.tolist() == [1, 0, 0]


def tiny_set(coco_tree):
    """Two splits of 64-pixel images; every image has a bus, and it is a crowd."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        coco_tree.start(split)
        for number in range(1, count + 1):
            coco_tree.image(number, size=(64, 64))
            coco_tree.object(number, BUS, (2, 2, 60, 60), crowd=1)
            for _ in range(number % 3):  # every third has the crowd only
                box = (*rng.uniform(0, 30, 2), *rng.uniform(20, 34, 2))
                coco_tree.object(number, int(rng.choice([CAT, DOG])), box)
        coco_tree.write()
    return Data(
        root=str(coco_tree.root),
        source="coco",
        train_split="train",
        test_split="test",
        classes=(),
        image_size=64,
        augment=Augment(shift=0.0),
        workers=0,
    )


def test_crowds_are_no_training_targets(coco_tree):
    data = tiny_set(coco_tree)
    index = load_split(data, "train")
    assert index.classes[2] == "bus"
    singles = int((~index.coco.crowd).sum())
    loader = make_train_loader(DetectionDataset(index), data, batch_size=4)
    for epoch in range(2):
        loader.set_epoch(epoch)
        labels = [int(v) for batch in loader for t in batch.targets for v in t["labels"]]
        assert len(labels) == singles
        assert 2 not in labels


def test_an_experiment_on_a_coco_set(coco_tree, tmp_path, monkeypatch):
    seen = []
    forward = Detector.forward

    def watched(self, images, targets=None):
        seen.extend(int(v) for t in targets or () for v in t["labels"])
        return forward(self, images, targets)

    monkeypatch.setattr(Detector, "forward", watched)
    experiment = Experiment(
        name="tiny",
        model=Model(
            backbone="mobilenetv3_small_050",
            weights="random",
            encoder_channels=16,
            encoder_mid_channels=8,
            dilations=(2,),
            cls_convs=1,
            reg_convs=1,
        ),
        data=tiny_set(coco_tree),
        optim=Optim(optimizer="adamw", lr=1e-3, warmup_iters=2),
        train=Train(
            epochs=1, batch_size=4, dtype="float32", memory_format="contiguous", device="cpu"
        ),
    )
    run = tmp_path / "run"
    run.mkdir()
    train(experiment, run)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images"] == 4
    assert list(metrics["per_class"]) == ["cat", "dog", "bus"]
    assert metrics["per_class"]["bus"] == {"AP50": None, "AP50_11pt": None, "AP": None, "boxes": 0}
    assert metrics["AP"] is not None
    assert {0, 1} == set(seen)  # cats and dogs are trained on, the crowds of buses never


def test_read_index__categories_without_a_name(coco_tree):
    coco_tree.image(1)
    for category in (CAT, BUS, DOG):
        coco_tree.object(1, category, (1, 1, 9, 9))
    coco_tree.object(1, 5, (1, 1, 9, 9))
    coco_tree.categories[0]["name"] = " \u200b"
    del coco_tree.categories[1]["name"]
    coco_tree.categories.append({"id": 5, "name": 17})
    index = read_index(coco_tree.write(), "train")
    assert index.classes == ("17", "dog")  # ids 5 and 7
    assert index.labels.tolist() == [1, 0]
    assert index.problems.counts == {"no_class_name": 2}
    assert "000000000001.jpg: category 2" in index.problems.summary()[0]


def test_read_index__categories_of_one_name(coco_tree):
    coco_tree.image(1)
    names = {CAT: "caf\u00e9", BUS: " cafe\u0301", DOG: "dog"}
    for row in coco_tree.categories:
        row["name"] = names[row["id"]]
        coco_tree.object(1, row["id"], (1, 1, 9, 9))
    root = coco_tree.write()
    for classes in ((), ("caf\u00e9", "dog"), ("cafe\u0301", "dog")):
        index = read_index(root, "train", classes)
        assert len(index.classes) == 2
        assert index.labels.tolist() == [0, 0, 1]
        assert index.problems.counts == {"same_name": 1}
    assert "(caf\u00e9: categories 2 and 90)" in index.problems.summary()[0]


def test_read_index__marks_as_they_are_meant(coco_tree):
    coco_tree.image(1)
    values = [1, "1", True, "true", 0, "0", False, "false", None, "maybe", -1]
    for key in ("iscrowd", "ignore"):
        for value in values:
            coco_tree.object(1, CAT, (1, 1, 9, 9), **{key: value})
    index = read_index(coco_tree.write(), "train")
    meant = [True] * 4 + [False] * 7
    assert index.coco.crowd.tolist() == meant + [False] * 11
    assert index.difficult.tolist() == meant + meant
    assert index.problems.counts == {"unclear_mark": 4}
    assert "000000000001.jpg: iscrowd is 'maybe'" in index.problems.summary()[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_read_index__unicode_of_any_kind(coco_tree, encoding):
    coco_tree.image(1)
    coco_tree.object(1, CAT, (1, 1, 9, 9))
    coco_tree.categories[0]["name"] = "猫"
    text = coco_tree.write() / "annotations/instances_train.json"
    text.write_bytes(json.dumps(json.loads(text.read_text()), ensure_ascii=False).encode(encoding))
    assert read_index(coco_tree.root, "train").classes == ("猫", "dog", "bus")


def test_read_index__other_encodings_are_refused(coco_tree):
    coco_tree.file.write_bytes('{\n"é": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"instances_train\.json: line 2 is not UTF-8 .*save"):
        read_index(coco_tree.root, "train")


@pytest.mark.parametrize(
    "name",
    ["./a.jpg", "train/a.jpg", "/data/coco/train/a.jpg", "C:\\coco\\train\\a.jpg", "a.JPG"],
)
def test_read_index__file_names_that_mean_an_image(coco_tree, name):
    coco_tree.image(1, file="a.jpg")
    coco_tree.object(1, CAT, (1, 1, 9, 9))
    coco_tree.images[0]["file_name"] = name
    index = read_index(coco_tree.write(), "train")
    assert index.image_files == ["train/a.jpg"]
    assert not index.problems


def test_read_index__file_names_of_two_unicode_forms(coco_tree):
    coco_tree.image(1, file="cafe\u0301.jpg")
    coco_tree.object(1, CAT, (1, 1, 9, 9))
    coco_tree.images[0]["file_name"] = "caf\u00e9.jpg"
    coco_tree.images.append({"id": 2, "file_name": "cafe\u0301.jpg"})
    index = read_index(coco_tree.write(), "train")
    assert index.image_files == ["train/cafe\u0301.jpg"]
    assert index.problems.counts == {"duplicate_id": 1}


def test_read_index__missing_files_and_what_is_there(coco_tree):
    for number, file in enumerate(("a.jpg", "b.jpg", "c.jpg", "d.jpg")):
        coco_tree.image(number, file=file)
        coco_tree.object(number, CAT, (1, 1, 9, 9))
    names = ("../train/a.jpg", "other/b.jpg", "c.heic", "d.jpg")
    for row, name in zip(coco_tree.images, names, strict=True):
        row["file_name"] = name
    index = read_index(coco_tree.write(), "train")
    assert index.image_files == ["train/d.jpg"]
    assert "train/c.heic: there is train/c.jpg" in index.problems.summary()[0]
    assert index.problems.counts == {"missing_image": 3}
