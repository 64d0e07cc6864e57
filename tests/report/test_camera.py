import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cv2")

import cv2

from tinydet.report import camera
from tinydet.report.camera import Window, as_camera, newest_frames


def test_the_newest_frame_comes_and_those_before_it_are_counted():
    first_taken, five_more, second_taken = (threading.Event() for _ in range(3))

    def frames():
        for i in range(10):
            if i == 1:
                first_taken.wait()
            if i == 6:  # Whoever asks for the next frame has put the last one in its place.
                five_more.set()
                second_taken.wait()
            yield i

    taken = newest_frames(frames())
    assert next(taken) == (0, 1)
    first_taken.set()
    five_more.wait()
    assert next(taken) == (5, 5)
    second_taken.set()
    rest = list(taken)
    assert rest[-1][0] == 9
    assert sum(new for _, new in rest) == 4


def test_a_slow_camera_loses_nothing():
    assert list(newest_frames(iter([]))) == []
    asked = threading.Semaphore(0)

    def frames():
        for i in range(5):
            asked.acquire()
            yield i

    taken = []
    asked.release()
    for frame in newest_frames(frames()):
        taken.append(frame)
        asked.release()
    assert taken == [(i, 1) for i in range(5)]


def test_a_camera_that_fails_is_told_after_its_frames():
    def frames():
        yield 1
        raise ValueError("unplugged")

    taken = newest_frames(frames())
    assert next(taken) == (1, 1)
    with pytest.raises(ValueError, match="unplugged"):
        next(taken)


def test_who_stops_asking_stops_the_reading():
    read = []

    def frames():
        while True:
            read.append(0)
            yield 0

    before = threading.active_count()
    taken = newest_frames(frames())
    next(taken)
    taken.close()
    count = len(read)
    assert threading.active_count() == before
    assert len(read) == count


def test_a_file_plays_at_its_own_speed(monkeypatch):
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(camera, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))

    class Film(list):
        frames_per_second = 4.0

    times = []
    for i, _ in enumerate(as_camera(Film("abcd"))):
        times.append(now[0] - 100)
        now[0] += 0.1 if i != 1 else 1.0  # Who asks late waits for nothing.
    assert times == pytest.approx([0, 0.25, 1.25, 1.35])
    assert slept == pytest.approx([0, 0.15, 0, 0])


@pytest.fixture
def screen(monkeypatch):
    """A window's calls; OpenCV here may have none of its own."""
    calls = SimpleNamespace(shown=[], key=-1, visible=1.0, closed=False)
    monkeypatch.setenv("DISPLAY", ":9")
    for name, function in {
        "namedWindow": lambda *_: None,
        "imshow": lambda _, frame: calls.shown.append(frame),
        "waitKey": lambda _: calls.key,
        "getWindowProperty": lambda *_: calls.visible,
        "destroyAllWindows": lambda: setattr(calls, "closed", True),
    }.items():
        monkeypatch.setattr(cv2, name, function)
    return calls


def test_a_window_shows_until_q_is_pressed_or_it_is_closed(screen):
    red = torch.zeros(3, 4, 6, dtype=torch.uint8)
    red[0] = 255
    with Window("camera 0") as window:
        assert window.show(red)
        assert screen.shown[0].shape == (4, 6, 3)
        assert screen.shown[0][0, 0].tolist() == [0, 0, 255]  # BGR
        screen.key = ord("x")
        assert window.show(red)
        screen.key = ord("q")
        assert not window.show(red)
        screen.key, screen.visible = -1, 0.0
        assert not window.show(red)
    assert screen.closed


def test_a_window_where_opencv_has_none(monkeypatch):
    def none(*_):
        raise cv2.error("not implemented")

    monkeypatch.setenv("DISPLAY", ":9")
    monkeypatch.setattr(cv2, "namedWindow", none)
    with pytest.raises(ValueError, match=r"opens no windows.*--out FILE"):
        Window("camera 0")


def test_a_window_where_there_is_no_screen(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ValueError, match=r"no screen here; record with --out FILE"):
        Window("camera 0")
