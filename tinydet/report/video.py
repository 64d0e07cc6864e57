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

# The first that this OpenCV can write. Its wheels for Linux have no H.264 (avc1), which plays
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

    def missing(self, frames: int) -> str:
        """Return what to tell if only this many frames came of those stated; "" if that is all.

        What a file states may itself be an estimate: a few less are nothing.
        """
        if frames >= 0.95 * self.frames:
            return ""
        return f"{self.name}: ends after {frames} of {self.frames} frames: cut short, or damaged"


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
            else "not a video that OpenCV can read, or cut short"
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
    """

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
        self._shape: tuple[int, ...] = ()

    def write(self, image: Tensor, times: int = 1) -> None:
        """Append a frame, (3, H, W) uint8 RGB, as large as the first.

        Args:
            image: the frame.
            times: how often it is shown.

        Raises:
            ValueError: OpenCV cannot write this format here, or the frame has another size.
        """
        frame = bgr(image)
        if self._writer is None:
            self._writer, self._shape = self._open(frame.shape[1], frame.shape[0]), frame.shape
        if frame.shape != self._shape:  # OpenCV would drop it without a word.
            sizes = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (self._shape, frame.shape))
            raise ValueError(f"{self.path}: a video has frames of one size, not {sizes}")
        for _ in range(times):
            self._writer.write(frame)
        self.frames += times

    def show(self, image: Tensor, times: int) -> bool:
        """Do as `write` does, and as a `Window` in which nobody presses q."""
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
            f"{self.path}: OpenCV cannot begin it: it has no {codecs} here, or may not write in "
            "that folder; try another one, or end the name in .avi"
        )

    def close(self) -> None:
        """Finish the file; without a frame there is none.

        Raises:
            ValueError: not all of it could be written; what was there before is left.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        try:
            if not self._is_whole():
                raise ValueError(f"{self.path}: cannot be written whole: is the disk full?")
            os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _is_whole(self) -> bool:
        """Read the end of what was written: OpenCV says nothing where a disk is full."""
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
        """Close it: what was written until an interruption is kept."""
        self.close()


def bgr(image: Tensor) -> np.ndarray:
    """Return an image (3, H, W) uint8 RGB as OpenCV has it, (H, W, 3) in BGR."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy()[:, :, ::-1])


def opencv() -> Any:
    """Return the module cv2, made to keep quiet: what goes wrong is said by exceptions of ours.

    Raises:
        ValueError: it is missing.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise ValueError("OpenCV is missing: pip install 'tinydet[demo]'") from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
