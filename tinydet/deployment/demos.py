"""What a detector finds, drawn into images, into a video and into a camera's picture."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from tinydet.data.image import DRAWN, IMAGE_SUFFIXES, read_image
from tinydet.deployment.runtime import Detector
from tinydet.report.draw import draw_detections, save_image, write_in_corner
from tinydet.yolof.decode import Detections

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SMOOTHING = 0.9  # of the time a frame takes: about the last ten count


def drawn_paths(images: Sequence[Path], out: Path | None) -> list[Path]:
    """Return where each image's drawing goes: `NAME_detections.jpg`, numbered if names repeat.

    Args:
        images: at least one.
        out: a folder, which is made; for a single image also a file, in a folder that is there;
            None is the working folder.

    Raises:
        ValueError: a file is named for several images, in a folder that is not there, or it is the
            image itself.
    """
    if out is not None and not out.is_dir() and out.suffix:
        if len(images) > 1:
            raise ValueError(f"--out {out}: {len(images)} images need a folder, not a file")
        if out.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"--out {out}: not the name of an image file; end it in .jpg or .png")
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
        if out.exists() and out.samefile(images[0]):
            raise ValueError(f"--out {out}: is the image itself; give another name")
        return [out]
    folder, used, paths = out or Path(), Counter[str](), []
    for image in images:
        used[image.stem] += 1
        number = f"_{used[image.stem]}" if used[image.stem] > 1 else ""
        paths.append(folder / f"{image.stem}{number}{DRAWN}.jpg")
    return paths


def draw_images(detector: Detector, images: Sequence[Path], paths: Sequence[Path]) -> Iterator[str]:
    """Draw what is found in images, yielding what to tell the user line by line.

    An image of several that cannot be read is told of and left out.

    Args:
        detector: finds it.
        images: files.
        paths: where each one's drawing goes.

    Raises:
        ValueError: none of the images can be read.
    """
    total, done = 0, 0
    for i, (path, out) in enumerate(zip(images, paths, strict=True), 1):
        try:
            image = read_image(path, orientation=True)
        except (ValueError, OSError) as error:
            if len(images) == 1:
                raise
            logger.warning("%s: left out", error)
            continue
        (found,) = detector([image])
        save_image(_draw(detector, image, found), out)
        if len(images) == 1:
            yield from _each(detector, found)
        counts = Counter(detector.classes[label] for label in found.labels.tolist())
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        yield f"{i}/{len(images)} {path}: {told} drawn in {out}"
        total, done = total + len(found.scores), done + 1
    if not done:
        raise ValueError(f"none of the {len(images)} images can be read")
    left = f", {len(images) - done} left out" if done < len(images) else ""
    yield f"{total} detections in {done} image{'s'[: done != 1]}{left}"
    if not total:
        limit = detector.score_threshold
        yield f"none scores {limit:g}: --score-threshold takes a lower limit"


def draw_frames(
    detector: Detector, frames: Iterable[Tensor], batch_size: int
) -> Iterator[tuple[Tensor, int]]:
    """Yield each frame of a video with what is found drawn in it, and the number of detections.

    Args:
        detector: finds it.
        frames: (3, H, W) uint8 RGB each.
        batch_size: frames that go through the network together.
    """
    for images in _batches(frames, batch_size):
        for image, found in zip(images, detector(images), strict=True):
            yield _draw(detector, image, found), len(found.scores)


def draw_camera(
    detector: Detector, frames: Iterable[tuple[Tensor, int]], show: Callable[[Tensor, int], bool]
) -> tuple[int, int, float]:
    """Draw what is found in a camera's frames, and how many a second, until it is ended.

    Args:
        detector: finds it.
        frames: each with the number of frames that came since the one before, itself included.
        show: takes the drawing and that number; returns whether to go on. Ctrl-C ends it as well.

    Returns:
        Frames drawn, frames left out, and seconds passed.
    """
    begin = last = time.monotonic()
    drawn, left_out, a_frame = 0, 0, 0.0
    try:
        for image, new in frames:
            (found,) = detector([image])
            picture = _draw(detector, image, found)
            now = time.monotonic()
            a_frame = (
                _SMOOTHING * a_frame + (1 - _SMOOTHING) * (now - last) if drawn else now - last
            )
            last, drawn, left_out = now, drawn + 1, left_out + new - 1
            if not show(write_in_corner(picture, f"{1 / max(a_frame, 1e-6):.1f} fps"), new):
                break
    except KeyboardInterrupt:
        pass  # The usual end.
    return drawn, left_out, time.monotonic() - begin


def _draw(detector: Detector, image: Tensor, found: Detections) -> Tensor:
    return draw_detections(image, found.boxes, found.labels, found.scores, detector.classes)


def _each(detector: Detector, found: Detections) -> Iterator[str]:
    for box, score, label in zip(
        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
    ):
        corners = " ".join(f"{value:.0f}" for value in box)
        yield f"{detector.classes[label]} {score:.2f} at {corners}"


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
