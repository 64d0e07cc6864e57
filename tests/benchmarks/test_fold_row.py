import copy
import dataclasses

import fold_row
import pytest
import torch
from fold_row import fold_one
from torch import nn
from zoo_models import input_sizes

from tinydet.reparam import fold


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norms", "left", "branches", "scales"),
    [
        # Batch norms that run, those that no linear layer can take, additions of parallel linear
        # branches, and constant scales after a conv or linear layer.
        ("test_maxvit", 13, 0, 0, 0),
        ("repvgg_a0", 61, 0, 39, 0),
        ("fastvit_t8", 68, 0, 49, 10),
        ("repghostnet_050", 87, 1, 24, 0),
        ("efficientvit_m0", 112, 0, 16, 0),
        ("lcnetv2_small", 37, 0, 10, 0),
        ("mixnet_s", 48, 0, 0, 0),
        ("inception_next_atto", 16, 0, 0, 12),
        ("swiftformer_xs", 25, 0, 0, 24),
        ("resnetv2_18", 16, 8, 0, 0),
        ("mobilevit_xxs", 32, 0, 0, 0),
    ],
)
def test_fold_one__sample_of_the_zoo(name, norms, left, branches, scales):
    row = fold_one(name)
    assert not row.problem
    assert row.norms_before - row.norms_never >= norms
    assert row.norms_after - row.norms_never - _never_run(row) <= left
    assert row.branches_before >= branches
    assert row.branches_after == 0
    assert row.scales_before >= scales
    assert row.scales_after == 0
    assert 0 < row.params_after <= row.params_before
    assert 0 < row.macs_after <= row.macs_before


def _never_run(row):
    return sum(count for reason, count in row.kept.items() if "runs 0 times" in reason)


def test_fold_one__counts_reasons_without_names():
    row = fold_one("test_vit")
    assert row.kept == {"LayerNorm computes its statistics from each input": row.norms_before}
    assert row.norms_never == row.norms_after == row.norms_before


@pytest.mark.slow
def test_a_model_that_insists_on_its_size_gets_it(monkeypatch):
    monkeypatch.setattr(fold_row, "input_sizes", lambda name: [100, input_sizes(name)[0]])
    row = fold_one("test_maxvit")
    assert not row.problem
    assert row.input == 160
    assert row.other_sizes == ()
    monkeypatch.setattr(fold_row, "input_sizes", lambda _: [100])
    assert fold_one("test_maxvit").error


class _Wrong(nn.Module):
    """Off by a little, on inputs of some kind only."""

    def __init__(self, network, when, by):
        super().__init__()
        self.network, self.when, self.by = network, when, by

    def forward(self, x):
        maps = list(self.network(x))
        if self.when(x):
            maps[0] = maps[0] + self.by * maps[0].abs().max()
        return maps


