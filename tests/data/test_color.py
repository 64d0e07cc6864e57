import colorsys
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.config import Augment
from tinydet.data.color import adjust_hsv, recolored

OFF = Augment()


def random_image(seed, height=8, width=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    turn=st.floats(-0.5, 0.5),
    saturation=st.floats(0, 2),
    value=st.floats(0, 2),
)
def test_adjust_hsv__is_what_colorsys_computes(seed, turn, saturation, value):
    image = random_image(seed)
    out = adjust_hsv(image, turn, saturation, value)
    assert out.shape == image.shape
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    for pixel, changed in zip(image.flatten(1).T.tolist(), out.flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in pixel))
        h = (h + round(256 * turn) / 256) % 1
        expected = colorsys.hsv_to_rgb(h, min(1, s * saturation), min(1, v * value))
        # 256 levels of hue are six of a channel apart, of saturation one, times the value.
        error = max(abs(255 * e - c) for e, c in zip(expected, changed, strict=True))
        assert error < 6 * max(1, saturation) * max(1, value) + 2


def test_adjust_hsv__grey_has_no_hue():
    grey = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    assert torch.equal(adjust_hsv(grey, 0.3, 2.0, 1.0), grey)


def test_recolored__hsv_of_yolo_is_mild_and_off_is_off():
    image = random_image(0)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert recolored(image, OFF, generator) is image
    assert torch.equal(generator.get_state(), state)
    augment = dataclasses.replace(OFF, hsv=(0.0, 0.0, 0.5))
    brightest = {
        int(recolored(torch.full((3, 2, 2), 100, dtype=torch.uint8), augment, generator).max())
        for _ in range(300)
    }
    assert min(brightest) == pytest.approx(50, abs=3)
    assert max(brightest) == pytest.approx(150, abs=3)
