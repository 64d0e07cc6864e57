"""Which changes are made, which are undone, and when the rounds end."""

import pytest
import torch
from torch import nn

from tinydet.reparam.apply_changes import Change, RefusedError, apply_changes

_CHECKS = [(torch.ones(2, 3, dtype=torch.float64),), (torch.zeros(1, 3, dtype=torch.float64),)]


class _Silent(nn.Module):
    def forward(self, _):
        raise RuntimeError


def _sets(name, make):
    """A change that puts another module in a place once it is there no more."""

    def change(model):
        setattr(model, name, make())
        return model, f"made {name}"

    return Change(name, frozenset((name,)), change)


def _find(changes):
    def find(model, flow, refused):
        del flow, refused
        return [c for c in changes if isinstance(getattr(model, c.name), nn.Dropout)]

    return find


def _model():
    return nn.Sequential(*(nn.Dropout() for _ in range(4))).double().eval()


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
    model, done, refused = apply_changes(_model(), _CHECKS, _find(changes))
    kinds = [type(m) for m in model]
    assert kinds[0] is kinds[3] is nn.Identity
    assert kinds[2] is nn.Dropout
    assert (kinds[1] is nn.Dropout) == (why is not None)
    assert {step.name for step in done} == ({"0", "3"} if why else {"0", "1", "3"})
    assert set(refused) == ({"1"} if why else set())
    assert why is None or why in refused["1"]


def test_refused_changes_may_be_proposed_in_another_way():
    def find(model, flow, refused):
        del flow
        if isinstance(model[0], nn.Identity):
            return []
        if "first way" in refused:
            return [_sets("0", nn.Identity)]
        return [Change("first way", frozenset(), _refuse)]

    model, done, refused = apply_changes(_model(), _CHECKS, find)
    assert [step.name for step in done] == ["0"]
    assert refused == {"first way": "not so"}
    assert isinstance(model[0], nn.Identity)


def _refuse(_):
    raise RefusedError("not so")


def test_changes_that_touch_the_same_wait_for_the_next_round():
    seen = []

    def slow(name, needs):
        def change(model):
            assert needs <= {n for n, m in model.named_children() if isinstance(m, nn.Identity)}
            setattr(model, name, nn.Identity())
            return model, ""

        return Change(name, frozenset(("all",)), change)

    def find(model, flow, refused):
        del flow, refused
        left = [n for n, m in model.named_children() if isinstance(m, nn.Dropout)]
        seen.append(left)
        return [slow(n, {str(i) for i in range(int(n))}) for n in left]

    _, done, _ = apply_changes(_model(), _CHECKS, find)
    assert [step.name for step in done] == ["0", "1", "2", "3"]
    assert len(seen) == 5
