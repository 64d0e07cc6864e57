import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.config import Augment, Data
from tinydet.data.mixup import mixed
from tinydet.data.sample import Sample
from tinydet.data.transforms import network_size, train_transform


def sample(name, image, boxes, labels, size=None):
    return Sample(
        image=image,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.int64),
        difficult=torch.tensor([label % 2 == 1 for label in labels], dtype=torch.bool),
        image_id=name,
        size=size or tuple(image.shape[1:]),
        unreadable=(f"lost {name}",),
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mixed__is_one_blend_for_all_pixels_and_all_boxes(seed):
    random = torch.Generator().manual_seed(seed)
    one, two = (
        torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8, generator=random) for _ in range(2)
    )
    first = sample("a", one, [[0, 0, 3, 3], [1, 1, 4, 4]], [2, 3])
    second = sample("b", two, [[2, 2, 7, 9]], [5])
    out = mixed(first, second, random)
    # Each pixel, known to a half, bounds the share from both sides; some share meets all bounds.
    a, b, c = one.double(), two.double(), out.image.double()
    differ = a != b
    half = 0.5 + 1e-4  # and what float32 makes of it
    bounds = torch.stack([c - half - b, c + half - b])[:, differ] / (a - b)[differ]
    low, high = bounds.amin(0).max(), bounds.amax(0).min()
    assert 0.39 < low <= high < 0.61
    assert torch.equal(c[~differ], a[~differ])
    assert out.boxes.tolist() == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2, 7, 9]]
    assert out.labels.tolist() == [2, 3, 5]
    assert out.difficult.tolist() == [False, True, True]
    assert (out.image_id, out.size, out.scale) == ("a", (9, 7), (1.0, 1.0))
    assert out.unreadable == ("lost a", "lost b")
    assert torch.equal(first.image, one)
    assert torch.equal(second.image, two)


def test_mixed__shares_vary():
    white = sample("w", torch.full((3, 2, 2), 255, dtype=torch.uint8), [], [])
    black = sample("b", torch.zeros(3, 2, 2, dtype=torch.uint8), [], [])
    values = {
        int(mixed(white, black, torch.Generator().manual_seed(s)).image[0, 0, 0])
        for s in range(300)
    }
    assert min(values) in range(102, 105)
    assert max(values) in range(150, 154)


def test_train_transform__a_wide_image_mixed_with_an_upright_one_keeps_its_shape():
    augment = Augment(hflip=0.0, shift=0.0, mixup=1.0)
    wide = torch.zeros(3, 60, 120, dtype=torch.uint8)
    wide[0, 10:50, 20:60] = 240
    upright = torch.zeros(3, 120, 60, dtype=torch.uint8)
    upright[1, 40:80, 10:50] = 240
    first = sample("wide", wide, [[20, 10, 60, 50]], [0])
    second = sample("upright", upright, [[10, 40, 50, 80]], [1])
    kept = 0
    for seed in range(30):
        out = train_transform(Data(image_size=120, augment=augment))(
            first, torch.Generator().manual_seed(seed), another=lambda: second
        )
        assert tuple(out.image.shape[1:]) == network_size((60, 120), 120, True)
        for box, label in zip(out.boxes.int().tolist(), out.labels.tolist(), strict=True):
            x1, y1, x2, y2 = box
            area = out.image[label, y1:y2, x1:x2]
            assert (area >= 0.39 * 240).all()
            assert 0 in out.labels.tolist()
            kept += label
    assert kept > 5


def test_train_transform__mixup_off_draws_nothing_more():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    data = Data(image_size=32, augment=dataclasses.replace(Augment(), mixup=0.0))
    generator = torch.Generator().manual_seed(3)
    train_transform(data)(sample("a", image, [], []), generator, another=lambda: 1 / 0)
    alone = torch.Generator().manual_seed(3)
    train_transform(data)(sample("a", image, [], []), alone)
    assert torch.equal(generator.get_state(), alone.get_state())
