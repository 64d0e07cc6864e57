"""Video files and cameras as RGB tensors, through OpenCV; sound is neither read nor written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The first codec that OpenCV can write is used. Its Linux wheels lack H.264 (avc1), which plays
# everywhere; MPEG-4 part 2 (mp4v) plays in every player but not in browsers, VP8 in both.
_CODECS = {
    ".mp4": ("avc1", "mp4v"),
    ".webm": ("VP80",),
    ".mov": ("avc1", "mp4v"),
    ".mkv": ("avc1", "mp4v"),
    ".avi": ("MJPG",),
}


@dataclass(frozen=True)
class Video:
    """An opened video file or camera.

    Attributes:
        name: name for messages.
        frames_per_second: as stated by the file or camera; 30 if it states none.
        frames: the number of frames that the file states; 0 if unknown.
        capture: OpenCV's VideoCapture.
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

    def missing(self, frames: int) -> str:
        """Return a warning if the video ended after too few frames, else "".

        The number that a file states may be an estimate, so a few missing frames are normal.
        """
        if frames >= 0.95 * self.frames:
            return ""
        return f"{self.name}: ends after {frames} of {self.frames} frames: truncated or damaged"


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
            "no such camera, or another program uses it"
            if isinstance(source, int)
            else "not a video that OpenCV can read, or truncated"
        )
        raise ValueError(f"{name}: {kind}")
    rate = capture.get(cv2.CAP_PROP_FPS)
    frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Video(name, rate if 0 < rate < 1000 else 30.0, max(frames, 0), capture)


class VideoFile:
    """A video that is being written; the file gets its name when it is closed.

    Attributes:
        path: the file.
        frames: number of frames written so far.
    """

    def __init__(self, path: Path, frames_per_second: float) -> None:
        """Start a video.

        Args:
            path: the file; its extension selects the format.
            frames_per_second: playing speed.

        Raises:
            ValueError: OpenCV is missing, or the extension is not one of a video.
        """
        if path.suffix.lower() not in _CODECS:
            raise ValueError(f"{path}: not the name of a video; end it in {', '.join(_CODECS)}")
        opencv()
        self.path = path
        self.frames = 0
        self._rate = frames_per_second
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
        self._writer: Any = None
        self._shape: tuple[int, ...] = ()

    def write(self, image: Tensor, times: int = 1) -> None:
        """Append a frame, (3, H, W) uint8 RGB, of the size of the first one.

        Videos have an even width and height: the last row or column of others is repeated.

        Args:
            image: the frame.
            times: how often to repeat it.

        Raises:
            ValueError: OpenCV cannot write this format here, or the frame has another size.
        """
        frame = bgr(image)
        height, width = frame.shape[:2]
        if self._writer is None:
            self._shape = frame.shape
            self._writer = self._open(width + width % 2, height + height % 2)
        if frame.shape != self._shape:  # OpenCV would drop it silently.
            sizes = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (self._shape, frame.shape))
            raise ValueError(f"{self.path}: frames of a video must have one size, not {sizes}")
        frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for _ in range(times):
            self._writer.write(frame)
        self.frames += times

    def show(self, image: Tensor, times: int) -> bool:
        """Write a frame and return True: the interface of `Window`, where the user can quit."""
        self.write(image, times)
        return True

    def _open(self, width: int, height: int) -> Any:
        cv2 = opencv()
        for codec in _CODECS[self.path.suffix.lower()]:
            code = cv2.VideoWriter_fourcc(*codec)
            writer = cv2.VideoWriter(str(self._temporary), code, self._rate, (width, height))
            if writer.isOpened():
                return writer
        self._temporary.unlink(missing_ok=True)
        codecs = " or ".join(_CODECS[self.path.suffix.lower()])
        raise ValueError(
            f"{self.path}: OpenCV cannot write it: it lacks {codecs}, or the folder is not "
            "writable; try another folder, or end the name in .avi"
        )

    def close(self) -> None:
        """Finish the file; without a frame, no file is written.

        Raises:
            ValueError: the file is incomplete; a file of that name is left as it was.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            if not self._is_whole():
                raise ValueError(f"{self.path}: incomplete: is the disk full?")
            os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _is_whole(self) -> bool:
        """Return whether the last frame can be read: OpenCV does not report a full disk."""
        cv2 = opencv()
        capture = cv2.VideoCapture(str(self._temporary))
        try:
            if not capture.isOpened() or capture.get(cv2.CAP_PROP_FRAME_COUNT) != self.frames:
                return False
            capture.set(cv2.CAP_PROP_POS_FRAMES, self.frames - 1)
            return capture.read()[0]
        finally:
            capture.release()

    def __enter__(self) -> VideoFile:
        """Return the video itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the video: frames written before an interruption are kept."""
        self.close()


def bgr(image: Tensor) -> np.ndarray:
    """Return an image, (3, H, W) uint8 RGB, in OpenCV's layout, (H, W, 3) BGR."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy()[:, :, ::-1])


def opencv() -> Any:
    """Return the module cv2 with its log turned off: errors are raised as exceptions here.

    Raises:
        ValueError: OpenCV is not installed.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise ValueError("OpenCV is missing: pip install 'tinydet[demo]'") from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
