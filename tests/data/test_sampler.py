import multiprocessing

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinydet.data.sampler import TestBatches as EvaluationBatches
from tinydet.data.sampler import TrainBatches


def sizes_of(upright):
    return np.array([(20, 10) if u else (10, 20) for u in upright], dtype=np.int32)


def train(sizes, batch_size, epoch=0, **kwargs):
    batches = TrainBatches(sizes, batch_size, 0, image_size=100, **kwargs)
    batches.set_epoch(epoch)
    return batches


@settings(max_examples=100, deadline=None)
@given(
    upright=st.lists(st.booleans(), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_train_batches__every_process_gets_its_share(upright, batch_size, world_size, epoch):
    sizes = sizes_of(upright)
    seen, counts = [], set()
    for rank in range(world_size):
        sampler = train(sizes, batch_size, epoch, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        counts.add(len(batches))
        if len(batches) > 1:
            assert {len(batch) for batch in batches} == {batch_size}
        seen += [key.index for batch in batches for key in batch]
        assert {key.epoch for batch in batches for key in batch} == {epoch}
    assert len(counts) == 1, "processes would wait for each other for ever"
    # Nothing twice, but for what evens out the processes.
    even = -(-len(sizes) // world_size) * world_size
    assert len(seen) - len(set(seen)) <= even - len(sizes)
    assert len(set(seen)) >= min(len(sizes), batch_size * world_size * counts.pop()) - (
        even - len(sizes)
    )


@settings(max_examples=100, deadline=None)
@given(
    upright=st.lists(st.booleans(), min_size=1, max_size=60),
    batch_size=st.integers(1, 17),
    world_size=st.integers(1, 4),
    epochs=st.integers(1, 10),
    seed=st.integers(0, 5),
)
@example(upright=[False] * 295 + [True] * 5, batch_size=16, world_size=1, epochs=10, seed=0)
@example(upright=[False] * 188 + [True] * 12, batch_size=64, world_size=1, epochs=10, seed=0)
@example(upright=[False] * 3 + [True] * 2, batch_size=4, world_size=4, epochs=10, seed=0)
def test_train_batches__every_image_is_seen_equally_often(
    upright, batch_size, world_size, epochs, seed
):
    counts = np.zeros(len(upright), dtype=int)
    for rank in range(world_size):
        sampler = TrainBatches(
            sizes_of(upright), batch_size, seed, image_size=100, rank=rank, world_size=world_size
        )
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for batch in sampler:
                np.add.at(counts, [key.index for key in batch], 1)
    assert abs(counts - counts.mean()).max() < 1


def test_train_batches__what_is_left_out_does_not_follow_the_files_order():
    # 20 of 90 images are left out of each epoch: the same twenty for every seed would be a pattern.
    left_out = [
        set(range(90)) - {key.index for batch in sampler for key in batch}
        for seed in range(4)
        for sampler in [TrainBatches(sizes_of([False] * 90), 35, seed, image_size=100)]
    ]
    assert all(len(images) == 20 for images in left_out)
    assert len(set.union(*left_out)) > 40


def test_train_batches__the_mixed_batch_comes_at_any_place():
    sizes = sizes_of([i % 10 == 0 for i in range(100)])
    places = set()
    for epoch in range(40):
        for place, batch in enumerate(train(sizes, 20, epoch)):
            if len({sizes[key.index][0] for key in batch}) > 1:
                places.add(place)
    assert places == set(range(5))


def test_train_batches__processes_share_the_batches_of_one():
    sizes = sizes_of([i % 3 == 0 for i in range(50)])
    for epoch in range(3):
        whole = [{key.index for key in batch} for batch in train(sizes, 12, epoch)]
        shares = [list(train(sizes, 4, epoch, rank=rank, world_size=3)) for rank in range(3)]
        together = [
            {key.index for batch in parts for key in batch} for parts in zip(*shares, strict=True)
        ]
        assert together == whole


def test_train_batches__upright_images_go_together():
    sizes = sizes_of([i % 3 == 0 for i in range(90)])  # 30 upright, 60 wide
    for epoch in range(5):
        batches = list(train(sizes, 8, epoch))
        kinds = [{sizes[key.index][0] > sizes[key.index][1] for key in b} for b in batches]
        assert sum(len(kind) > 1 for kind in kinds) <= 1


def test_train_batches__one_size_a_batch_and_the_same_on_every_process():
    sizes = sizes_of([False] * 400)
    ranks = [list(train(sizes, 2, rank=r, world_size=2, multiscale=(0.5, 1.5))) for r in (0, 1)]
    drawn = []
    for batch, other in zip(*ranks, strict=True):
        (size,) = {key.image_size for key in batch + other}
        drawn.append(size)
    assert set(drawn) == {64, 96, 128, 160}  # 50 to 150, in whole strides
    assert {key.image_size for batch in train(sizes, 2) for key in batch} == {None}


def test_train_batches__refuses_what_cannot_be():
    with pytest.raises(ValueError, match="no images"):
        train(np.zeros((0, 2)), 4)
    with pytest.raises(ValueError, match="batch_size is 0"):
        train(sizes_of([True]), 0)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 40), batch_size=st.integers(1, 7), world_size=st.integers(1, 5))
def test_evaluation_batches__each_image_once_and_one_shape_a_batch(count, batch_size, world_size):
    shapes = [(32 * (1 + i % 3), 64) for i in range(count)]
    seen = []
    for rank in range(world_size):
        sampler = EvaluationBatches(shapes, batch_size, rank=rank, world_size=world_size)
        assert len(sampler) == len(list(sampler))
        for batch in sampler:
            assert len({shapes[i] for i in batch}) == 1
            assert len(batch) <= batch_size
            seen += batch
    assert sorted(seen) == list(range(count))


def _shard(rank, queue):
    shapes = [(32, 32)] * 13
    queue.put([i for b in EvaluationBatches(shapes, 4, rank=rank, world_size=2) for i in b])
    keys = train(sizes_of([False] * 14), 2, rank=rank, world_size=2)
    queue.put([-1 - key.index for batch in keys for key in batch])


def test_batches__two_processes_miss_and_repeat_nothing():
    context = multiprocessing.get_context("fork")  # "spawn" would import torch twice more
    queue = context.Queue()
    processes = [context.Process(target=_shard, args=(rank, queue)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = sorted(i for _ in range(4) for i in queue.get(timeout=120))
    for process in processes:
        process.join()
    assert found[:12] != found[1:13]
    assert sorted(i for i in found if i >= 0) == list(range(13))
    trained = [-1 - i for i in found if i < 0]
    # 14 images make 3 batches of 4; the incomplete one is dropped.
    assert len(trained) == len(set(trained)) == 12
