import torch

from tinydet.data.seeding import integer, seeded_generator, uniform


def test_seeded_generator__the_whole_key_counts():
    def draw(*key):
        return torch.rand(4, generator=seeded_generator(*key)).tolist()

    keys = [(0, 1), (1, 0), (0, 0, 1), (1,), ("a", 0, 1), ("b", 0, 1)]
    draws = [draw(*key) for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)
    assert draws[0] == draw(0, 1)


def test_seeded_generator__fixed_for_ever():
    # Another number here would make finished runs irreproducible.
    assert torch.rand(1, generator=seeded_generator("sample", 0, 0, 0)).item() == 0.5348005294799805


def test_uniform_and_integer__ranges():
    generator = seeded_generator(0)
    values = [uniform(generator, 2.0, 3.0) for _ in range(200)]
    assert 2.0 <= min(values) < 2.1
    assert 2.9 < max(values) < 3.0
    assert {integer(generator, -1, 1) for _ in range(100)} == {-1, 0, 1}
