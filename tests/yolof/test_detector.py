"""The whole detector, with a stub for a backbone where its numbers are the reference's."""

import typing
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import nms

from tinydet.config import ConfigError, Model
from tinydet.reparam.branches import BLOCKS
from tinydet.reparam.expand import expanded_names
from tinydet.yolof.build import build_detector
from tinydet.yolof.detector import Detector

CLASSES = tuple(f"class{i}" for i in range(20))


class Features(nn.Module):
    """Stands in for a backbone: always the same feature map."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.seen = None

    def forward(self, x):
        self.seen = x
        return [self.features[: len(x)]]


@pytest.fixture
def detector(head, reference):
    features = Features(reference["head"]["x"])
    mean, std = (0.5, 0.25, 0.75), (0.1, 0.2, 0.4)
    return Detector(features, nn.Identity(), head, CLASSES, 32, mean, std, Model()).eval()


def images(count=2):
    return torch.randint(0, 256, (count, 3, 320, 416), dtype=torch.uint8)


def targets_of(reference, scenario):
    part = reference["head"]["gt"][scenario]
    return [{"boxes": b, "labels": c} for b, c in zip(part["boxes"], part["labels"], strict=True)]


def test_pixels_are_normalized_with_the_mean_and_deviation_of_the_backbone(detector):
    pixels = images()
    for x in (pixels, pixels.float()):
        detector(x)
        mean = torch.tensor([0.5, 0.25, 0.75]).reshape(3, 1, 1)
        std = torch.tensor([0.1, 0.2, 0.4]).reshape(3, 1, 1)
        expected = (pixels.float() / 255 - mean) / std
        torch.testing.assert_close(detector.backbone.seen, expected, rtol=1e-5, atol=1e-5)


def test_anchors_are_the_reference(detector, reference):
    assert detector.anchor_sides == (32, 64, 128, 256, 512)
    torch.testing.assert_close(detector.anchors((320, 416)), reference["anchors"])


@pytest.mark.parametrize("scenario", ["tiny_huge_empty", "five_one"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_losses_are_the_reference(detector, reference, mode, scenario):
    losses, _ = detector.train(mode == "train")(images(), targets_of(reference, scenario))
    assert sorted(losses) == ["loss_box", "loss_cls"]
    actual = torch.stack([losses["loss_cls"], losses["loss_box"]]).detach()
    expected = reference["head"][mode]["scenarios"][scenario]["loss"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_same(found, expected):
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.labels, expected["labels"])
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=1e-4, atol=1e-2)


def test_detections_in_original_pixels_are_the_reference(detector, reference):
    part = reference["head"]["predict"]
    sizes = [tuple(meta["ori_shape"]) for meta in part["metas"]]
    scales = [tuple(meta["scale_factor"]) for meta in part["metas"]]
    assert scales[1] == (0.5, 0.5)
    for found, expected in zip(
        detector.detect(images(), sizes, scales), part["rescaled"], strict=True
    ):
        assert_same(found, expected)


def test_detections_in_network_pixels_are_the_reference(detector, reference):
    # The second image of the reference is clipped to a smaller size than the batch has.
    part = reference["head"]["predict"]
    sizes = [tuple(meta["img_shape"]) for meta in part["metas"]]
    assert sizes[0] != sizes[1]
    for found, expected in zip(detector.detect(images(), sizes), part["plain"], strict=True):
        assert_same(found, expected)


def test_scale_is_height_first(detector):
    plain, scaled = detector.detect(images(1))[0], detector.detect(images(1), None, [(2.0, 0.5)])[0]
    torch.testing.assert_close(scaled.boxes, plain.boxes / torch.tensor([0.5, 2, 0.5, 2]))


def test_detect_leaves_no_gradient_and_no_box_outside_or_empty(detector):
    # Most of the input is padding here, and some boxes lie in it entirely.
    plain = detector.detect(images())
    assert any((found.boxes[:, :2] >= torch.tensor([300, 140])).any() for found in plain)
    for found in detector.detect(images(), [(140, 300)] * 2, [(1.0, 1.0)] * 2):
        assert len(found.scores) > 0
        assert not found.boxes.requires_grad
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([300, 140, 300, 140])).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_a_box_in_the_padding_takes_no_place(detector):
    size, scale = [(140, 300)] * 2, [(1.0, 1.0)] * 2
    every = detector.detect(images(), size, scale)
    # The best of all lie in the padding of one of the images.
    detector.config = replace(detector.config, max_detections=1)
    corners = torch.tensor([300, 140])
    assert any((found.boxes[:, :2] >= corners).any() for found in detector.detect(images()))
    for found, expected in zip(detector.detect(images(), size, scale), every, strict=True):
        assert torch.equal(found.boxes, expected.boxes[:1])


@pytest.mark.parametrize(
    "change",
    [
        {"match_topk": 1},
        {"match_pos_ignore": 0.5},
        {"match_neg_ignore": 0.2},
        {"center_clamp": 4.0},
        {"anchor_scales": (1.5, 2.0, 4.0, 8.0, 16.0)},
    ],
)
def test_losses_follow_the_configuration(detector, reference, change):
    targets = targets_of(reference, "five_one")
    before = torch.stack(list(detector(images(), targets)[0].values()))
    detector.config = replace(detector.config, **change)
    after = torch.stack(list(detector(images(), targets)[0].values()))
    assert not torch.equal(before, after)


def test_detections_follow_the_configuration(detector):
    def count(**change):
        detector.config = replace(Model(), **change)
        return len(detector.detect(images(1))[0].scores)

    assert count(score_threshold=0.055) < count()
    assert count(max_detections=2) == 2
    assert count(candidates=3) <= 3
    assert count(nms_iou=0.01) < count(nms_iou=1.0)


SMALL = Model(
    backbone="mobilenetv3_small_050",
    weights="random",
    encoder_channels=32,
    encoder_mid_channels=8,
    dilations=(1, 2),
    cls_convs=1,
    reg_convs=1,
    anchor_scales=(1.0, 2.0),
)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return build_detector(SMALL, ("cat", "dog", "cow"))


def test_built_detector_has_the_shapes_and_classes_asked_for(small):
    assert small.training
    assert small.classes == ("cat", "dog", "cow")
    assert small.stride == 32
    cls_logits, deltas = small(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert cls_logits.shape == (2, 2 * 3 * 2, 3)
    assert deltas.shape == (2, 2 * 3 * 2, 4)


def test_every_parameter_learns_and_losses_are_finite(small):
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    small.zero_grad()
    losses, _ = small.train()(pixels, targets)
    sum(losses.values()).backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_detections_do_not_depend_on_the_batch(small):
    small.eval()
    pixels = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    together = small(pixels)
    for i in range(3):
        for whole, single in zip(together, small(pixels[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i], single[0], rtol=1e-4, atol=1e-4)


def _exact_nms(found, boxes, iou):
    """Class by class, in float64, with torchvision's plain NMS."""
    kept = []
    for label in found.labels.unique():
        (own,) = (found.labels == label).nonzero(as_tuple=True)
        kept += own[nms(boxes[own].double(), found.scores[own].double(), iou)].tolist()
    return sorted(kept)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(2))
