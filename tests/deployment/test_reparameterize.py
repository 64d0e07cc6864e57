import dataclasses

import pytest
import torch

from tinydet.config import Data
from tinydet.data.shapes import render_shapes
from tinydet.deployment import reparameterize
from tinydet.deployment.images import SampleImages, random_images
from tinydet.deployment.reparameterize import reparameterize_checkpoint
from tinydet.reparam.norms import count_norms
from tinydet.training.checkpoint import load_detector, read_checkpoint


def test_writes_a_deploy_checkpoint_that_finds_the_same(make_checkpoint, make_detector):
    source = make_checkpoint(make_detector())
    result = reparameterize_checkpoint(source)
    assert result.path == source.with_name("deploy.pt")
    assert result.report.norms_after == 0
    assert result.agreement.matched > 10
    assert "random images" in result.images
    content = read_checkpoint(result.path)
    assert content["form"] == "deploy"
    assert content["epoch"] == 3
    assert content["experiment"] == read_checkpoint(source)["experiment"]
    assert content["classes"] == ["circle", "square", "triangle"]
    folded, original = load_detector(result.path), load_detector(source)
    assert count_norms(folded) == 0
    images = random_images(2, (96, 160), seed=5)
    for a, b in zip(original.detect(images), folded.detect(images), strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(b.boxes, a.boxes, rtol=0, atol=1e-2)
        assert torch.equal(a.labels, b.labels)


def test_checks_on_test_images_when_they_are_there(make_checkpoint, make_detector, tmp_path):
    root = tmp_path / "shapes"
    render_shapes(root, num_train=2, num_test=3, image_size=96)
    detector = make_detector()
    data = Data(root=str(root), source="shapes", classes=(), image_size=96)
    result = reparameterize_checkpoint(make_checkpoint(detector, data), tmp_path / "out.pt")
    assert result.path == tmp_path / "out.pt"
    assert result.images.startswith("3 images of")
    assert any("3 images of" in line for line in result.lines())


@pytest.mark.parametrize("layer", ["cls_score", "box_delta"])
def test_refuses_to_write_a_detector_that_differs(
    make_checkpoint, make_detector, monkeypatch, layer
):
    right = reparameterize.fold

    def tampered(model, example):
        folded, report = right(model, example)
        getattr(folded.head, layer).bias.data += 0.01
        return folded, report

    monkeypatch.setattr(reparameterize, "fold", tampered)
    source = make_checkpoint(make_detector())
    with pytest.raises(ValueError, match="nothing was written"):
        reparameterize_checkpoint(source)
    assert [p.name for p in source.parent.iterdir()] == ["best.pt"]


_RAMP = torch.arange(416).repeat(320, 1)
PICTURES = {
    "grey": torch.full((3, 320, 416), 128),
    "black": torch.zeros(3, 320, 416),
    "gradient": torch.stack([_RAMP, 416 - _RAMP, 2 * _RAMP]) // 4,
    "noise": random_images(1, (320, 416))[0],
}


@pytest.fixture(scope="module")
def plain(make_detector):
    """A detector that finds nearly the same at all places, its folded form, and one more of it."""
    detector = make_detector()
    detector.config = dataclasses.replace(detector.config, candidates=1000, max_detections=100)
    with torch.no_grad():
        detector.head.cls_score.bias.fill_(0.5)
        for tower in (detector.head.cls_tower, detector.head.reg_tower):
            last = [m for m in tower if isinstance(m, torch.nn.BatchNorm2d)][-1]
            last.weight.mul_(1e-5)
            last.bias.uniform_(0.5, 1)
    return detector, *(reparameterize.fold_detector(detector)[0] for _ in range(2))


@pytest.mark.parametrize("picture", PICTURES)
def test_plain_pictures_are_no_difference_and_another_weight_is_one(plain, picture):
    detector, folded, other = plain
    images = SampleImages((PICTURES[picture].to(torch.uint8)[None].clone(),), picture, False)
    *_, agreement = reparameterize.check_same(detector, folded, images)
    assert agreement.matched > 50
    assert agreement.ties > 10
    with torch.no_grad():
        weight = other.head.cls_score.weight
        weight.copy_(folded.head.cls_score.weight)
        weight[0, 0, 1, 1] += 0.01
    with pytest.raises(ValueError, match="nothing was written"):
        reparameterize.check_same(detector, other, images)


def test_refuses_nan(make_checkpoint, make_detector, monkeypatch):
    right = reparameterize.fold

    def tampered(model, example):
        folded, report = right(model, example)
        folded.head.cls_score.bias.data[0] = float("nan")
        return folded, report

    monkeypatch.setattr(reparameterize, "fold", tampered)
    with pytest.raises(ValueError, match="nothing was written"):
        reparameterize_checkpoint(make_checkpoint(make_detector()))


def test_refuses_a_deploy_checkpoint_and_its_own_source(make_checkpoint, make_detector):
    source = make_checkpoint(make_detector())
    with pytest.raises(ValueError, match="source checkpoint"):
        reparameterize_checkpoint(source, source)
    deploy = reparameterize_checkpoint(source).path
    with pytest.raises(ValueError, match="already re-parameterized"):
        reparameterize_checkpoint(deploy)


def test_block_backbone(make_checkpoint, make_detector, detector):
    model = dataclasses.replace(detector.config, backbone="mobileone_s0")
    result = reparameterize_checkpoint(make_checkpoint(make_detector(model)))
    assert result.report.norms_after == 0
    assert result.report.params_after < 0.5 * result.report.params_before
    load_detector(result.path)
