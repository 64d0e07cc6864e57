import gc
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydet.data.image_cache import ImageCache

MB = 2**20


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@settings(max_examples=50, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=12),
    budget=st.integers(1, 4),
)
def test_image_cache__never_takes_more_than_its_budget(sides, budget):
    cache = ImageCache(np.array(sides, dtype=np.int32), budget)
    assert os.fstat(cache._file.fileno()).st_size == max(1, cache.nbytes) <= budget * MB
    # The first ones that fit, and no fewer.
    needed = np.cumsum([3 * h * w + 1 for h, w in sides])
    assert cache.count == (needed <= budget * MB).sum()
    images = [image(*side, seed=i) for i, side in enumerate(sides)]
    for i, pixels in enumerate(images):
        assert cache.get(i) is None
        cache.put(i, pixels)
    for i, pixels in enumerate(images):
        kept = cache.get(i)
        assert (kept is not None) == (i < cache.count)
        if kept is not None:
            np.testing.assert_array_equal(kept, pixels)


def test_image_cache__the_whole_budget_is_used():
    cache = ImageCache(np.array([(1, MB // 3), (1, 1)]), 1)
    assert 3 * (MB // 3) + 1 == MB
    assert (cache.count, cache.nbytes) == (1, MB)


def test_image_cache__what_it_gives_is_a_copy():
    cache = ImageCache(np.array([(4, 5)]), 1)
    pixels = image(4, 5)
    cache.put(0, pixels)
    cache.get(0)[:] = 0
    np.testing.assert_array_equal(cache.get(0), pixels)


def test_image_cache__an_image_of_other_sides_is_not_kept():
    cache = ImageCache(np.array([(4, 5), (5, 4)]), 1)
    cache.put(0, image(5, 4))
    assert cache.get(0) is None
    assert cache.get(1) is None


def _write(cache, number):
    for i in range(4):
        cache.put(i, image(40, 50, seed=i))
    cache.put(4 + number, image(40, 50, seed=4 + number))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_image_cache__processes_see_each_others_images(method):
    cache = ImageCache(np.array([(40, 50)] * 7), 1)
    context = multiprocessing.get_context(method)
    processes = [context.Process(target=_write, args=(cache, i)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for i in range(6):
        np.testing.assert_array_equal(cache.get(i), image(40, 50, seed=i))
    assert cache.get(6) is None


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="Linux only")
def test_image_cache__nothing_is_left_of_it_even_by_kill_9():
    before = set(os.listdir("/dev/shm"))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        cache = ImageCache(np.array([(100, 100)] * 8), 1)
        for i in range(8):
            cache.put(i, image(100, 100))
        os.write(writer, b"filled")
        time.sleep(60)
        os._exit(1)
    os.read(reader, 100)
    assert set(os.listdir("/dev/shm")) == before
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert set(os.listdir("/dev/shm")) == before
    # And in the process itself it goes with its last user.
    cache = ImageCache(np.array([(100, 100)]), 1)
    number = cache._file.fileno()
    del cache
    gc.collect()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)
