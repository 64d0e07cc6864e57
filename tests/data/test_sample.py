from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from tinydet.data.sample import Batch


def batch():
    target = {
        "boxes": torch.zeros(2, 4),
        "labels": torch.zeros(2, dtype=torch.int64),
        "difficult": torch.zeros(2, dtype=torch.bool),
    }
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    return Batch(images, [target], ["a"], [(10, 20)], [(1.0, 2.0)], ["b"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch__pin_memory():
    pinned = batch().pin_memory()
    assert pinned.images.is_pinned()
    assert all(v.is_pinned() for v in pinned.targets[0].values())
    assert torch.equal(pinned.to("cuda").images.cpu(), pinned.images)


def test_batch__to_moves_every_tensor_and_keeps_the_rest():
    first = batch()
    moved = first.to("meta")
    assert moved.images.device.type == "meta"
    assert {v.device.type for v in moved.targets[0].values()} == {"meta"}
    assert (moved.image_ids, moved.sizes, moved.scales) == (["a"], [(10, 20)], [(1.0, 2.0)])
    assert moved.unreadable == ["b"]
    assert first.images.device.type == "cpu"
    assert len(moved) == 1


def test_batch__between_processes_the_images_alone_go_as_a_file(monkeypatch):
    sent = []
    send = ForkingPickler._extra_reducers[torch.Tensor]
    monkeypatch.setitem(
        ForkingPickler._extra_reducers, torch.Tensor, lambda t: sent.append(t.shape) or send(t)
    )
    first = batch()
    first.targets[0]["boxes"][:] = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    arrived = ForkingPickler.loads(ForkingPickler.dumps(first))
    assert sent == [(1, 3, 32, 32)]
    assert torch.equal(arrived.images, first.images)
    for name, values in first.targets[0].items():
        assert arrived.targets[0][name].dtype == values.dtype
        assert torch.equal(arrived.targets[0][name], values)
    assert (arrived.image_ids, arrived.sizes, arrived.unreadable) == (["a"], [(10, 20)], ["b"])
