import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import nn

from tinydet.config import ConfigError, Experiment, Model
from tinydet.reparam import fold
from tinydet.training.checkpoint import save_checkpoint
from tinydet.yolof.build import build_detector

PLAIN = Model(
    "test_resnet", "random", encoder_channels=16, encoder_mid_channels=8, cls_convs=1, reg_convs=1
)
CLASSES = ("cat", "dog", "cow")


def write(path, config=PLAIN, classes=CLASSES, form="training"):
    """Write the checkpoint of a detector with norms that have learned; return the detector."""
    torch.manual_seed(1)
    detector = build_detector(config, classes)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(tensor, low, high)
    nn.init.normal_(detector.head.cls_score.weight, std=0.1)
    detector.eval()
    saved = fold(detector, images(1))[0] if form == "deploy" else detector
    content = {
        "form": form,
        "experiment": dataclasses.asdict(Experiment(model=config)),
        "classes": list(classes),
        "model": saved.state_dict(),
        "epoch": 1,
    }
    save_checkpoint(path, content)
    return detector


def images(count=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, 96, 64), generator=generator)


def start(path, config=PLAIN, classes=CLASSES):
    torch.manual_seed(3)
    return build_detector(replace(config, weights=str(path)), classes).eval()


def assert_same(one, two, classes=None):
    """Compare raw outputs, of the given label columns of each."""
    with torch.no_grad():
        (logits, deltas), (other_logits, other_deltas) = one(images()), two(images())
    columns, other_columns = classes or ([0, 1, 2], [0, 1, 2])
    torch.testing.assert_close(
        logits[..., columns], other_logits[..., other_columns], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(deltas, other_deltas, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["training", "deploy"])
@pytest.mark.parametrize("branches", [{}, {"expand": "dbb", "expand_where": "3x3"}])
def test_with_the_same_classes_the_whole_detector_is_taken(tmp_path, form, branches):
    original = write(tmp_path / "a.pt", replace(PLAIN, **branches), form=form)
    # Into a detector with these branches, and into one without.
    for config in (replace(PLAIN, **branches), PLAIN):
        assert_same(original, start(tmp_path / "a.pt", config))


@pytest.mark.parametrize(
    "change",
    [
        {"expand": "repvgg", "expand_online": True, "expand_scale": 1.0},
        {"expand": "acnet"},
        {"freeze_norms": True},
        {"freeze_stages": 2},
    ],
)
def test_modifications_that_keep_the_function_start_from_it(tmp_path, change):
    original = write(tmp_path / "a.pt")
    assert_same(original, start(tmp_path / "a.pt", replace(PLAIN, **change)))


def test_activations_that_learned_are_taken_where_there_are_the_same(tmp_path):
    config = replace(PLAIN, activation="acon-c")
    torch.manual_seed(0)
    original = write(tmp_path / "a.pt", config)
    for name, parameter in original.named_parameters():
        if name.endswith(("p1", "p2", "beta")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    save_checkpoint(tmp_path / "a.pt", content | {"model": original.state_dict()})
    assert_same(original, start(tmp_path / "a.pt", config))


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_class_scores_go_by_name(tmp_path, caplog, form):
    original = write(tmp_path / "a.pt", form=form)
    with caplog.at_level("INFO", logger="tinydet"):
        loaded = start(tmp_path / "a.pt", classes=("bird", "cow", "cat", "fish"))
    assert_same(original, loaded, ([2, 0], [1, 2]))
    initial = build_detector(PLAIN, ("a",)).head.cls_score.bias[0]
    bias = loaded.head.cls_score.bias.reshape(5, 4)
    assert torch.all(bias[:, [0, 3]] == initial)
    (line,) = [m for m in caplog.messages if "a detector of 3 classes" in m]
    assert "2 of 4 classes keep their scores, not bird, fish" in line


def test_what_does_not_fit_is_counted_and_stays_initial(tmp_path, caplog):
    original = write(tmp_path / "a.pt")
    other = replace(PLAIN, encoder_mid_channels=12, anchor_scales=(1.0, 2.0))
    with caplog.at_level("INFO", logger="tinydet"):
        loaded = start(tmp_path / "a.pt", other)
    theirs, ours = original.state_dict(), loaded.state_dict()
    for name in ours:
        fits = ours[name].shape == theirs[name].shape
        if "num_batches" not in name and "cls_score" not in name:
            assert torch.equal(ours[name], theirs[name]) if fits else True, name
    wanted = [n for n in ours if not n.startswith(("backbone.", "head.cls_score."))]
    fitting = sum(ours[name].shape == theirs[name].shape for name in wanted)
    (line,) = [m for m in caplog.messages if "a detector of 3 classes" in m]
    assert f"{fitting} of the {len(wanted)} tensors of encoder and head fit (not e.g. " in line
    assert "0 of 3 classes keep their scores, not cat, dog, cow" in line


def test_another_backbone_whose_tensors_fit_is_named(tmp_path, caplog):
    write(tmp_path / "a.pt", replace(PLAIN, backbone="resnet50_caffe"))
    with caplog.at_level("INFO", logger="tinydet"):
        start(tmp_path / "a.pt", replace(PLAIN, backbone="resnet50.a1_in1k"))
    assert "but is resnet50_caffe, which may compute something else" in caplog.text


def test_another_backbone_is_refused(tmp_path):
    write(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a\.pt.* for timm's mobilenetv3_small_050: .* Is the"):
        start(tmp_path / "a.pt", replace(PLAIN, backbone="mobilenetv3_small_050"))


def test_a_deploy_form_that_lost_its_backbone_s_branches_is_refused(tmp_path):
    config = replace(PLAIN, backbone="repvgg_a0")
    write(tmp_path / "a.pt", config, form="deploy")
    with pytest.raises(ConfigError, match="lost layers that training needs"):
        start(tmp_path / "a.pt", config)


def test_a_state_dict_alone_gives_the_backbone(tmp_path):
    original = write(tmp_path / "a.pt")
    torch.save(original.state_dict(), tmp_path / "b.pt")
    loaded = start(tmp_path / "b.pt")
    for name, tensor in original.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], tensor), name
