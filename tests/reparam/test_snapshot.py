import copy

import torch
from torch import nn

from tinydet.reparam.snapshot import Snapshot


class _Other(nn.Conv2d):
    pass


def test_restore():
    conv = nn.Conv2d(2, 2, 1)
    model = nn.Sequential(conv, nn.BatchNorm2d(2), nn.Sequential(nn.ReLU()))
    model.lists = [[conv], {"last": (model[2],)}]
    handle = conv.register_forward_hook(lambda *_: None)
    state, keys = copy.deepcopy(model.state_dict()), set(vars(conv))
    snapshot = Snapshot(model)

    conv.__class__ = _Other
    conv.weight = nn.Parameter(torch.zeros(3, 2, 1, 1))
    conv.bias = None
    conv.extra, conv.note = nn.ReLU(), "new"
    model.lists[0][0] = model.lists[1]["last"] = nn.Identity()
    model[1] = nn.Identity()
    model[2].add_module("more", nn.Linear(2, 2))
    conv._forward_hooks.clear()
    del model[2][0]
    snapshot.restore()

    assert type(model[0]) is nn.Conv2d
    assert set(vars(conv)) == keys
    assert "extra" not in dict(conv.named_children())
    assert list(map(type, model)) == [nn.Conv2d, nn.BatchNorm2d, nn.Sequential]
    assert list(map(type, model[2])) == [nn.ReLU]
    assert model.lists == [[conv], {"last": (model[2],)}]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(conv._forward_hooks) == 1
    handle.remove()
    assert not conv._forward_hooks
