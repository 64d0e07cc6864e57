"""Detectors that train in a moment, and the losses and gradients of a step."""

from dataclasses import replace

import torch

from tinydet.config import Model
from tinydet.yolof.build import build_detector

SMALL = Model(
    backbone="test_resnet",
    weights="random",
    feature="C4",
    freeze_stages=2,
    encoder_channels=16,
    encoder_mid_channels=8,
    dilations=(2,),
    cls_convs=1,
    reg_convs=1,
)


def detector_of(**changes):
    torch.manual_seed(0)
    detector = build_detector(replace(SMALL, **changes), ("a", "b"))
    generator = torch.Generator().manual_seed(1)
    for tensor in detector.backbone.state_dict().values():  # Norms that do something.
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return detector.train()


def batch(seed=0):
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = [
        {"boxes": torch.tensor([[8.0, 4, 60, 50]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return images, targets


def losses_of(detector):
    torch.manual_seed(5)  # For what is dropped out.
    losses, _ = detector(*batch())
    return losses


def assert_same_step(plain, changed):
    """Compare losses and gradients."""
    one, two = losses_of(plain), losses_of(changed)
    for key, loss in one.items():
        torch.testing.assert_close(two[key], loss, rtol=1e-4, atol=1e-5)
    sum(one.values()).backward()
    sum(two.values()).backward()
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (key, p), q in zip(plain.named_parameters(), changed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            # Rounding puts a value on the other side of a ReLU6's edge, and of a bias before a norm
            # it is all of the gradient.
            allowed = 3e-3 * p.grad.abs().max() + 1e-4 * largest
            assert (q.grad - p.grad).abs().max() <= allowed, key
