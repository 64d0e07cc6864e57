"""A camera's newest picture, and a window to show it in."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator

from torch import Tensor

from tinydet.report.video import Video, bgr, opencv


def newest_frames(frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Yield the newest frame each time one is asked for; a thread reads, and drops the others.

    Args:
        frames: of a camera, which come when they come.

    Yields:
        A frame, and how many have come since the one before, itself included: 1 if none was
        dropped. The last frame is always among them.
    """
    changed = threading.Condition()
    newest: Tensor | None = None
    count, ended, failure = 0, False, None

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
    """Yield a video file's frames no sooner than a camera would have seen them."""
    begin = time.monotonic()
    for i, frame in enumerate(video):
        time.sleep(max(0.0, begin + i / video.frames_per_second - time.monotonic()))
        yield frame


class Window:
    """A window on the screen, in the place of a `VideoFile`."""

    def __init__(self, title: str) -> None:
        """Open it.

        Raises:
            ValueError: OpenCV is missing, or the one installed opens no windows, or there is no
                screen.
        """
        cv2 = opencv()
        # There OpenCV's own windows end the whole process.
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
            raise ValueError("there is no screen here; record with --out FILE")
        self._title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise ValueError(
                "this OpenCV opens no windows: pip install opencv-python in its place on a machine "
                "with a screen, or record with --out FILE"
            ) from error

    def show(self, image: Tensor, times: int = 1) -> bool:
        """Show a frame, (3, H, W) uint8 RGB, until the next one.

        Args:
            image: the frame.
            times: of no meaning here.

        Returns:
            Whether to go on: False once q was pressed, or the window closed by hand.
        """
        del times
        cv2 = opencv()
        cv2.imshow(self._title, bgr(image))
        asked = cv2.waitKey(1) & 0xFF == ord("q")
        return not asked and cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) >= 1

    def __enter__(self) -> Window:
        """Return the window itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        opencv().destroyAllWindows()
