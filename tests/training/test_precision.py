import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tinydet.config import ConfigError, Train
from tinydet.reparam import expand
from tinydet.training import precision as module
from tinydet.training.precision import Precision, choose_precision, prepare_for_cpu
from tinydet.yolof.build import build_detector

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


def test_timing_leaves_the_detector_as_it_was_and_says_what_it_does(detector, every_step_said):
    before = copy.deepcopy(detector.state_dict())
    choose_precision(Train(), CPU, detector, IMAGES, TARGETS)
    assert [line.split(", ")[0] for line in every_step_said()] == [
        f"timing dtypes and memory formats: {i}/4 timed" for i in range(1, 5)
    ]
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in detector.parameters())


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_a_gpu_gets_the_half_precision_it_has_without_timing(
    capability, dtype, detector, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    second = torch.device("cuda", 1)
    chosen = choose_precision(Train(), second, detector, IMAGES, TARGETS)
    assert (chosen.dtype, chosen.memory_format) == (dtype, "channels_last")
    assert set(asked) == {second}  # not the current device, which may be another model
    if dtype == "float16":
        with pytest.raises(ConfigError, match="trains in float16 or float32"):
            choose_precision(Train(dtype="bfloat16"), second, detector, IMAGES, TARGETS)


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


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 8, 1, stride=2, bias=False),
        nn.Conv2d(3, 8, 1, stride=(2, 3), padding=(1, 0)),
        nn.Conv2d(3, 8, 1, stride=2, padding="valid"),
        nn.Conv2d(3, 8, 1, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 8, 1, stride=2, groups=2),
        nn.Conv2d(6, 6, 1, groups=6, bias=False),
        nn.Conv2d(6, 18, 1, padding=(2, 1), groups=6),
        nn.Conv2d(6, 12, 1, padding="same", groups=6),
        nn.Conv2d(6, 6, 1, padding=1, padding_mode="circular", groups=6),
        nn.Conv2d(6, 3, 1, groups=3),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        expand(nn.Conv2d(3, 8, 1, stride=2), "mobileone"),
        expand(nn.Conv2d(8, 8, 3, padding=1, groups=8), "dbb"),
        expand(nn.Conv2d(8, 8, 1, groups=8), "repvgg"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_function_gradient_and_names_stay(conv, bfloat16):
    other = copy.deepcopy(conv)
    prepare_for_cpu(other, bfloat16)
    assert list(other.state_dict()) == list(conv.state_dict())
    # Contiguous: the original is safe in this layout.
    x = torch.randn(2, conv.in_channels, 11, 13, requires_grad=True)
    outputs = [layer(x) for layer in (conv, other)]
    torch.testing.assert_close(outputs[1], outputs[0])
    weight = torch.randn_like(outputs[0])
    grads = [
        torch.autograd.grad((out * weight).sum(), [x, layer.weight])
        for out, layer in zip(outputs, (conv, other), strict=True)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [None, "repvgg"])
def test_the_dangerous_convolution_never_reaches_onednn_in_channels_last(block):
    layer = nn.Conv2d(3, 48, 1, stride=2, bias=False)
    layer = layer if block is None else expand(layer, block)
    layer = layer.to(memory_format=torch.channels_last)
    prepare_for_cpu(layer, bfloat16=False)
    seen = []
    real = torch.nn.functional.conv2d

    def spy(x, weight, bias=None, stride=1, *args, **kwargs):
        seen.append(stride)
        return real(x, weight, bias, stride, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", spy)
        x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
        layer(x).sum().backward()
    assert set(seen) == {1}


def test_bfloat16_is_kept_from_depthwise_convs_that_are_slow_in_it():
    convs = {
        "dense": nn.Conv2d(8, 8, 3),
        "depthwise": nn.Conv2d(8, 8, 5, groups=8),
        "strided scale": nn.Conv2d(16, 16, 1, stride=2, groups=16),
        "scale": nn.Conv2d(8, 8, 1, groups=8),
    }
    for conv in convs.values():
        prepare_for_cpu(conv, bfloat16=True)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = {
            name: conv(torch.randn(2, conv.in_channels, 9, 9)).dtype for name, conv in convs.items()
        }
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "depthwise",
        "strided scale",
    }


@pytest.mark.parametrize("bfloat16", [False, True])
def test_depthwise_1x1_convs_are_products(bfloat16, monkeypatch):
    """As convolutions, oneDNN computes some of them group by group."""
    layers = nn.Sequential(nn.Conv2d(6, 12, 1, groups=6), nn.Conv2d(12, 12, 1, groups=12))
    prepare_for_cpu(layers, bfloat16)
    monkeypatch.setattr(torch.nn.functional, "conv2d", None)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        y = layers(torch.randn(2, 6, 9, 9))
    assert y.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layers.parameters())
