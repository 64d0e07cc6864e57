from __future__ import annotations

import math

import onnxruntime
import pytest
import timm.layers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tinydet.config import Optim
from tinydet.layers import AconA, AconB, AconC, MetaAcon
from tinydet.training.optim import make_optimizer, make_schedule

ALL = [AconA, AconB, AconC, MetaAcon]
SHAPES = [(3, 6), (2, 6, 5), (2, 6, 4, 7), (1, 6, 2, 3, 4), (1, 6, 1, 1)]
WIDE = torch.linspace(-30, 30, 60001, dtype=torch.float64)


def acon_c(p1, p2, beta):
    layer = AconC(len(p1)).double()
    with torch.no_grad():
        for parameter, values in zip((layer.p1, layer.p2, layer.beta), (p1, p2, beta), strict=True):
            parameter.copy_(torch.as_tensor(values))
    return layer


def randomised(kind, channels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = kind(channels).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def curve(layer):
    """The function of a one-channel layer on WIDE."""
    return layer(WIDE[:, None])[:, 0]


def defined(x, p1, p2, beta):
    """Equation 1 of the paper for two values: their mean weighted by exp(beta value)."""
    a, b = p1 * x, p2 * x
    weights = torch.softmax(torch.stack([beta * a, beta * b]), 0)
    return weights[0] * a + weights[1] * b


numbers = st.floats(-3, 3, width=32)


@settings(max_examples=60, deadline=None)
@given(p1=numbers, p2=numbers, beta=st.floats(-8, 8, width=32))
def test_acon_c_is_the_smooth_maximum_as_the_paper_defines_it(p1, p2, beta):
    made = curve(acon_c([p1], [p2], [beta]))
    torch.testing.assert_close(made, defined(WIDE, p1, p2, beta), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_channel_has_its_own_parameters(shape):
    x = torch.randn(shape, dtype=torch.float64)
    a, b, c = randomised(AconA), randomised(AconB), randomised(AconC)
    for channel in range(shape[1]):
        values = x[:, channel]
        expected = {
            a: defined(values, 1.0, 0.0, a.beta[channel]),
            b: defined(values, 1.0, b.p[channel], b.beta[channel]),
            c: defined(values, c.p1[channel], c.p2[channel], c.beta[channel]),
        }
        for layer, wanted in expected.items():
            torch.testing.assert_close(layer(x)[:, channel], wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_meta_acon_takes_beta_from_each_sample(shape):
    x = torch.randn(shape, dtype=torch.float64)
    layer = randomised(MetaAcon, seed=3)
    first, last = layer.squeeze, layer.excite
    for sample in range(shape[0]):
        mean = x[sample].reshape(shape[1], -1).sum(1) / math.prod(shape[2:])
        logits = last.weight @ (first.weight @ mean + first.bias) + last.bias
        for channel in range(shape[1]):
            beta = 1 / (1 + math.exp(-logits[channel].item()))
            wanted = defined(x[sample, channel], layer.p1[channel], layer.p2[channel], beta)
            torch.testing.assert_close(layer(x)[sample, channel], wanted)


@pytest.mark.parametrize(("channels", "hidden"), [(8, 16), (256, 16), (512, 32)])
def test_meta_acon_reduces_as_the_authors_code_does(channels, hidden):
    assert MetaAcon(channels).squeeze.out_features == hidden


@pytest.mark.parametrize("kind", [AconA, AconB, AconC])
def test_starts_as_silu(kind):
    torch.testing.assert_close(curve(kind(1).double()), F.silu(WIDE))


def test_meta_acon_starts_near_silu_for_every_sample():
    layer = MetaAcon(6).double()
    for scale in (0.01, 1.0, 100.0):
        x = scale * torch.randn(4, 6, 8, 8, dtype=torch.float64)
        assert (layer(x) - F.silu(x)).abs().max() < 0.0219


def test_limits_in_beta():
    p1, p2 = [1.5, -0.2, 0.3], [0.25, 0.7, 0.3]
    x = torch.randn(50, 3, dtype=torch.float64)
    lines = x * torch.tensor(p1), x * torch.tensor(p2)
    torch.testing.assert_close(acon_c(p1, p2, [1e9] * 3)(x), torch.maximum(*lines))
    torch.testing.assert_close(acon_c(p1, p2, [-1e9] * 3)(x), torch.minimum(*lines))
    torch.testing.assert_close(acon_c(p1, p2, [0.0] * 3)(x), (lines[0] + lines[1]) / 2)


@pytest.mark.parametrize("beta", [0.5, 1.0, 7.0])
@pytest.mark.parametrize(("p1", "p2"), [(1.0, 0.0), (1.3, -0.4), (0.9, 0.6)])
def test_bounds_of_the_slope_are_the_papers(p1, p2, beta):
    x = WIDE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(acon_c([p1], [p2], [beta])(x[:, None]).sum(), x)
    assert slope.max().item() == pytest.approx(1.0998 * p1 - 0.0998 * p2, abs=1e-4)
    assert slope.min().item() == pytest.approx(1.0998 * p2 - 0.0998 * p1, abs=1e-4)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2, 2)])
def test_gradients(kind, shape):
    layer = randomised(kind, 3, seed=1)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("kind", ALL)
