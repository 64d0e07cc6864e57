import copy
from dataclasses import replace

import pytest
import torch

from tinydet.config import ConfigError, Train
from tinydet.training import precision as module
from tinydet.training.precision import Precision, choose_precision
from tinydet.yolof.detector import build_detector

CPU = torch.device("cpu")
IMAGES = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
TARGETS = [{"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([0])}] * 2


@pytest.fixture(scope="module")
def detector(tiny_experiment):
    return build_detector(tiny_experiment.model, ["a"])


def test_auto_takes_the_fastest_of_the_timed_steps(detector, monkeypatch):
    seconds = {
        ("float32", "channels_last"): 3.0,
        ("bfloat16", "channels_last"): 1.5,
        ("float32", "contiguous"): 1.0,
        ("bfloat16", "contiguous"): 2.0,
    }
    monkeypatch.setattr(module, "_time_step", lambda p, *_: seconds[p.dtype, p.memory_format])
    chosen = choose_precision(Train(), CPU, detector, IMAGES, TARGETS)
    assert (chosen.dtype, chosen.memory_format) == ("float32", "contiguous")
    # What the user fixed stays fixed.
    fixed = choose_precision(Train(dtype="bfloat16"), CPU, detector, IMAGES, TARGETS)
    assert (fixed.dtype, fixed.memory_format) == ("bfloat16", "channels_last")


def test_timing_leaves_the_detector_as_it_was(detector):
    before = copy.deepcopy(detector.state_dict())
    choose_precision(Train(), CPU, detector, IMAGES, TARGETS)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in detector.parameters())


def test_a_gpu_gets_half_precision_without_timing(detector):
    chosen = choose_precision(Train(), torch.device("cuda"), detector, IMAGES, TARGETS)
    assert (chosen.dtype, chosen.memory_format) == ("float16", "channels_last")


def test_float16_on_a_cpu_is_refused(detector):
    with pytest.raises(ConfigError, match="bfloat16"):
        choose_precision(replace(Train(), dtype="float16"), CPU, detector, IMAGES, TARGETS)


def test_depthwise_convs_stay_in_float32_and_the_function_outside_autocast_too(detector):
    model = copy.deepcopy(detector).eval()
    expected = model(IMAGES)
    chosen = Precision("bfloat16", "channels_last", "")
    chosen.prepare(model)
    assert list(model.state_dict()) == list(detector.state_dict())
    torch.testing.assert_close(model(IMAGES), expected)

    dtypes = {True: set(), False: set()}
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda layer, _, output: dtypes[layer.groups > 1].add(output.dtype)
            )
    with chosen.autocast(CPU):
        model(IMAGES)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    copy.deepcopy(model)
