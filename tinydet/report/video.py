"""Video files and cameras as RGB tensors, through OpenCV."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What each container holds in OpenCV's own builds.
_CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}


@dataclass(frozen=True)
class Video:
    """An opened video file or camera.

    Attributes:
        name: for messages.
        frames_per_second: as the file or camera states it; 30 where it states none.
        frames: how many there should be; 0 where that is not known.
        capture: OpenCV's.
    """

    name: str
    frames_per_second: float
    frames: int
    capture: Any

    def __iter__(self) -> Iterator[Tensor]:
        """Yield each frame, (3, H, W) uint8 RGB, until there are no more."""
        try:
            while True:
                there, frame = self.capture.read()
                if not there:
                    return
                yield torch.from_numpy(frame[:, :, ::-1].transpose(2, 0, 1).copy())
        finally:
            self.capture.release()


def open_video(source: Path | int) -> Video:
    """Open a video file, or a camera by its number.

    Raises:
        ValueError: OpenCV is missing, or cannot read it.
    """
    if isinstance(source, Path) and not source.is_file():
        raise ValueError(f"{source}: no such video file")
    cv2 = opencv()
    name = f"camera {source}" if isinstance(source, int) else str(source)
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not capture.isOpened():
        kind = (
            "no such camera, or another program has it"
            if isinstance(source, int)
            else ("not a video that OpenCV can read")
        )
        raise ValueError(f"{name}: {kind}")
    rate = capture.get(cv2.CAP_PROP_FPS)
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Video(name, rate if 0 < rate < 1000 else 30.0, max(frames, 0), capture)


class VideoFile:
    """A video that is being written; the file appears under its name when it is closed.

    Attributes:
        path: the file.
        frames: written so far.
        closed: False; a `Window` can be closed by hand.
    """

    closed = False

    def __init__(self, path: Path, frames_per_second: float) -> None:
        """Begin a video.

        Args:
            path: the file; its ending says the format.
            frames_per_second: how fast it plays.

        Raises:
            ValueError: OpenCV is missing, or no video has this ending.
        """
        if path.suffix.lower() not in _CODECS:
            raise ValueError(f"{path}: not the name of a video; end it in {', '.join(_CODECS)}")
        opencv()
        self.path = path
        self.frames = 0
        self._rate = frames_per_second
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
        self._writer: Any = None

    def write(self, image: Tensor) -> None:
        """Append a frame, (3, H, W) uint8 RGB, as large as the first.

        Raises:
            ValueError: OpenCV cannot write this format here.
        """
        frame = _bgr(image)
        if self._writer is None:
            cv2 = opencv()
            codec = cv2.VideoWriter_fourcc(*_CODECS[self.path.suffix.lower()])
            size = (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self._temporary), codec, self._rate, size)
            if not self._writer.isOpened():
                raise ValueError(f"{self.path}: OpenCV cannot write this kind of video here")
        self._writer.write(frame)
        self.frames += 1

    def close(self) -> None:
        """Finish the file; without a frame there is none."""
        if self._writer is not None:
            self._writer.release()
            os.replace(self._temporary, self.path)
            self._writer = None

    def __enter__(self) -> VideoFile:
        """Return the video itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it: what was written until an interruption is kept."""
        self.close()


class Window:
    """A window on the screen; made like a `VideoFile`.

    Attributes:
        closed: whether q was pressed.
    """

    def __init__(self, title: str) -> None:
        """Open it.

        Raises:
            ValueError: OpenCV is missing, or the one installed opens no windows.
        """
        cv2 = opencv()
        self.closed = False
        self._title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise ValueError(
                "this OpenCV opens no windows: pip install opencv-python in its place on a machine "
                "with a screen, or record with --out FILE"
            ) from error

    def write(self, image: Tensor) -> None:
        """Show a frame, (3, H, W) uint8 RGB."""
        cv2 = opencv()
        cv2.imshow(self._title, _bgr(image))
        self.closed = cv2.waitKey(1) & 0xFF == ord("q")

    def __enter__(self) -> Window:
        """Return the window itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        opencv().destroyAllWindows()


def _bgr(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy()[:, :, ::-1])  # (H, W, 3)


def opencv() -> Any:
    """Return the module cv2.

    Raises:
        ValueError: it is missing.
    """
    try:
        import cv2
    except ImportError:
        raise ValueError("OpenCV is missing: pip install 'tinydet[demo]'") from None
    return cv2
