import re
import time
from dataclasses import replace

import pytest

from tinydet.data.sources import TrainingImages
from tinydet.training.profile import profile_training, time_steps


def test_a_profile_tells_of_every_part_and_leaves_no_run(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = replace(tiny_experiment.train, batch_size=3)
    profile = profile_training(replace(tiny_experiment, train=settings), steps=3, turns=2)
    told = "\n".join(profile.lines())
    assert (profile.turns, profile.steps, profile.images, profile.size) == (2, 3, 3, (96, 96))
    assert profile.loop > profile.waiting > 0
    assert profile.bare > max(profile.parts.values())
    for word in ("loop", "waiting", "bare step", "forward", "losses", "backward", "optimizer"):
        assert word in told
    assert "3 images a batch" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_waiting_for_data_is_told_apart(tiny_experiment, monkeypatch):
    read = TrainingImages.read

    def slowly(images, i):
        time.sleep(0.1)
        return read(images, i)

    monkeypatch.setattr(TrainingImages, "read", slowly)
    settings = replace(tiny_experiment.train, batch_size=3)
    told = "\n".join(profile_training(replace(tiny_experiment, train=settings), 2).lines())
    figures = dict(re.findall(r"^\s*(\w+(?: step)?) +([\d.]+) (?:ms|img)", told, re.MULTILINE))
    assert float(figures["waiting"]) >= 300
    assert float(figures["loop"]) >= 300 + float(figures["bare step"]) / 2
    parts = sum(float(figures[name]) for name in ("forward", "losses", "backward", "optimizer"))
    assert parts == pytest.approx(float(figures["bare step"]), rel=0.5)
    assert float(figures["loader"]) <= 10


def test_too_few_steps_are_told(tiny_experiment):
    with pytest.raises(ValueError, match="an epoch has 3 steps"):
        profile_training(tiny_experiment, steps=3)


@pytest.mark.parametrize("steps", [1, 5])
def test_steps_are_timed_over_as_many_epochs_as_it_takes(tiny_experiment, steps, monkeypatch):
    read = TrainingImages.read

    def slowly(images, i):
        time.sleep(0.02)
        return read(images, i)

    monkeypatch.setattr(TrainingImages, "read", slowly)
    timed = time_steps(tiny_experiment, steps)  # of 8 images, 3 an epoch
    assert (timed.steps_an_epoch, timed.dtype, timed.memory_format) == (3, "float32", "contiguous")
    assert timed.seconds >= 8 * 0.02
