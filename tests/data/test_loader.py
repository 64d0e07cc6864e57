import dataclasses
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch

from tinydet.config import Augment, Data
from tinydet.data.canvas import PAD_VALUE
from tinydet.data.dataset import DetectionDataset
from tinydet.data.loader import (
    WorkerDiedError,
    choose_workers,
    collate,
    dead_workers_named,
    make_test_loader,
    make_train_loader,
)
from tinydet.data.sample import Sample
from tinydet.data.sampler import SampleKey
from tinydet.data.sources import TrainingImages
from tinydet.data.voc import read_index

DATA = Data(image_size=64, workers=0, augment=Augment(0.3, 0.1, (0.5, 1.5), multiscale=(0.5, 1.5)))


@pytest.fixture
def dataset(tree):
    names = [f"{i:02d}" for i in range(11)]
    for i, name in enumerate(names):
        objects = [("cat", (3 + i, 3, 30 + i, 30)), ("dog", (2, 2, 12, 12 + i), True)]
        tree.add(name, objects if i != 4 else [], size=(50, 70) if i % 3 == 0 else (60, 40))
    return DetectionDataset(read_index(tree.split(*names), "train"))


def test_make_train_loader__same_batches_whatever_number_of_workers(dataset):
    runs = []
    for workers in (0, 2):
        data = dataclasses.replace(DATA, workers=workers)
        loader = make_train_loader(dataset, data, batch_size=2, seed=3)
        torch.manual_seed(workers)
        batches = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            batches += list(loader)
        runs.append(batches)
    assert len(runs[0]) == len(runs[1]) == 10
    for one, two in zip(*runs, strict=True):
        assert one.image_ids == two.image_ids
        assert torch.equal(one.images, two.images)
        for target, other in zip(one.targets, two.targets, strict=True):
            assert torch.equal(target["boxes"], other["boxes"])
            assert torch.equal(target["labels"], other["labels"])


STRONG = Augment(
    scale=(0.5, 1.5),
    multiscale=(0.5, 1.5),
    hsv=(0.015, 0.7, 0.4),
    mosaic=0.5,
    mixup=0.5,
    rotate=10.0,
    shear=3.0,
    translate=0.1,
    zoom=(0.8, 1.25),
)


def batches_of(dataset, augment, which=(0,), workers=0, **kwargs):
    data = dataclasses.replace(DATA, augment=augment, workers=workers)
    loader = make_train_loader(dataset, data, batch_size=2, seed=3, **kwargs)
    for epoch in which:
        loader.set_epoch(epoch)
        yield from loader


def assert_same(batches, others):
    for one, two in zip(batches, others, strict=True):
        assert one.image_ids == two.image_ids
        assert torch.equal(one.images, two.images)
        for target, other in zip(one.targets, two.targets, strict=True):
            for name in ("boxes", "labels", "difficult"):
                assert torch.equal(target[name], other[name])


@pytest.mark.parametrize("workers", [1, 2])
def test_make_train_loader__mosaics_and_mixes_depend_on_seed_epoch_and_index_only(dataset, workers):
    torch.manual_seed(workers)
    expected = batches_of(dataset, STRONG, (0, 1))
    assert_same(expected, batches_of(dataset, STRONG, (0, 1), workers=workers))
    # Nor on how many processes train: a sample is the same in whatever batch of one size.
    fixed = dataclasses.replace(STRONG, multiscale=(1.0, 1.0))
    alone = {
        name: target["boxes"]
        for batch in batches_of(dataset, fixed)
        for name, target in zip(batch.image_ids, batch.targets, strict=True)
    }
    both = {
        name: target["boxes"]
        for rank in range(2)
        for batch in batches_of(dataset, fixed, rank=rank, world_size=2)
        for name, target in zip(batch.image_ids, batch.targets, strict=True)
    }
    assert len(alone.keys() & both.keys()) > 5
    assert all(torch.equal(alone[name], both[name]) for name in alone.keys() & both.keys())


