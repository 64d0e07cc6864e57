"""Devices that are not here: their properties are made up, and Apple's GPU is imitated."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tinydet.config import ConfigError, Train
from tinydet.data.sample import Batch
from tinydet.data.seeding import seed_globally
from tinydet.reparam import fold, weight_ranges
from tinydet.training import distributed
from tinydet.training.checkpoint import read_checkpoint
from tinydet.training.device import (
    describe_device,
    pick_device,
    synchronize,
    training_dtypes,
)
from tinydet.training.loop import train
from tinydet.training.precision import choose_precision
from tinydet.training.resume import keep_precision
from tinydet.yolof.build import build_detector

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps", 0)


class AppleGpu(TorchFunctionMode):
    """Within it some tensors of the CPU pass for ones of an Apple GPU, with that GPU's limits.

    Those moved to "mps", made there, or computed from others there. No float64, no copy that does
    not wait, no maximum of scattered int64, no operation with a tensor of the CPU.
    """

    def __init__(self):
        super().__init__()
        self._storages = {}

    def has(self, x):
        return x.untyped_storage()._cdata in self._storages

    def _take(self, x):
        assert x.dtype != torch.float64, "the MPS framework doesn't support float64"
        storage = x.untyped_storage()
        # While the weak reference lives, no other storage gets this address.
        self._storages[storage._cdata] = StorageWeakRef(storage)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if self.has(x)]
        if name in ("_parse_to", "_has_compatible_shallow_copy_type"):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return MPS if there else CPU
        named = [kwargs.get("device"), *(args[1:2] if name == "to" else ())]
        named = [torch.device(d).type for d in named if isinstance(d, torch.device | str)]
        wanted = named[0] if named else None
        if func is Tensor.cpu or (name == "to" and wanted == "cpu"):
            result = func(*args, **kwargs)
            return result.clone() if there and self.has(result) else result
        args, kwargs = tree_map_only(torch.device, lambda _: CPU, (args, kwargs))
        if name == "to" and wanted == "mps":
            assert not kwargs.get("non_blocking"), "reads memory that is freed already"
            assert args[0].dtype != torch.float64 or torch.float32 in args, "no float64"
            result = func(*args, **kwargs)
            result = result.clone() if result is args[0] and not there else result
            self._take(result)
            return result
        assert name != "numpy" or not there, "can't convert mps:0 device type tensor to numpy"
        if there and name not in (
            "copy_",
            "_foreach_copy_",
            "__getitem__",
            "__get__",
            "__set__",
            "__deepcopy__",
        ):
            assert all(self.has(x) for x in tensors if x.ndim), f"{name}: on two devices"
        if there and name == "scatter_reduce":
            assert args[0].dtype != torch.int64, "scatter_reduce for int64"
        result = func(*args, **kwargs)
        if there or wanted == "mps":
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self._take(x)
        return result


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M9")
    return AppleGpu


def test_a_run_on_an_apple_gpu_is_that_of_a_cpu(apple, tiny_experiment, tmp_path, caplog):
    on_cpu = replace(tiny_experiment.train, epochs=1)
    automatic = replace(on_cpu, device="auto", dtype="auto", memory_format="auto")
    with apple():
        train(replace(tiny_experiment, train=automatic), tmp_path / "apple")
    assert "not been tested on Apple's GPUs" in caplog.text
    train(replace(tiny_experiment, train=on_cpu), tmp_path / "cpu")
    content, expected = (read_checkpoint(tmp_path / n / "last.pt") for n in ("apple", "cpu"))
    assert (content["dtype"], content["memory_format"]) == ("float32", "contiguous")
    for name, value in expected["model"].items():
        torch.testing.assert_close(content["model"][name], value, rtol=1e-3, atol=1e-3)
    (session,) = json.loads((tmp_path / "apple" / "sessions.json").read_text())
    assert session["device"] == "Apple M9 (mps)"


def test_auto_is_the_first_gpu_there_is(monkeypatch, apple):
    del apple
    assert pick_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["xpu", "hpu", "meta", "mps", "mps:0", "gpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_line(name):
    with pytest.raises(ConfigError) as raised:
        pick_device(name)
    message = str(raised.value)
    assert message.startswith(f"device {name}: ")
    assert message.endswith("; use cpu, cuda, cuda:N or mps")
    assert len(message) < 400
    assert "\n" not in message


def test_a_gpu_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", partial(waited.append, "mps"))
    for device in (CPU, MPS, torch.device("cuda", 1)):
        synchronize(device)
    assert waited == ["mps", torch.device("cuda", 1)]


def test_an_apple_gpu_is_seeded(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    for key in (1, 2, 1):
        seed_globally(MPS, "step", key)
    assert seeds[0] == seeds[2] != seeds[1]


def test_dtypes_of_an_apple_gpu_and_of_a_cpu():
    assert training_dtypes(MPS) == training_dtypes(CPU) == ("float32", "bfloat16")
    with pytest.raises(ConfigError, match="float16: device mps:0 trains in float32 or bfloat16"):
        choose_precision(Train(dtype="float16"), MPS, nn.Module(), torch.zeros(1), [])
    chosen = choose_precision(Train(), MPS, nn.Module(), torch.zeros(1), [])
    assert (chosen.dtype, chosen.memory_format) == ("float32", "contiguous")
    set_by_hand = Train(dtype="bfloat16", memory_format="channels_last")
    chosen = choose_precision(set_by_hand, MPS, nn.Module(), torch.zeros(1), [])
    assert (chosen.dtype, chosen.memory_format) == ("bfloat16", "channels_last")


@pytest.mark.parametrize(
    ("capability", "was", "now"),
    [
        ((7, 5), "bfloat16", "auto"),
        ((7, 5), "float16", "float16"),
        ((8, 0), "bfloat16", "bfloat16"),
        ((8, 0), "float16", "float16"),
        ((7, 5), "float32", "float32"),
    ],
)
def test_a_resumed_run_keeps_a_dtype_that_the_gpu_has(
    capability, was, now, monkeypatch, tiny_experiment
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    auto = replace(tiny_experiment, train=replace(tiny_experiment.train, dtype="auto"))
    assert keep_precision(auto, {"dtype": was}, CUDA).train.dtype == now


@pytest.mark.parametrize("device", ["mps", "xpu", "nosuch"])
def test_several_processes_are_refused_on_other_devices(device, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match=f"train.device={device}: processes started by torchrun"),
        distributed.process_group(device),
    ):
        pass


def test_a_batch_is_copied_at_once_to_all_but_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(
        Tensor, "to", lambda x, device, non_blocking: asked.append((device, non_blocking)) or x
    )
    batch = Batch(torch.zeros(1, 3, 32, 32), [{"boxes": torch.zeros(0, 4)}], ["a"], [], [])
    for device in ("mps", "cuda"):
        batch.to(device)
    assert asked == [("mps", False)] * 2 + [("cuda", True)] * 2


def test_a_network_on_an_apple_gpu_detects_and_folds(apple, tiny_experiment):
    torch.manual_seed(0)
    model = replace(tiny_experiment.model, score_threshold=0.0)
    detector = build_detector(model, ["a", "b"]).eval()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    (expected,) = detector.detect(images)
    ranges = weight_ranges(detector)
    with apple() as gpu:
        moved = detector.to("mps")
        (found,) = moved.detect(images.to(MPS))
        assert weight_ranges(moved) == ranges
        layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().to("mps")
        folded, report = fold(layers, torch.zeros(1, 3, 8, 8))
        assert all(gpu.has(p) for p in folded.parameters())
    assert report.norms_after == 0
    torch.testing.assert_close(found.boxes, expected.boxes)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.labels, expected.labels)


def test_names_of_devices(apple):
    del apple
    assert describe_device(MPS) == "Apple M9 (mps)"
    assert "thread" in describe_device(CPU)
