import colorsys
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from tinydet.config import Augment
from tinydet.data.color import adjust_color, adjust_hsv, recolor

OFF = Augment()


def random_image(seed, height=8, width=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    hue_shift=st.floats(-0.5, 0.5),
    saturation=st.floats(0, 2),
    value=st.floats(0, 2),
)
def test_adjust_hsv__is_what_colorsys_computes(seed, hue_shift, saturation, value):
    image = random_image(seed)
    out = adjust_hsv(image, hue_shift, saturation, value)
    assert out.shape == image.shape
    assert out.dtype == torch.uint8
    for pixel, changed in zip(image.flatten(1).T.tolist(), out.flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in pixel))
        h = (h + round(256 * hue_shift) / 256) % 1
        expected = colorsys.hsv_to_rgb(h, min(1, s * saturation), min(1, v * value))
        # 256 levels of hue are six of a channel apart, of saturation one, times the value.
        error = max(abs(255 * e - c) for e, c in zip(expected, changed, strict=True))
        assert error < 6 * max(1, saturation) * max(1, value) + 2


COLOURS = {  # a factor below and above one for each
    "darker": (0.6, 1.0, 1.0),
    "brighter": (1.3, 1.0, 1.0),
    "flatter": (1.0, 0.5, 1.0),
    "harder": (1.0, 1.4, 1.0),
    "paler": (1.0, 1.0, 0.4),
    "richer": (1.0, 1.0, 1.5),
    "all": (0.8, 1.2, 1.3),
    "grey": (1.0, 1.0, 0.0),
    "black": (0.0, 1.0, 1.0),
}


@pytest.mark.parametrize(("brightness", "contrast", "saturation"), COLOURS.values(), ids=COLOURS)
def test_adjust_color__is_torchvisions_where_nothing_is_cut_off(brightness, contrast, saturation):
    # Mild colours: no step of torchvision's comes to its bounds, which it would cut off at.
    image = random_image(0, 40, 50) // 4 + 80
    expected = F.adjust_brightness(image, brightness)
    expected = F.adjust_contrast(expected, contrast)
    expected = F.adjust_saturation(expected, saturation)
    assert brightness == 0.0 or 0 < expected.min() < expected.max() < 255
    # Each of its three steps rounds down; a saturation scales what the two before have lost.
    difference = adjust_color(image, brightness, contrast, saturation).int() - expected.int()
    assert difference.min() >= -1
    assert difference.max() <= 3


def test_adjust_color__ends_at_black_and_white():
    image = torch.tensor([0, 100, 200], dtype=torch.uint8).repeat(3, 1, 1)
    # The mean is 100, of twice the brightness 200: 0 and 400 lie 200 from it.
    assert adjust_color(image, 2.0, 1.5, 1.0)[0].tolist() == [[0, 200, 255]]


@pytest.mark.parametrize("layout", ["planes", "pixels", "window"])
def test_adjust_color__whatever_the_order_in_memory_and_the_threads(layout):
    image = random_image(1, 600, 800)
    expected = adjust_color(image, 0.9, 0.1, 1.2)
    if layout == "pixels":
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif layout == "window":
        larger = torch.zeros(610, 820, 3, dtype=torch.uint8).permute(2, 0, 1)
        larger[:, 5:605, 7:807] = image
        image = larger[:, 5:605, 7:807]
    threads, before = torch.get_num_threads(), image.clone()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(adjust_color(image, 0.9, 0.1, 1.2), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(image, before)


def test_adjust_hsv__grey_has_no_hue():
    grey = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    assert torch.equal(adjust_hsv(grey, 0.3, 2.0, 1.0), grey)


def test_recolor__hsv_of_yolo_is_mild_and_off_is_off():
    image = random_image(0)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert recolor(image, OFF, generator) is image
    assert torch.equal(generator.get_state(), state)
    augment = dataclasses.replace(OFF, hsv=(0.0, 0.0, 0.5))
    brightest = {
        int(recolor(torch.full((3, 2, 2), 100, dtype=torch.uint8), augment, generator).max())
        for _ in range(300)
    }
    assert min(brightest) == pytest.approx(50, abs=3)
    assert max(brightest) == pytest.approx(150, abs=3)
