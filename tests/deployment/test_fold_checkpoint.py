import dataclasses

import pytest
import torch

from tinydet.config import Data, Model
from tinydet.data.shapes import render_shapes
from tinydet.deployment import fold_checkpoint as module
from tinydet.deployment.fold_checkpoint import check_equivalent, fold_checkpoint, fold_detector
from tinydet.deployment.images import SampleImages, random_images
from tinydet.reparam.norms import count_norms
from tinydet.training.checkpoint import load_checkpoint, read_checkpoint


@pytest.fixture
def source(make_checkpoint, detector):
    return make_checkpoint(detector)


def test_writes_a_deploy_checkpoint_that_finds_the_same(source):
    result = fold_checkpoint(source)
    assert result.path == source.with_name("deploy.pt")
    assert result.report.norms_after == 0
    assert result.equivalence.detections.matched > 10
    assert "random images" in result.images
    content = read_checkpoint(result.path)
    assert content["form"] == "deploy"
    assert content["epoch"] == 3
    assert content["experiment"] == read_checkpoint(source)["experiment"]
    assert content["classes"] == ["circle", "square", "triangle"]
    folded, original = (load_checkpoint(path).detector for path in (result.path, source))
    assert count_norms(folded) == 0
    images = random_images(2, (96, 160), seed=5)
    for a, b in zip(original.detect(images), folded.detect(images), strict=True):
        assert len(a.scores) > 3
        torch.testing.assert_close(b.scores, a.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(b.boxes, a.boxes, rtol=0, atol=1e-2)
        assert torch.equal(a.labels, b.labels)


def test_the_source_is_read_once(source, monkeypatch):
    read, torch_load = [], torch.load

    def load(path, **options):
        read.append(path)
        return torch_load(path, **options)

    monkeypatch.setattr(torch, "load", load)
    fold_checkpoint(source)
    assert read == [source]


def test_checks_on_test_images_when_they_are_there(make_checkpoint, detector, tmp_path):
    root = tmp_path / "shapes"
    render_shapes(root, num_train=2, num_test=3, image_size=96)
    data = Data(root=str(root), source="shapes", classes=(), image_size=96)
    result = fold_checkpoint(make_checkpoint(detector, data), tmp_path / "out.pt")
    assert result.path == tmp_path / "out.pt"
    assert result.images.startswith("3 images of")
    assert any("3 images of" in line for line in result.lines())


def test_a_moved_data_set_is_warned_of_and_can_be_named(
    make_checkpoint, detector, tmp_path, caplog
):
    gone = Data(root=str(tmp_path / "gone"), source="shapes", classes=(), image_size=96)
    source = make_checkpoint(detector, gone)
    fold_checkpoint(source)
    assert "checked on random images: " in caplog.text
    assert "--set data.root=FOLDER" in caplog.text
    caplog.clear()
    root = tmp_path / "shapes"
    render_shapes(root, num_train=2, num_test=3, image_size=96)
    result = fold_checkpoint(source, overrides=[f"data.root={root}"])
    assert result.images.startswith("3 images of")
    experiment = load_checkpoint(source).experiment
    named = dataclasses.replace(
        experiment, data=dataclasses.replace(experiment.data, root=str(root))
    )
    result = fold_checkpoint(source, experiment=named)
    assert result.images.startswith("3 images of")
    assert "random images" not in caplog.text
    # What is exported next is checked on them too.
    assert load_checkpoint(result.path).experiment.data.root == str(root)


@pytest.mark.parametrize("layer", ["cls_score", "box_delta"])
@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_refuses_to_write_a_detector_that_differs(source, monkeypatch, layer, change):
    right = module.fold

    def tampered(model, example):
        folded, report = right(model, example)
        getattr(folded.head, layer).bias.data += change
        return folded, report

    monkeypatch.setattr(module, "fold", tampered)
    with pytest.raises(ValueError, match="nothing was written"):
        fold_checkpoint(source)
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
    model = Model(
        backbone="mobilenetv3_small_050",
        weights="random",
        encoder_channels=32,
        encoder_mid_channels=16,
        dilations=(2, 4),
        candidates=1000,
        max_detections=100,
    )
    detector = make_detector(model)
    with torch.no_grad():
        detector.head.cls_score.bias.fill_(0.5)
        for tower in (detector.head.cls_tower, detector.head.reg_tower):
            last = [m for m in tower if isinstance(m, torch.nn.BatchNorm2d)][-1]
            last.weight.mul_(1e-5)
            last.bias.uniform_(0.5, 1)
    forms = [fold_detector(detector)[0] for _ in range(2)]
    with torch.no_grad():
        for form in forms:
            # Some CPUs round both forms alike: make the differences that others make.
            weight = form.head.cls_score.weight
            weight.mul_(
                1 + 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            )
    return detector, *forms


@pytest.mark.parametrize("picture", PICTURES)
def test_plain_pictures_are_no_difference_and_another_weight_is_one(plain, picture):
    detector, folded, other = plain
    images = SampleImages((PICTURES[picture].to(torch.uint8)[None].clone(),), picture, False)
    agreement = check_equivalent(detector, folded, images).detections
    assert agreement.matched > 50
    assert agreement.ties > 10
    with torch.no_grad():
        weight = other.head.cls_score.weight
        weight.copy_(folded.head.cls_score.weight)
        weight[0, 0, 1, 1] += 0.01
    with pytest.raises(ValueError, match="nothing was written"):
        check_equivalent(detector, other, images)


def test_refuses_a_deploy_checkpoint_and_its_own_source(source):
    with pytest.raises(ValueError, match="itself"):
        fold_checkpoint(source, source)
    deploy = fold_checkpoint(source).path
    with pytest.raises(ValueError, match="already folded"):
        fold_checkpoint(deploy)


@pytest.mark.slow
def test_block_backbone(make_checkpoint, make_detector, detector):
    model = dataclasses.replace(detector.config, backbone="mobileone_s0")
    result = fold_checkpoint(make_checkpoint(make_detector(model)))
    assert result.report.norms_after == 0
    assert result.report.params_after < 0.5 * result.report.params_before
    load_checkpoint(result.path)