def test_make_train_loader__mosaics_draw_from_the_whole_split(dataset):
    read = set()
    source = make_train_loader(
        dataset, dataclasses.replace(DATA, augment=Augment(mosaic=1.0)), batch_size=11
    ).dataset
    decode = source.images.read
    source.images.read = lambda i: read.add(i) or decode(i)
    for epoch in range(8):
        source[SampleKey(0, epoch, None)]
    assert len(read) > 7
    # And two epochs differ in what they draw.
    one, two = source[SampleKey(0, 0, None)], source[SampleKey(0, 1, None)]
    assert not torch.equal(one.image, two.image)


def test_make_train_loader__last_epochs_are_plain(dataset):
    strong = dataclasses.replace(STRONG, plain_epochs=2)
    weak = Augment(scale=STRONG.scale, multiscale=STRONG.multiscale)
    same = []
    for epoch in range(5):
        pairs = zip(
            batches_of(dataset, strong, [epoch], epochs=5),
            batches_of(dataset, weak, [epoch], epochs=5),
            strict=True,
        )
        same.append(all(torch.equal(one.images, two.images) for one, two in pairs))
    assert same == [False, False, False, True, True]
    # Without the length of the run no epoch is the last.
    assert_same(batches_of(dataset, strong, [4]), batches_of(dataset, STRONG, [4], epochs=5))


def test_make_train_loader__unreadable_parts_of_a_mosaic_are_replaced_and_reported(dataset, caplog):
    dataset.index.image_path(4).write_text("no image any more")
    with caplog.at_level(logging.WARNING):
        batches = list(batches_of(dataset, Augment(mosaic=1.0, mixup=1.0), range(2)))
    assert len(batches) == 10
    assert ["image 04 " in r.getMessage() for r in caplog.records] == [True]


def test_make_train_loader__no_difficult_objects_of_any_part(dataset):
    augment = Augment(mosaic=1.0, mixup=1.0)
    labels = [
        label
        for batch in batches_of(dataset, augment)
        for target in batch.targets
        for label in target["labels"].tolist()
    ]
    assert set(labels) == {0}  # every dog is difficult
    assert len(labels) > 30


@pytest.mark.parametrize("workers", [0, 2])
def test_make_train_loader__an_epoch_broken_off_leaves_no_trace(dataset, workers):
    data = dataclasses.replace(DATA, workers=workers)
    loader = make_train_loader(dataset, data, batch_size=2)
    next(iter(loader))
    loader.set_epoch(1)
    batches = list(loader)
    fresh = make_train_loader(dataset, DATA, batch_size=2)
    fresh.set_epoch(1)
    for one, two in zip(batches, fresh, strict=True):
        assert one.image_ids == two.image_ids
        assert torch.equal(one.images, two.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_make_train_loader__an_epoch_begun_in_the_middle_is_the_rest_of_it(dataset, workers):
    loader = make_train_loader(dataset, DATA, batch_size=2, seed=5)
    loader.set_epoch(3)
    whole = list(loader)
    data = dataclasses.replace(DATA, workers=workers)
    late = make_train_loader(dataset, data, batch_size=2, seed=5)
    late.set_epoch(3, start=3)
    rest = list(late)
    assert len(late) == len(whole) == 5
    assert len(rest) == 2
    for one, two in zip(whole[3:], rest, strict=True):
        assert one.image_ids == two.image_ids
        assert torch.equal(one.images, two.images)
    late.set_epoch(3, start=5)
    assert list(late) == []
    late.set_epoch(4)
    assert len(list(late)) == 5


def test_make_train_loader__what_is_left_out_is_not_read(dataset, monkeypatch):
    read = []
    original = TrainingImages.read
    monkeypatch.setattr(TrainingImages, "read", lambda self, i: read.append(i) or original(self, i))
    loader = make_train_loader(dataset, DATA, batch_size=2)
    loader.set_epoch(0, start=4)
    list(loader)
    assert len(read) == 2


def test_make_train_loader__draws_nothing_that_the_model_draws_from(dataset):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_train_loader(dataset, DATA, batch_size=2))
    assert torch.equal(before, torch.get_rng_state())


