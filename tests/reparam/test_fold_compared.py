"""On which inputs a folded network is compared with the original, and what is refused."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinydet.reparam import compare_outputs, fold
from tinydet.reparam.compared import Operations, choose_examples, run_in_own_dtype
from tinydet.reparam.exact import exact_arithmetic
from tinydet.reparam.examples import Example, as_examples

_X = torch.zeros(1, 4, 16, 16)


class _Way(nn.Module):
    """Conv and norm, then what the test gives."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)
        self.way = way

    def forward(self, *args, **kwargs):
        return self.way(self, *args, **kwargs)


@pytest.fixture
def way(randomise):
    return lambda function: randomise(_Way(function)).eval()


def _plain(m, x):
    return m.last(m.norm(m.conv(x)))


def test_noise_is_the_same_in_every_pass(way):
    model = way(lambda m, x: _plain(m, x + torch.randn_like(x)))
    state = torch.random.get_rng_state()
    folded, report = fold(model, _X)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert report.norms_after == 0
    torch.manual_seed(3)
    expected = model(_X)
    torch.manual_seed(3)
    torch.testing.assert_close(folded(_X), expected, rtol=1e-4, atol=1e-5)


def test_noise_from_elsewhere_is_refused(way):
    calls = iter(range(1000))
    model = way(lambda m, x: _plain(m, x) + float(next(calls)))
    with pytest.raises(ValueError, match="its output changes by"):
        fold(model, _X)


@pytest.mark.parametrize("output", [lambda y: str(y.shape), lambda _: [], lambda y: [y[:0]]])
def test_an_output_without_numbers_is_refused(way, output):
    with pytest.raises(ValueError, match="returns no numbers for the example"):
        fold(way(lambda m, x: output(_plain(m, x))), _X)


def test_masked_outputs_are_equal(way):
    def masked(m, x):
        y = _plain(m, x)
        return y.masked_fill(torch.ones_like(y).tril().bool(), -torch.inf)

    folded, report = fold(way(masked), _X)
    assert report.norms_after == 0
    assert folded(_X).isinf().any()


@pytest.mark.parametrize(
    "nest", [lambda x: ([x],), lambda x: ({"a": (x, 3)},), lambda x: ([x, x],)]
)
def test_nested_arguments(way, nest):
    def nested(m, given):
        first = given["a"][0] if isinstance(given, dict) else given[0]
        return [{"y": _plain(m, first)}]

    model, x = way(nested), torch.randn(2, 4, 16, 16)
    folded, report = fold(model, nest(x))
    assert report.norms_after == 0
    assert compare_outputs(model, folded, [nest(x)]).max_rel < 1e-5


def test_keyword_arguments(randomise):
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _Way(_plain)

        def forward(self, x, *, double=False):
            return self.net(x) * (2 if double else 1)

    model, x = randomise(Doubling()).eval(), torch.randn(1, 4, 16, 16)
    folded, report = fold(model, {"x": _X, "double": True})
    assert report.norms_after == 0
    torch.testing.assert_close(folded(x, double=True), model(x, double=True), rtol=1e-4, atol=1e-5)


def test_several_examples_show_code_that_one_does_not_reach(way):
    def two_ways(m, x, raw=False):
        y = m.conv(x)
        return m.last(y if raw else m.norm(y))

    model, x = way(two_ways), torch.randn(1, 4, 16, 16)
    folded, report = fold(model, [(_X,), (_X, True)])
    assert report.norms_after == 1
    assert "changes by" in report.kept[0].detail
    for arguments in ((x,), (x, True)):
        assert compare_outputs(model, folded, [arguments]).max_rel < 1e-5


def test_bad_examples():
    for given, what in ((3, "got int"), ([], "empty"), ([_X, "x"], "got str")):
        with pytest.raises(ValueError, match=what):
            as_examples(given)


@pytest.mark.parametrize("side", [16, 17, 33])
def test_sizes_that_are_tried(side):
    """A network that notes the sizes it sees: odd and even, larger and smaller than the example."""
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return x.mean((2, 3))

    examples, outputs, _ = choose_examples(
        Noting(), [Example((torch.zeros(2, 3, side, side),))], []
    )
    shapes = [example.args[0].shape for example in examples]
    assert len(outputs) == len(examples)
    for axis in (2, 3):
        sizes = [shape[axis] for shape in shapes]
        assert min(sizes) < side < max(sizes)
    assert {shape[axis] % 2 for shape in shapes for axis in (2, 3)} == {0, 1}
    assert {shape[0] for shape in shapes} == {2, 3}


def test_sizes_that_are_not_taken_are_left_out():
    class Even(nn.Module):
        def forward(self, x):
            assert x.shape[-1] % 2 == 0
            return x.mean((2, 3))

    examples, *_ = choose_examples(Even(), [Example((torch.zeros(1, 3, 16, 16),))], [])
    assert all(example.args[0].shape[-1] % 2 == 0 for example in examples)
    assert len(examples) == 4  # the small one, a smaller, a larger, and the given one itself