def test_trains_from_its_start_with_one_sample_of_one_pixel(kind):
    torch.manual_seed(0)
    layer = kind(6).train()
    x, wanted = torch.randn(1, 6, 1, 1), torch.randn(1, 6, 1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses, moved = [], {name: torch.zeros(()) for name, _ in layer.named_parameters()}
    for _ in range(5):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in layer.named_parameters():
            moved[name] = moved[name] + parameter.grad.abs().sum()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(total > 0 for total in moved.values()), moved


@pytest.mark.parametrize(
    ("activation", "function", "bound"),
    [
        (nn.SiLU(), F.silu, 1e-9),
        (timm.layers.Swish(), F.silu, 1e-9),
        (nn.ReLU(inplace=True), F.relu, 0.0112),
        (nn.GELU(), F.gelu, 0.0204),
        (nn.GELU("tanh"), F.gelu, 0.0208),
        (timm.layers.GELU(), F.gelu, 0.0204),
        (timm.layers.QuickGELU(), lambda x: x * torch.sigmoid(1.702 * x), 1e-6),
        (nn.Hardswish(), F.hardswish, 0.143),
        (nn.LeakyReLU(0.1), lambda x: F.leaky_relu(x, 0.1), 0.0101),
        (nn.LeakyReLU(1.0), F.silu, 1e-9),
        (nn.Softplus(), F.silu, 1e-9),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_starts_like_what_it_replaces(activation, function, bound):
    made = AconC.like(activation, 1).double()
    difference = (curve(made) - function(WIDE)).abs().max().item()
    assert difference <= bound
    assert difference >= 0.9 * bound or bound < 1e-5, "the docstring's figure is too pessimistic"


def test_relu6_starts_as_relu_and_parts_only_at_its_bound():
    difference = (curve(AconC.like(nn.ReLU6(), 1).double()) - F.relu6(WIDE)).abs()
    assert difference[WIDE <= 6].max() < 0.0112
    assert difference[-1].item() == pytest.approx(24)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_inputs_in_half_precision_stay_numbers(kind, dtype):
    top = min(torch.finfo(dtype).max, 1e30)  # bfloat16's own sums, in float32, end where it does.
    x = torch.tensor([-1, -0.6, -1e-3, 0, 1e-3, 0.6, 1], dtype=torch.float64).mul(top).to(dtype)
    x = x[:, None].expand(7, 6)[:, :, None, None]
    layer = randomised(kind, seed=5).to(dtype)
    with torch.no_grad():
        made = layer(x)
    assert made.dtype == dtype
    assert not made.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steep_lines_in_half_precision_overflow_nowhere(dtype):
    # (p1 - p2) x overflows by itself, and beta (p1 - p2) x all the more; the result does not.
    layer = acon_c([1.0] * 6, [-1.0] * 6, [0.0, 1.0, 25.0, 1e3, -1.0, -25.0]).to(dtype)
    x = torch.tensor([-1, -0.6, -1e-3, 1e-3, 0.6, 1], dtype=torch.float64)
    x = (x * torch.finfo(dtype).max).to(dtype)[:, None].expand(6, 6)
    wanted = x.abs() * torch.tensor([0, 1, 1, 1, -1, -1], dtype=dtype)
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_type_and_agrees_with_float32(kind, dtype):
    layer = randomised(kind, seed=2).float()
    x = torch.randn(2, 6, 5, 5).to(dtype)
    with torch.autocast("cpu", dtype):
        made = layer(x)
    assert made.dtype == dtype
    torch.testing.assert_close(made.float(), layer(x.float()), rtol=2e-2, atol=2e-2)


def test_autocast_gradient_of_a_large_input_is_finite():
    layer = AconC.like(nn.ReLU(), 6)
    x = torch.full((1, 6, 2, 2), -6e4, dtype=torch.float16).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        made = layer(x)
    # A loss scale of 2**10: the gradient times x is far outside float16.
    made.backward(torch.full_like(made, 1024.0))
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", [AconA, AconB, AconC])
def test_no_parameter_decays(kind):
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), kind(6))
    optim = Optim(weight_decay=0.1)
    optimizer = make_optimizer(model, optim, make_schedule(optim, 8, 100))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model.backbone[0].weight)] == 0.1
    assert all(decays[id(p)] == 0 for p in model.backbone[1].parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ALL)
def test_onnx_gives_the_same_for_any_batch_and_size(kind):
    layer = randomised(kind, seed=4).float().eval()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    program = torch.onnx.export(
        layer, (torch.randn(2, 6, 4, 5),), dynamo=True, dynamic_shapes=(sizes,), verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for shape in ((1, 6, 1, 1), (3, 6, 7, 2)):
        x = torch.randn(shape)
        (made,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(made), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_mistakes_are_named(kind):
    with pytest.raises(ValueError, match="channels is 0"):
        kind(0)
    # One channel would broadcast silently.
    with pytest.raises(ValueError, match="4 channels"):
        kind(4)(torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match="1 channels"):
        kind(1)(torch.zeros(2, 4, 3, 3))
    with pytest.raises(ValueError, match="give"):
        kind(4)(torch.zeros(4))


def test_a_reduction_of_zero_is_named():
    with pytest.raises(ValueError, match="reduction is 0"):
        MetaAcon(4, reduction=0)
