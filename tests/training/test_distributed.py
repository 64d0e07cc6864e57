import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinydet.config import ConfigError
from tinydet.training import distributed
from tinydet.training.results import write_experiment

SCRIPT = Path(__file__).with_name("run_in_processes.py")
PROCESSES = 3  # which do not divide the 8 images of the split


def _script():
    spec = importlib.util.spec_from_file_location("run_in_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def told(tiny_experiment, tmp_path_factory):
    """What each process wrote."""
    folder = tmp_path_factory.mktemp("processes")
    write_experiment(folder, tiny_experiment)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), str(SCRIPT)]
    done = subprocess.run(
        [*command, str(folder / "experiment.json"), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        (json.loads((folder / f"{n}.json").read_text()), torch.load(folder / f"{n}.pt"))
        for n in range(PROCESSES)
    ]


def test_three_processes_learn_what_one_learns_from_the_whole_batch(told):
    losses, weights = _script().learn()
    assert len(set(losses)) > 1
    for said, found in told:
        assert said["losses"] == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)
            assert torch.equal(found[name], told[0][1][name]), name


def test_a_split_evaluated_in_three_processes_has_the_numbers_of_one(told, tiny_experiment):
    expected = _script().score(tiny_experiment.data)
    assert expected["images"] == 8
    assert expected["AP50"] > 0
    for said, _ in told:
        assert said["metrics"] == expected


def test_what_processes_tell_one_another(told):
    for n, (said, _) in enumerate(told):
        assert said["rank"] == n
        assert said["made"] == "by 0"
        assert said["failed"] == "the first process failed"
        assert said["gathered"] == {"of 0": 0, "of 1": 1, "of 2": 2}
        assert said["mean"] == [1.0, 4.0]
        assert said["any"] == [True, True, False]


def test_a_single_process_needs_no_group():
    with distributed.process_group("auto") as device:
        assert device == "auto"
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.from_first(lambda: 3) == 3
    assert distributed.gathered({"a": 1}) == {"a": 1}
    assert not distributed.any_process(False, torch.device("cpu"))
    model = torch.nn.Linear(1, 1)
    assert distributed.parallel(model, torch.device("cpu")) is model


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed._own_gpu("auto") == "cuda:1"
    with pytest.raises(ConfigError, match="processes would share it"):
        distributed._own_gpu("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="shows 2 GPUs: start fewer"):
        distributed._own_gpu("auto")


def test_norms_are_synced_on_gpus_alone():
    with pytest.raises(ConfigError, match="freeze_norms"):
        distributed.with_synced_norms(torch.nn.BatchNorm2d(3), torch.device("cpu"))
    synced = distributed.with_synced_norms(torch.nn.BatchNorm2d(3), torch.device("cuda"))
    assert isinstance(synced, torch.nn.SyncBatchNorm)
