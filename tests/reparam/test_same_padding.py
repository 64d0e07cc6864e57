import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from tinydet.reparam.same_padding import SamePad2d


@pytest.mark.parametrize("side", [7, 8, 9])
def test_padding_and_conv_are_timms_layer_and_join_to_it(side):
    torch.manual_seed(0)
    whole = Conv2dSame(4, 6, (3, 5), stride=(2, 3), dilation=(2, 1), groups=2)
    pad = SamePad2d(whole)
    conv = nn.Conv2d(4, 6, (3, 5), (2, 3), 0, (2, 1), 2)
    conv.load_state_dict(whole.state_dict())
    x = torch.randn(1, 4, side, side + 1)
    assert torch.equal(conv(pad(x)), whole(x))
    joined = pad.joined(conv)
    assert type(joined) is Conv2dSame
    assert torch.equal(joined(x), whole(x))


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.Conv2d(4, 6, 5, 2),
        nn.Conv2d(4, 6, 3, 1),
        nn.Conv2d(4, 6, 3, 2, dilation=2),
        Conv2dSame(4, 6, 3, 2),
        nn.BatchNorm2d(4),
    ],
    ids=str,
)
def test_what_the_padding_is_not_for_does_not_join(other):
    kind = type(other)
    assert SamePad2d(Conv2dSame(4, 6, 3, 2)).joined(other) is None
    assert type(other) is kind
