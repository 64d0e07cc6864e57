import torch
from torch import nn
from torch.nn import functional as F

from tinydet.reparam.dataflow import observe


def _observe(model, *inputs):
    return observe(model.eval(), inputs, is_leaf=lambda module: isinstance(module, nn.BatchNorm2d))


def _call(flow, name):
    (call,) = [call for call in flow.calls if call.name == name]
    return call


class _Tapped(nn.Module):
    def __init__(self, tap):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.tap = tap

    def forward(self, x):
        y = self.conv(x)
        return self.tap(self.norm(y), y)


def _reader_names(tap):
    flow = _observe(_Tapped(tap), torch.randn(2, 3, 5, 5))
    value = _call(flow, "conv").outputs[0].value
    return [op.call.name if op.call else op.name for op in flow.readers(value)], flow, value


def test_readers__norm_alone():
    names, flow, value = _reader_names(lambda z, _: z)
    assert names == ["norm"]
    assert not flow.is_returned(value)


def test_readers__function_outside_modules():
    names, _, _ = _reader_names(lambda z, y: z + y)
    assert names == ["norm", "aten.add"]


def test_readers__through_a_view():
    names, _, _ = _reader_names(lambda z, y: z * y.flatten(1).mean())
    assert names == ["norm", "aten.mean"]


def test_readers__in_place_operation():
    names, _, _ = _reader_names(lambda z, y: (z, y.relu_())[0])
    assert names == ["norm", "aten.relu_"]


def test_readers__shape_alone_is_no_reader():
    names, _, _ = _reader_names(lambda z, y: z.reshape(y.shape[0], -1))
    assert names == ["norm"]


def test_is_returned__also_as_a_view():
    _, flow, value = _reader_names(lambda z, y: {"out": z, "taps": [y.transpose(2, 3)]})
    assert flow.is_returned(value)


def test_in_place_operation_makes_a_new_value():
    model = _Tapped(lambda z, y: (z, y.relu_(), y + 1)[2])
    flow = _observe(model, torch.randn(2, 3, 5, 5))
    before = _call(flow, "conv").outputs[0].value
    after = (before[0], 1)
    assert [op.name for op in flow.readers(after)] == ["aten.add"]
    assert flow.producer(after).name == "aten.relu_"
    assert flow.producer(before).call.name == "conv"


def test_depends_on_input():
    model = _Tapped(lambda z, y: z * torch.sigmoid(torch.ones(1)) + y)
    flow = _observe(model, torch.randn(2, 3, 5, 5))
    data = flow.depends_on_input()
    varying = {op.name for op in flow.ops if any(v.value in data for v in op.outputs)}
    assert "aten.mul" in varying
    assert "aten.sigmoid" not in varying


def test_calls__leaves_only_and_in_order():
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(shared, nn.ReLU(inplace=True)), shared)
    flow = _observe(model, torch.randn(1, 3, 4, 4))
    assert [call.name for call in flow.calls] == ["0", "1.0", "1.1", "1.0"]
    assert len(flow.calls_of(shared)) == 2
    # The activation works in place: its output is the convolution's memory.
    assert flow.calls[2].outputs[0].storage == flow.calls[1].outputs[0].storage


def test_memory_is_not_mistaken_when_freed():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(50):
                x = F.relu(x) + 1  # Each step frees memory the next could be given.
            return x

    flow = _observe(Chain(), torch.randn(64, 64))
    made = [op.outputs[0].storage for op in flow.ops]
    assert len(set(made)) == len(made) == 100


def test_producer():
    flow = _observe(_Tapped(lambda z, _: z + 1), torch.randn(2, 3, 5, 5))
    norm = _call(flow, "norm")
    assert flow.producer(norm.inputs[0].value).call is _call(flow, "conv")
    assert flow.producer(flow.outputs[0].value).name == "aten.add"
    assert flow.producer(_call(flow, "conv").inputs[0].value) is None


def test_hooks_are_removed():
    model = _Tapped(lambda z, _: z)
    _observe(model, torch.randn(1, 3, 2, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