class _Dies:
    """A transform that ends its loader process as the kernel does when memory runs out."""

    def __call__(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def test_dead_workers_named__says_in_one_line_what_to_do(dataset):
    dataset.transform = _Dies()
    data = dataclasses.replace(DATA, workers=1)
    with pytest.raises(WorkerDiedError, match=r"data\.workers") as caught, dead_workers_named():
        list(make_train_loader(dataset, data, batch_size=2))
    assert "\n" not in str(caught.value)
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        with pytest.raises(WorkerDiedError, match=r"data\.workers"), dead_workers_named():
            raise error
    with pytest.raises(RuntimeError, match="another"), dead_workers_named():
        raise RuntimeError("another")


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="needs priorities of processes")
def test_make_train_loader__a_model_on_the_cpu_goes_before_the_loader(dataset):
    loader = make_train_loader(dataset, dataclasses.replace(DATA, workers=1), batch_size=2)
    iterator = iter(loader)
    next(iterator)
    # Of the running iterator: torch tells nobody else who its workers are.
    worker = loader._iterator._workers[0].pid
    assert os.getpriority(os.PRIO_PROCESS, worker) == 19


def test_make_train_loader__epochs_and_seeds_differ(dataset):
    data = dataclasses.replace(DATA, augment=Augment(color_jitter=0.4))

    def first(epoch, seed):
        loader = make_train_loader(dataset, data, batch_size=11, seed=seed)
        loader.set_epoch(epoch)
        (batch,) = loader
        order = sorted(range(11), key=lambda i: batch.image_ids[i])
        return batch.image_ids, batch.images[order]

    ids, images = first(0, 0)
    assert sorted(ids) == sorted(dataset.index.image_ids)
    for epoch, seed in ((1, 0), (0, 1)):
        other_ids, other_images = first(epoch, seed)
        assert other_ids != ids
        assert not torch.equal(other_images, images)
    again_ids, again_images = first(0, 0)
    assert again_ids == ids
    assert torch.equal(again_images, images)


def test_make_train_loader__no_difficult_objects_and_empty_images_stay(dataset):
    data = dataclasses.replace(DATA, augment=Augment(hflip=0.0, shift=0.0))
    (batch,) = make_train_loader(dataset, data, batch_size=11)
    for name, target in zip(batch.image_ids, batch.targets, strict=True):
        assert target["labels"].tolist() == ([] if name == "04" else [0])
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert not target["difficult"].any()


def test_make_train_loader__incomplete_batch_only_if_there_is_no_other(dataset):
    assert [len(b) for b in make_train_loader(dataset, DATA, batch_size=4)] == [4, 4]
    loader = make_train_loader(dataset, DATA, batch_size=32)
    assert len(loader) == 1
    assert [len(b) for b in loader] == [11]


def test_make_train_loader__unreadable_image_is_replaced_and_reported_once(dataset, caplog):
    path = dataset.index.image_path(10)
    path.write_bytes(path.read_bytes()[:300])
    dataset.index.image_path(0).unlink()
    loader = make_train_loader(dataset, DATA, batch_size=11)
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            loader.set_epoch(epoch)
            (batch,) = loader
            # The next readable one: 1 stands in for 0, and for 10 by way of 0.
            assert sorted(batch.image_ids) == sorted(
                ["01", "01", "01"] + [f"{i:02d}" for i in range(2, 10)]
            )
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert any("image 10 " in m for m in messages)
    assert any("image 00 " in m for m in messages)