@pytest.fixture(scope="module")
def folded_resnet():
    """The fold of test_resnet as `fold_one` asks for it, and what it reports."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold_row, "fold", lambda *given: asked.append(given) or fold(*given))
        row = fold_one("test_resnet")
    assert not row.problem
    assert (row.norms_before, row.norms_after, row.unexplained) == (15, 0, 0)
    assert 0 < row.params_after < row.params_before
    (model, images), _ = asked
    assert row.changed_again == 0
    assert row.cpu_seconds > 0
    assert row.float64_mb == pytest.approx(3.0, abs=0.1)
    assert row.other_sizes == ((160, 192), (123, 131), (96, 112))
    return model, *fold(model, images)


@pytest.mark.parametrize(
    ("when", "by", "problem"),
    [
        (lambda x: x.dtype == torch.float64, 1e-8, "differs by 1.0e-08 in float64"),
        (lambda x: len(x) == 1 and x.shape[2] == 128, 1e-8, "differs by 1.0e-08 in float64"),
        (lambda x: x.shape[2] > 128, 1e-8, "differs by 1.0e-08 in float64"),
        (lambda x: x.shape[2] == 123, 1e-8, "differs by 1.0e-08 in float64"),
        (lambda x: x.shape[2] == 96, 1e-8, "differs by 1.0e-08 in float64"),
        (lambda x: x.dtype == torch.float32, 2e-4, "differs by 2.0e-04 in float32 (unfolded: "),
    ],
    ids=["float64", "other batch", "larger", "odd", "smaller", "float32"],
)
def test_fold_one__a_wrong_fold_is_a_problem(monkeypatch, folded_resnet, when, by, problem):
    _, folded, report = folded_resnet
    wrong = _Wrong(copy.deepcopy(folded), when, by)
    monkeypatch.setattr(fold_row, "fold", lambda *_: (wrong, report))
    row = fold_one("test_resnet")
    assert not row.error
    assert row.problem.startswith(problem)


def test_fold_one__a_changed_weight_is_a_problem(monkeypatch, folded_resnet):
    _, folded, report = folded_resnet
    folded = copy.deepcopy(folded)
    first = next(m for m in folded.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        first.weight[0, 0, 0, 0] *= 1 + 1e-5
    monkeypatch.setattr(fold_row, "fold", lambda *_: (folded, report))
    assert fold_one("test_resnet").error64 > 1e-9


def test_fold_one__a_norm_left_without_reason_is_a_problem(monkeypatch, folded_resnet):
    model, _, report = folded_resnet
    report = dataclasses.replace(report, kept=())
    monkeypatch.setattr(fold_row, "fold", lambda *_: (model, report))
    assert fold_one("test_resnet").problem.startswith("15 norms stay without a reason")


def test_fold_one__what_folds_again_is_a_problem(monkeypatch, folded_resnet):
    _, folded, report = folded_resnet
    monkeypatch.setattr(fold_row, "fold", lambda *_: (folded, report))
    changes = len(report.folded)
    assert changes > 0
    assert fold_one("test_resnet").problem == f"folding again changes {changes} modules"


class _Detector(nn.Module):
    """Takes a list of images of any sizes and returns the cell with the highest score of each."""

    def __init__(self, channels=8):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.score, self.box = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, 4, 1)

    def forward(self, images):
        maps = self.backbone(torch.stack(images))
        scores, boxes = self.score(maps).flatten(1), self.box(maps).flatten(2)
        best = scores.argmax(1)
        return [
            {"scores": score[i : i + 1], "boxes": box[:, i]}
            for score, box, i in zip(scores, boxes, best.tolist(), strict=True)
        ]


@pytest.fixture
def detector(monkeypatch):
    """Makes `fold_one` build `_Detector`."""

    def example_inputs(_, batch, height, width):
        generator = torch.Generator().manual_seed(height)
        return ([torch.randn(3, height, width, generator=generator) for _ in range(batch)],)

    monkeypatch.setattr(fold_row, "build_model", lambda *_: _Detector().eval())
    monkeypatch.setattr(fold_row, "input_sizes", lambda _: [64])
    monkeypatch.setattr(fold_row, "example_inputs", example_inputs)
    monkeypatch.setattr(fold_row, "family_of", lambda _: "none")


@pytest.mark.usefixtures("detector")
def test_fold_one__a_detector():
    row = fold_one("any")
    assert not row.problem
    assert (row.norms_before, row.norms_after) == (1, 0)
    assert 0 < row.error32 < 1e-5
    assert row.other_sizes == ((96, 128), (59, 67), (32, 48))


@pytest.mark.usefixtures("detector")
@pytest.mark.parametrize("where", ["boxes", "maps"])
def test_fold_one__a_wrong_detector_is_a_problem(monkeypatch, where):
    class Wrong(nn.Module):
        def __init__(self, detector):
            super().__init__()
            self.backbone, self.detector = detector.backbone, detector

        def forward(self, images):
            found = self.detector(images)
            if where == "boxes":
                found[-1]["boxes"] = found[-1]["boxes"] + 1
            return found

    right = fold_row.fold

    def fold(*given):
        folded, report = right(*given)
        if where == "maps":  # The one that is hidden from the detections.
            folded.backbone.register_forward_hook(lambda *args: args[-1] * (1 + 1e-7))
        return Wrong(folded).eval(), report

    monkeypatch.setattr(fold_row, "fold", fold)
    assert "in float64" in fold_one("any").problem


def test_fold_one__an_exception_is_a_row(monkeypatch):
    def fold(*_):
        raise KeyError("two\nlines")

    monkeypatch.setattr(fold_row, "fold", fold)
    row = fold_one("test_resnet")
    assert row.problem == row.error == r"KeyError: 'two\nlines'"
    assert (row.model, row.family) == ("test_resnet", "resnet")
