import math

import pytest
import torch

from tinydet.yolof.encoder import DilatedEncoder


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_output_is_the_reference(encoder, reference, mode):
    part = reference["neck"]
    out = encoder.train(mode == "train")(part["x"])
    assert out.shape == (2, 64, 10, 13)
    torch.testing.assert_close(out[:1, :, :5], part[mode], rtol=1e-4, atol=1e-4)


def test_running_statistics_are_the_reference(encoder, reference, names):
    encoder.train()(reference["neck"]["x"])
    state = encoder.state_dict()
    after = reference["neck"]["state_dict_after_train"]
    assert len(after) == 28
    for name, value in after.items():
        torch.testing.assert_close(state[names["encoder"](name)], value, rtol=1e-4, atol=1e-5)


def test_fresh_weights_have_the_statistics_of_the_reference(reference, names):
    torch.manual_seed(0)
    parameters = dict(DilatedEncoder(96, 64, 16).named_parameters())
    expected = reference["neck"]["init_mean_std"]
    trained = {k: v for k, v in expected.items() if "running" not in k}
    assert {names["encoder"](name) for name in trained} == set(parameters)
    for name, (mean, std) in trained.items():
        value = parameters[names["encoder"](name)]
        slack = 8 * std / math.sqrt(value.numel())
        assert value.mean().item() == pytest.approx(mean, abs=slack + 1e-6), name
        deviation = value.std(correction=0).item()
        assert deviation == pytest.approx(std, abs=slack + 1e-6), name


def test_projector_weights_are_uniform():
    weight = DilatedEncoder(96, 64, 16).lateral_conv.weight
    # Uniform with variance 1/96 ends at sqrt(3/96); a normal would go on.
    assert 0.98 * math.sqrt(3 / 96) < weight.abs().max().item() <= math.sqrt(3 / 96)


def test_one_block_for_each_dilation():
    encoder = DilatedEncoder(4, 8, 2, dilations=(1, 3, 5))
    assert [block.conv2[0].dilation[0] for block in encoder.blocks] == [1, 3, 5]
    assert encoder(torch.zeros(2, 4, 3, 5)).shape == (2, 8, 3, 5)
