import colorsys

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from tinydet.data.color import recolor


@pytest.fixture
def image():
    # Middle values only: torchvision clamps after every step, recolor once.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(90, 160, (3, 16, 20), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("brightness", F.adjust_brightness),
        ("contrast", F.adjust_contrast),
        ("saturation", F.adjust_saturation),
    ],
)
def test_recolor__like_torchvision(image, name, reference, factor):
    expected = reference(image, factor)
    actual = recolor(image, **{name: factor})
    assert actual.dtype == torch.uint8
    torch.testing.assert_close(actual.int(), expected.int(), atol=1, rtol=0)


def test_recolor__all_at_once_is_one_after_another(image):
    # In floats, or torchvision would round three times.
    expected = F.adjust_brightness(image / 255, 1.2)
    expected = F.adjust_saturation(F.adjust_contrast(expected, 0.8), 1.1) * 255
    actual = recolor(image, 1.2, 0.8, 1.1)
    torch.testing.assert_close(actual.float(), expected, atol=0.6, rtol=0)


def test_recolor__nothing_to_change(image):
    assert torch.equal(recolor(image), image)


def test_recolor__hue_turns_colours_and_leaves_grey():
    grey = torch.arange(0, 256, dtype=torch.uint8).expand(3, 1, 256)
    torch.testing.assert_close(recolor(grey, hue=0.3).int(), grey.int(), atol=1, rtol=0)
    red = torch.tensor([180, 90, 90], dtype=torch.uint8).reshape(3, 1, 1)
    hues = []
    for turn in (0.0, 1 / 3, 2 / 3):
        rgb = [v / 255 for v in recolor(red, hue=turn).flatten().tolist()]
        hues.append(colorsys.rgb_to_hsv(*rgb)[0])
    # A third of a turn each, all in one direction; the YIQ circle is not the HSV one exactly.
    steps = [(b - a) % 1 for a, b in zip(hues, [*hues[1:], hues[0]], strict=True)]
    assert steps == pytest.approx([1 / 3] * 3, abs=0.1) or steps == pytest.approx(
        [2 / 3] * 3, abs=0.1
    )


def test_recolor__clamps_instead_of_wrapping():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).expand(3, 1, 3)
    assert recolor(image, brightness=3.0)[0, 0].tolist() == [0, 255, 255]
    assert recolor(image, contrast=5.0)[0, 0, 0] == 0