def test_make_train_loader__nothing_readable_is_an_error(dataset):
    for i in range(11):
        dataset.index.image_path(i).unlink()
    with pytest.raises(ValueError, match="none of its images"):
        next(iter(make_train_loader(dataset, DATA, batch_size=2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_make_train_loader__an_error_is_one_line_in_a_loader_process_too(dataset, workers):
    for i in range(11):
        dataset.index.image_path(i).unlink()
    data = dataclasses.replace(DATA, workers=workers)
    with pytest.raises(ValueError, match=r"^\S+: none of its images can be decoded$"):
        next(iter(make_train_loader(dataset, data, batch_size=2)))


def test_make_train_loader__own_transform(dataset):
    def transform(sample, _):
        return dataclasses.replace(sample, image=torch.zeros(3, 5, 5, dtype=torch.uint8))

    data = dataclasses.replace(DATA, augment=Augment())
    own = DetectionDataset(dataset.index, transform)
    batch = next(iter(make_train_loader(own, data, batch_size=2)))
    assert batch.images.shape == (2, 3, 32, 32)


def test_make_test_loader__every_image_once_and_boxes_lead_back(dataset):
    batches = list(make_test_loader(dataset, DATA, batch_size=3))
    assert sorted(name for b in batches for name in b.image_ids) == dataset.index.image_ids
    number = {name: i for i, name in enumerate(dataset.index.image_ids)}
    for batch in batches:
        for name, size, (sy, sx), target in zip(
            batch.image_ids, batch.sizes, batch.scales, batch.targets, strict=True
        ):
            boxes, labels, difficult = dataset.index.objects(number[name])
            back = target["boxes"] / torch.tensor([sx, sy, sx, sy])
            torch.testing.assert_close(back, torch.tensor(boxes))
            assert target["labels"].tolist() == labels.tolist()
            assert target["difficult"].tolist() == difficult.tolist()
            assert size == dataset.index.size(number[name])


def test_make_test_loader__images_do_not_depend_on_the_batch_size(dataset):
    images = []
    for batch_size in (1, 4):
        loader = make_test_loader(dataset, DATA, batch_size)
        images.append({n: x for b in loader for n, x in zip(b.image_ids, b.images, strict=True)})
    for name in images[0]:
        assert torch.equal(images[0][name], images[1][name])


def test_make_test_loader__unreadable_image_is_grey(dataset, caplog):
    dataset.index.image_path(3).write_text("no image any more")
    loader = make_test_loader(dataset, DATA, batch_size=1)
    with caplog.at_level(logging.WARNING):
        batches = {b.image_ids[0]: b for b in loader}
    assert sorted(batches) == dataset.index.image_ids
    assert (batches["03"].images == PAD_VALUE).all()
    assert len(batches["03"].targets[0]["boxes"]) == 2
    assert ["image 03 " in r.getMessage() for r in caplog.records] == [True]


def test_collate__pads_to_whole_strides():
    def sample(height, width):
        image = torch.full((3, height, width), 9, dtype=torch.uint8)
        empty = torch.zeros(0, dtype=torch.int64)
        return Sample(image, torch.zeros(0, 4), empty, empty.bool(), "a", (height, width))

    batch = collate([sample(33, 20), sample(5, 70)], keep_difficult=False)
    assert batch.images.shape == (2, 3, 64, 96)
    assert (batch.images[0, :, :33, :20] == 9).all()
    assert (batch.images == 9).sum() == 3 * (33 * 20 + 5 * 70)
    assert set(batch.images.unique().tolist()) == {9, PAD_VALUE}
    assert batch.targets[0]["boxes"].shape == (0, 4)


def test_choose_workers():
    assert choose_workers(3, "cpu") == 3
    assert choose_workers(0, "cuda") == 0
    assert choose_workers(-1, "cpu") in (1, 2)
    assert choose_workers(-1, "cpu", world_size=1000) == 1
    assert 1 <= choose_workers(-1, "cuda") <= 8


@pytest.mark.parametrize(("epochs", "told"), [(3, True), (4, False), (None, False)])
def test_make_train_loader__a_run_of_plain_epochs_alone_is_told(dataset, epochs, told, caplog):
    data = replace(DATA, augment=Augment(mosaic=1.0, plain_epochs=3))
    make_train_loader(dataset, data, batch_size=2, epochs=epochs)
    assert ("no epoch of 3 has mosaic" in caplog.text) == told
