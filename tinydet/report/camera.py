"""The newest frame of a camera, and a window to show it in."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tinydet.report.video import Video, bgr, opencv


def newest_frames(frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Yield the newest frame at each request; a thread reads all frames and drops older ones.

    Args:
        frames: frames of a camera.

    Yields:
        A frame, and how many have arrived since the previous one, itself included: 1 if none was
        dropped. The last frame is never dropped.
    """
    changed = threading.Condition()
    newest = torch.empty(0)
    count, ended = 0, False
    failure: Exception | None = None

    def read() -> None:
        nonlocal newest, count, ended, failure
        try:
            for frame in frames:
                with changed:
                    if ended:
                        return
                    newest, count = frame, count + 1
                    changed.notify()
        except Exception as error:
            failure = error
        finally:
            with changed:
                ended = True
                changed.notify()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    seen = 0
    try:
        while True:
            with changed:
                while count == seen and not ended:
                    changed.wait()
                if count == seen:
                    break
                frame, new, seen = newest, count - seen, count
            yield frame, new
    finally:
        with changed:
            ended = True
        thread.join()
    if failure is not None:
        raise failure


def as_camera(video: Video) -> Iterator[Tensor]:
    """Yield the frames of a video file at the speed that a camera would deliver them."""
    begin = time.monotonic()
    for i, frame in enumerate(video):
        time.sleep(max(0.0, begin + i / video.frames_per_second - time.monotonic()))
        yield frame


class Window:
    """A window on the screen, with the interface of a `VideoFile`."""

    def __init__(self, title: str) -> None:
        """Open the window.

        Raises:
            ValueError: OpenCV is missing or cannot open windows, or there is no screen.
        """
        cv2 = opencv()
        # Without a screen OpenCV would end the whole process.
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
            raise ValueError("there is no screen here; record with --out FILE")
        self._title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise ValueError(
                "this OpenCV opens no windows: replace it by opencv-python, or record with --out "
                "FILE"
            ) from error

    def show(self, image: Tensor, times: int = 1) -> bool:
        """Show a frame, (3, H, W) uint8 RGB, until the next one.

        Args:
            image: the frame.
            times: unused; a `VideoFile` repeats the frame that often.

        Returns:
            Whether to continue: False once the user pressed q or closed the window.
        """
        del times
        cv2 = opencv()
        cv2.imshow(self._title, bgr(image))
        quitting = cv2.waitKey(1) & 0xFF == ord("q")
        return not quitting and cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1

    def __enter__(self) -> Window:
        """Return the window itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the window."""
        opencv().destroyAllWindows()