def test_selection_is_the_same_alone_and_in_a_batch_bit_by_bit(seed, device):
    torch.manual_seed(seed)
    # 32 images of 800x1344 and 80 classes, of which a few have boxes enough to overlap.
    config = replace(SMALL, candidates=600, max_detections=600, anchor_scales=(4.0, 5.0))
    detector = Detector(*[nn.Identity()] * 3, range(80), 32, [0] * 3, [1] * 3, config)
    detector.to(device)
    logits = torch.full((32, 25 * 42 * 2, 80), -9.0)
    logits[..., [0, 7, 78, 79]] = torch.randn(32, 25 * 42 * 2, 4)
    deltas = 0.1 * torch.randn(32, 25 * 42 * 2, 4)
    logits, deltas = logits.to(device), deltas.to(device)
    together = detector.select(logits, deltas, (800, 1344))
    detector.config = replace(config, nms_iou=1.0)  # What goes into NMS.
    every = detector.select(logits, deltas, (800, 1344))
    detector.config = config
    dropped = 0
    for i, (found, candidates) in enumerate(zip(together, every, strict=True)):
        (alone,) = detector.select(logits[i : i + 1], deltas[i : i + 1], (800, 1344))
        kept = _exact_nms(candidates, candidates.boxes, config.nms_iou)
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(found, name), getattr(alone, name))
            assert torch.equal(getattr(found, name), getattr(candidates, name)[kept])
        dropped += len(candidates.scores) - len(kept)
    assert dropped > 300


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 9), st.booleans())
def test_selection_of_any_shape_is_the_same_alone_and_in_a_batch(seed, batch, classes, ties):
    torch.manual_seed(seed)
    config = replace(SMALL, candidates=20, score_threshold=0.1)
    detector = Detector(*[nn.Identity()] * 3, range(classes), 32, [0] * 3, [1] * 3, config)
    logits, deltas = torch.randn(batch, 30, classes), torch.randn(batch, 30, 4)
    if ties:
        logits = logits.round()
    for i, found in enumerate(detector.select(logits, deltas, (96, 160))):
        (alone,) = detector.select(logits[i : i + 1], deltas[i : i + 1], (96, 160))
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(found, name), getattr(alone, name))


def test_the_blocks_of_the_configuration_are_those_there_are():
    choices = typing.get_args(typing.get_type_hints(Model)["expand"])
    assert choices == ("none", *BLOCKS)


@pytest.mark.parametrize("online", [False, True])
def test_the_backbone_alone_is_expanded_with_its_loaded_weights(tmp_path, online):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model(SMALL.backbone).state_dict(), weights)
    config = replace(SMALL, weights=str(weights))
    plain = build_detector(config, CLASSES).backbone
    where = "5x5 depthwise blocks.[23]"
    config = replace(config, expand="dbb", expand_where=where, expand_online=online)
    detector = build_detector(config, CLASSES)
    names = expanded_names(detector)
    assert names
    assert all(name.startswith(("backbone.blocks.2.", "backbone.blocks.3.")) for name in names)
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(detector.backbone(pixels), plain(pixels))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expand_where": "3x3"}, r"model\.expand_where=3x3: has no effect .*model\.expand=dbb"),
        ({"expand_online": True}, r"model\.expand_online=true: has no effect .*model\.expand=dbb"),
        ({"expand_scale": 1.0}, r"model\.expand_scale=1\.0: has no effect .*model\.expand=dbb"),
        (
            {"expand": "dbb", "expand_where": "9x9"},
            r"model\.expand=dbb, model\.expand_where: where='9x9' selects none of the",
        ),
        (
            {"expand": "acnet", "expand_where": "1x1", "expand_online": True},
            "grows on none of the",
        ),
    ],
)
def test_an_expansion_that_means_nothing_is_refused_in_one_line(changes, says):
    config = replace(SMALL, **changes)
    with pytest.raises(ConfigError, match=says) as error:
        build_detector(config, CLASSES)
    assert "\n" not in str(error.value)
