"""Which changes are made, which are undone, and when the rounds end."""

import pytest
import torch
from torch import nn

from tinydet.reparam.apply_changes import Change, Network, RefusedError, apply_changes
from tinydet.reparam.dataflow import observe
from tinydet.reparam.examples import Example

_EXAMPLES = [Example((torch.ones(2, 3).double(),)), Example((torch.zeros(1, 3).double(),))]


class _Silent(nn.Module):
    def forward(self, _):
        raise RuntimeError


def _sets(name, make):
    """A change that puts another module in a place once it is there no more."""

    return lambda model: Change(
        name, frozenset((name,)), lambda: (f"made {name}", {getattr(model, name): make()})
    )


def _find(changes):
    def find(model, flow, refused):
        del flow, refused
        proposed = [change(model) for change in changes]
        return [c for c in proposed if isinstance(getattr(model, c.name), nn.Dropout)]

    return find


def _model(layers=4):
    return nn.Sequential(*(nn.Dropout() for _ in range(layers))).double().eval()


def _apply(find, layers=4, where=None):
    model = _model(layers)
    expected = [example.run(model) for example in _EXAMPLES]
    flow = observe(model, _EXAMPLES[0], is_leaf=lambda _: False)
    network = Network(model, _EXAMPLES, expected, lambda: _model(layers), flow, where)
    return network, *apply_changes(network, find)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lambda: nn.LeakyReLU(1.0 - 1e-6), None),
        (lambda: nn.Threshold(2.0, 0.0), "its output changes by"),
        (lambda: nn.Threshold(-0.5, 5.0), None),
        (lambda: nn.Hardtanh(0.5, 9.0), "no longer zero"),
        (_Silent, "the network no longer runs (RuntimeError: )"),
    ],
    ids=["same here", "other", "same everywhere looked at", "other on the second", "fails"],
)
def test_only_the_bad_change_is_undone(bad, why):
    changes = [_sets("0", nn.Identity), _sets("1", bad), _sets("3", nn.Identity)]
    network, done, refused = _apply(_find(changes))
    kinds = [type(m) for m in network.model]
    assert kinds[0] is kinds[3] is nn.Identity
    assert kinds[2] is nn.Dropout
    assert (kinds[1] is nn.Dropout) == (why is not None)
    assert {step.name for step in done} == ({"0", "3"} if why else {"0", "1", "3"})
    assert set(refused) == ({"1"} if why else set())
    assert why is None or why in refused["1"]


def test_one_bad_change_among_many_is_found_in_few_rounds():
    rounds = []
    changes = [_sets(str(i), nn.Tanh if i == 37 else nn.Identity) for i in range(64)]

    def find(model, flow, refused):
        rounds.append(len(refused))
        return _find(changes)(model, flow, refused)

    network, done, refused = _apply(find, layers=64)
    assert set(refused) == {"37"}
    assert len(done) == 63
    assert [i for i, m in enumerate(network.model) if isinstance(m, nn.Dropout)] == [37]
    assert len(rounds) < 20


def test_only_the_selected_modules_are_touched():
    def change(name):
        def proposed(model):
            module = model[int(name)]
            return Change(name, frozenset((module,)), lambda: ("", {module: nn.Identity()}))

        return proposed

    def find(model, flow, refused):
        del flow
        left = [n for n, m in model.named_children() if isinstance(m, nn.Dropout)]
        return [change(n)(model) for n in left if n not in refused]

    network, done, refused = _apply(find, where=lambda name, _: name in "13")
    assert [type(m) for m in network.model] == 2 * [nn.Dropout, nn.Identity]
    assert {step.name for step in done} == {"1", "3"}
    assert refused == dict.fromkeys("02", "it is outside of the part to fold")


def test_refused_changes_may_be_proposed_in_another_way():
    def find(model, flow, refused):
        del flow
        if isinstance(model[0], nn.Identity):
            return []
        if "first way" in refused:
            return [_sets("0", nn.Identity)(model)]
        return [Change("first way", frozenset(), _refuse)]

    network, done, refused = _apply(find)
    assert [step.name for step in done] == ["0"]
    assert refused == {"first way": "not so"}
    assert isinstance(network.model[0], nn.Identity)


def _refuse():
    raise RefusedError("not so")


def test_changes_that_touch_the_same_wait_for_the_next_round():
    seen = []

    def slow(model, name, needs):
        def change():
            assert needs <= {n for n, m in model.named_children() if isinstance(m, nn.Identity)}
            return "", {getattr(model, name): nn.Identity()}

        return Change(name, frozenset(("all",)), change)

    def find(model, flow, refused):
        del flow, refused
        left = [n for n, m in model.named_children() if isinstance(m, nn.Dropout)]
        seen.append(left)
        return [slow(model, n, {str(i) for i in range(int(n))}) for n in left]

    _, done, _ = _apply(find)
    assert [step.name for step in done] == ["0", "1", "2", "3"]
    assert len(seen) == 5