def test_the_first_input_is_small_where_the_same_operations_run(way):
    for function, side in (
        (_plain, 36),
        (lambda m, x: _plain(m, x) if x.shape[-1] > 100 else x * 2, 128),
        (lambda m, x: _plain(m, x) if x.shape[-1] > 150 else x * 2, 160),
    ):
        model, given = way(function), Example((torch.zeros(1, 4, 160, 160),))
        mode = Operations()
        assert run_in_own_dtype(model, given, mode) is not None
        with exact_arithmetic():
            examples, _, flow = choose_examples(model.double(), [given], mode.names)
        assert examples[0].args[0].shape == flow.inputs[0].shape == (1, 4, side, side)


@pytest.mark.parametrize("large", [True, False])
def test_inner_rounds_use_a_small_input_only_for_the_same_operations(way, large):
    """A network that does something else on large inputs is observed on a large one."""

    def sized(m, x):
        y = m.norm(m.conv(x))
        return m.last(y) + (y if large and x.shape[-1] > 150 else 0)

    model = way(sized)
    folded, _ = fold(model, torch.zeros(1, 4, 160, 160))
    inputs = [torch.randn(1, 4, n, n) for n in (160, 30)]
    assert compare_outputs(model, folded, inputs).max_rel < 1e-5


def test_weights_that_do_not_fit_half_precision_are_refused(way):
    model = way(lambda m, x: m.last(m.norm(m.conv(x)).relu()))
    model.norm.weight.data.fill_(3e4)
    model.norm.running_var.fill_(1e-3)
    model.norm.running_mean.zero_()
    model.conv.bias.data.zero_()
    model.last.weight.data.mul_(1e-3)
    fold(model, _X)
    model.half()
    with pytest.raises(ValueError, match=r"conv.weight does not fit torch.float16"):
        fold(model, _X.half())
    model.conv.weight.data.mul_(1e-2)
    folded, _ = fold(model, _X.half())
    assert all(p.isfinite().all() for p in folded.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_in_plain_attributes(way, dtype):
    """Constants and caches that are no buffers, as in LeViT's attention."""

    def cached(m, x):
        m.cache.setdefault("bias", m.norm.bias.view(1, -1, 1, 1) * 1)
        y = F.conv2d(_plain(m, x), m.blur, groups=4)
        return y + m.cache["bias"]

    model = way(cached)
    model.cache, model.blur = {}, torch.full((4, 1, 2, 2), 0.25, dtype=dtype)
    model.to(dtype)
    folded, _ = fold(model, _X.to(dtype))
    assert folded.blur.dtype == dtype
    x = torch.randn(1, 4, 16, 16, dtype=dtype)
    assert compare_outputs(model, folded, [x]).max_rel < 4 * torch.finfo(dtype).eps ** 0.75


def test_a_part_of_the_network():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(3)]
    model = nn.Sequential(*parts).eval()
    for where, left in (
        ("1", ["0.1", "2.1"]),
        ("0 2.*", ["1.1"]),
        (lambda name, _: name.startswith("2"), ["0.1", "1.1"]),
    ):
        folded, report = fold(model, _X, where)
        assert [step.name for step in report.kept] == left
        assert all("outside of the part" in step.detail for step in report.kept)
        assert report.norms_after == len(left)
        assert compare_outputs(model, folded, [torch.randn(2, 4, 9, 11)]).max_rel < 1e-5
    with pytest.raises(ValueError, match="no module of the network is named 'sage'"):
        fold(model, _X, "0 sage")


def test_threads_wait_for_each_other(way):
    model, results = way(_plain), []
    threads = [threading.Thread(target=lambda: results.append(fold(model, _X))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.get_default_dtype() is torch.float32
    assert [report.norms_after for _, report in results] == [0] * 4
    assert {p.dtype for folded, _ in results for p in folded.parameters()} == {torch.float32}


def test_progress_is_shown_in_long_folds(way, capfd, monkeypatch):
    fold(way(_plain), _X)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("tinydet.reparam.apply_changes._SHOW_SECONDS", 0.0)
    fold(way(_plain), _X)
    assert "fold: at norm, " in capfd.readouterr().err


def test_multiply_adds_are_those_of_the_example(way):
    model, x = way(_plain), torch.zeros(2, 4, 150, 130)
    folded, report = fold(model, x)
    for form, found in ((model, report.macs_before), (folded, report.macs_after)):
        with FlopCounterMode(display=False) as counter:
            form(x)
        assert 2 * found == counter.get_total_flops()


def test_weights_that_are_no_parameters_of_the_network_are_refused(way):
    def hidden(m, x):
        return m.last(m.norm(m.conv(x))) * m.hidden[0]()

    class Weight(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self):
            return self.weight.relu()

    model = way(hidden)
    object.__setattr__(model, "hidden", [Weight()])  # In a list, and registered nowhere.
    with pytest.raises(ValueError, match="weights that are not among its parameters"):
        fold(model, _X)


def test_a_network_that_does_not_run_in_float64(way):
    def picky(m, x):
        if x.dtype == torch.float64:
            raise TypeError("float32 please")
        return _plain(m, x)

    with pytest.raises(ValueError, match=r"float64 on the CPU \(TypeError: float32 please\)"):
        fold(way(picky), _X)
