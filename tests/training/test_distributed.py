import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinydet.config import ConfigError
from tinydet.training import distributed
from tinydet.training.checkpoint import read_checkpoint
from tinydet.training.results import write_experiment

SCRIPT = Path(__file__).with_name("run_in_processes.py")
ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 3  # which do not divide the 8 images of the split


def _script():
    spec = importlib.util.spec_from_file_location("run_in_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def told(tiny_experiment, folder):
    """What each process wrote."""
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


@pytest.mark.slow
@pytest.mark.parametrize(("model", "key"), [("SMALL", "losses"), ("ONLINE", "online_losses")])
def test_three_processes_learn_what_one_learns_from_the_whole_batch(told, model, key):
    losses, weights = _script().learn(getattr(_script(), model))
    assert len(set(losses)) > 1
    assert any(".branches." in name for name in weights) == (model == "ONLINE")
    for said, found in told:
        assert said[key] == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found[model][name], weight, rtol=1e-4, atol=1e-6)
            assert torch.equal(found[model][name], told[0][1][model][name]), name


@pytest.mark.slow
def test_a_split_evaluated_in_three_processes_has_the_numbers_of_one(told, tiny_experiment):
    expected = _script().score(tiny_experiment.data)
    assert expected["images"] == 8
    assert expected["AP50"] > 0
    for said, _ in told:
        assert said["metrics"] == expected


@pytest.mark.slow
def test_a_run_of_three_processes_is_that_of_one(folder, told, tiny_experiment, tmp_path):
    del told  # The run is there once it is.
    run = folder / "run"
    _script().whole_run(tiny_experiment, tmp_path / "run")
    records = [
        [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        for path in (tmp_path / "run", run)
    ]
    assert len(records[0]) == len(records[1])
    for one, three in zip(*records, strict=True):
        assert [one[key] for key in ("mode", "epoch", "step")] == [
            three[key] for key in ("mode", "epoch", "step")
        ]
        for name in ("loss_cls", "loss_box", "lr") if one["mode"] == "train" else ("AP50",):
            assert three[name] == pytest.approx(one[name], rel=1e-5), name
    one, three = (read_checkpoint(path / "last.pt") for path in (tmp_path / "run", run))
    for key in ("model", "raw_model"):
        for name, weight in one[key].items():
            torch.testing.assert_close(three[key][name], weight, rtol=1e-3, atol=1e-5)
    assert three["images_seen"] == one["images_seen"] == 48
    # The first process alone writes.
    assert {path.name.partition(".")[0] for path in run.iterdir()} == {
        path.name.partition(".")[0] for path in (tmp_path / "run").iterdir()
    }
    assert len(list(run.glob("events.*"))) == 1


@pytest.mark.slow
def test_processes_time_steps_together_and_choose_the_same(told):
    assert len({tuple(said["precision"]) for said, _ in told}) == 1


@pytest.mark.slow
def test_what_processes_tell_one_another(told):
    for n, (said, _) in enumerate(told):
        assert said["rank"] == n
        assert said["made"] == "by 0"
        assert said["failed"] == "the first process failed"
        assert said["gathered"] == {"of 0": 0, "of 1": 1, "of 2": 2}
        assert said["mean"] == [1.0, 4.0]
        assert said["any"] == [True, True, False]
        # All learn what one of them wants: at every tenth step, or at the first after it where
        # only every fourth is asked at, or always.
        asked = [False, True, False, False, True, False, True]
        assert said["agreed"] == [[answer, False] for answer in asked]


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step_and_save_once_where_one_was_told(told, folder):
    for n, (said, _) in enumerate(told):
        for stopped, step, path in zip(said["stopped"], (3, 8), ("at_2", "at_7"), strict=True):
            assert stopped["status"] == 143
            assert stopped["steps"] == step
            # The first process's, at the start and at the end, before any evaluation.
            assert stopped["saves"] == ([[0, 0], [0, step]] if n == 0 else [])
            assert read_checkpoint(folder / path / "last.pt")["step"] == step
            assert not (folder / path / "metrics.json").exists()


def test_a_single_process_needs_no_group():
    with distributed.process_group("auto") as device:
        assert device == "auto"
        assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.broadcast_from_rank0(lambda: 3) == 3
    assert distributed.all_gather_dict({"a": 1}) == {"a": 1}
    assert distributed.any_rank_wants([True, False], torch.device("cpu"), 3) == [True, False]
    model = torch.nn.Linear(1, 1)
    assert distributed.wrap_ddp(model, torch.device("cpu")) is model


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed._local_gpu("auto") == "cuda:1"
    with pytest.raises(ConfigError, match="processes would share it"):
        distributed._local_gpu("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="2 visible GPUs: start fewer"):
        distributed._local_gpu("auto")


def test_norms_are_synced_on_gpus_alone():
    with pytest.raises(ConfigError, match="freeze_norms"):
        distributed.sync_batchnorm(torch.nn.BatchNorm2d(3), torch.device("cpu"))
    synced = distributed.sync_batchnorm(torch.nn.BatchNorm2d(3), torch.device("cuda"))
    assert isinstance(synced, torch.nn.SyncBatchNorm)


@pytest.mark.parametrize(("options", "status"), [(["2"], 2), (["no number"], 2), ([], 2)])
def test_a_mistake_on_the_command_line_is_one_line(options, status, tmp_path):
    command = ["bash", str(ROOT / "tools" / "dist_train.sh"), "nosuch.py", *options]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == status
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_two_machines_learn_what_one_machine_of_two_processes_learns(tiny_experiment, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    write_experiment(tmp_path, tiny_experiment)

    def start(processes, run, **variables):
        command = ["bash", "tools/dist_train.sh", str(tmp_path / "experiment.json"), processes]
        command += ["--work-dir", str(tmp_path / run)]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables}
        # A process group of its own, as on a machine of its own.
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)

    alone = start("2", "alone")
    assert alone.wait(300) == 0
    address = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "PORT": port}
    nodes = [start("1", "nodes", NODE_RANK=str(number), **address) for number in range(2)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    expected, found = (read_checkpoint(tmp_path / run / "last.pt") for run in ("alone", "nodes"))
    assert found["images_seen"] == expected["images_seen"] == 32
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
