from pathlib import Path

import pytest
import torch

from tinydet.experiment_file import load_experiment
from tinydet.training.optim import make_optimizer, make_plan
from tinydet.yolof.detector import build_detector

FILES = sorted((Path(__file__).resolve().parents[1] / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_builds_and_takes_a_step_that_lowers_its_loss(path):
    torch.manual_seed(0)
    experiment = load_experiment(path, ["model.weights=random"])
    detector = build_detector(experiment.model, experiment.data.classes or ("a", "b"))
    images = torch.randint(0, 256, (4, 3, 128, 160), dtype=torch.uint8)
    targets = [
        {"boxes": torch.tensor([[10.0, 20, 90, 100]]), "labels": torch.tensor([1])},
        {
            "boxes": torch.tensor([[40.0, 4, 150, 60], [0, 0, 30, 30]]),
            "labels": torch.tensor([0, 1]),
        },
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": torch.tensor([[60.0, 60, 120, 120]]), "labels": torch.tensor([0])},
    ]
    plan = make_plan(experiment.optim, 4, 100)
    optimizer, schedule = make_optimizer(detector, experiment.optim, plan)
    losses = []
    for _ in range(8):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()


def test_the_default_experiment_is_the_reference_recipe():
    # arXiv 2103.09460 and its reference code: SGD 0.12 for 64 images (0.03 for 16), and so on.
    experiment = load_experiment(FILES[0].parent / "rexnet_yolof.py")
    optim, model = experiment.optim, experiment.model
    assert optim.lr / optim.base_batch == pytest.approx(0.12 / 64)
    assert (optim.momentum, optim.weight_decay, optim.warmup_iters) == (0.9, 1e-4, 1500)
    assert optim.backbone_lr_factor == pytest.approx(1 / 3)
    assert optim.milestones == pytest.approx((8 / 12, 11 / 12))
    assert (model.encoder_channels, model.encoder_mid_channels) == (512, 128)
    assert (model.dilations, model.cls_convs, model.reg_convs) == ((2, 4, 6, 8), 2, 4)
    assert (model.match_topk, model.match_pos_ignore, model.match_neg_ignore) == (4, 0.15, 0.7)
    assert (model.center_clamp, model.score_threshold, model.nms_iou) == (32, 0.05, 0.6)
    assert (model.candidates, model.max_detections) == (1000, 100)
    assert [32 * s for s in model.anchor_scales] == [32, 64, 128, 256, 512]
