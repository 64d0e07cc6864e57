import pytest
import torch

from tinydet.training.checkpoint import CheckpointError, load_checkpoint
from tinydet.yolof.official import COCO_CLASSES, convert_official

from .published import Detectron2Yolof, MmdetYolof, randomise

CAFFE = "model = dict(type='YOLOF', backbone=dict(style='caffe'))"


def assert_same_function(network, path):
    """Compare scores and deltas, of a file and of the network whose weights it holds."""
    images = torch.randint(0, 256, (2, 3, 128, 96), generator=torch.Generator().manual_seed(1))
    detector = load_checkpoint(path).detector
    with torch.no_grad():
        probabilities, deltas = network(images.float())
        logits, own_deltas = detector(images)
    # The random networks' values are large: compare to the size of the largest.
    for ours, theirs in ((logits.sigmoid(), probabilities), (own_deltas, deltas)):
        assert theirs.std() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    return detector


@pytest.mark.parametrize("dilated", [False, True])
def test_the_authors_file_is_the_same_function(tmp_path, dilated):
    network = randomise(Detectron2Yolof(dilated))
    path = tmp_path / "YOLOF_R50.pth"
    torch.save({"model": network.state_dict(), "iteration": 22499}, path)
    detector = assert_same_function(network, path)
    assert detector.classes == COCO_CLASSES
    assert detector.anchor_sides == ((16,) if dilated else ()) + (32, 64, 128, 256, 512)
    assert detector.config.feature == ("DC5" if dilated else "C5")


@pytest.mark.parametrize("zipped", [True, False])
def test_mmdetection_s_file_is_the_same_function(tmp_path, zipped):
    network = randomise(MmdetYolof())
    path = tmp_path / "yolof_r50_c5.pth"
    content = {"meta": {"config": CAFFE, "epoch": 12}, "state_dict": network.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert assert_same_function(network, path).classes == COCO_CLASSES


def test_class_names_are_the_file_s_where_it_has_them():
    state = MmdetYolof(classes=2).state_dict()
    for meta in ({"CLASSES": ("cat", "dog")}, {"dataset_meta": {"classes": ["cat", "dog"]}}):
        content = convert_official({"meta": meta, "state_dict": state})
        assert content["classes"] == ["cat", "dog"]
    # Not those of another number of classes, nor COCO's.
    content = convert_official({"meta": {"CLASSES": ("cat",)}, "state_dict": state})
    assert content["classes"] == ["class 0", "class 1"]


def test_other_files_are_left_alone():
    assert convert_official(torch.zeros(3)) is None
    assert convert_official({"model": {"backbone.conv1.weight": torch.zeros(1)}}) is None


def without_a_block(state):
    return {k: t for k, t in state.items() if "layer3.5." not in k and "res4.5." not in k}


@pytest.mark.parametrize(
    ("change", "meta", "message"),
    [
        (without_a_block, {}, "has 5 blocks in its third stage"),
        (dict, {"config": "backbone=dict(style='pytorch')"}, "is not of Caffe's kind"),
        (lambda s: {k: t for k, t in s.items() if "conv1.weight" not in k}, {}, "is no ResNet"),
        (
            lambda s: s | {"pixel_mean": torch.tensor([0.0, 0.0, 0.0])},
            {},
            r"subtracts \[0\.0, 0\.0, 0\.0\]",
        ),
    ],
)
def test_what_would_be_another_function_is_refused(tmp_path, change, meta, message):
    state = change(MmdetYolof(classes=3).state_dict())
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pth")
