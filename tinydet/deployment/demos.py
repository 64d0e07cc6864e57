"""Draw detections into images, videos and a camera's frames."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from tinydet.atomic import check_out
from tinydet.data.image import DRAWN, IMAGE_SUFFIXES, read_image
from tinydet.deployment.prediction import Prediction
from tinydet.deployment.predictor import Predictor
from tinydet.report.draw import grid, save_image, write_in_corner

logger = logging.getLogger(__name__)

_SMOOTHING = 0.9  # of the displayed frame time: an average of about the last ten


def drawn_paths(images: Sequence[Path], out: Path | None) -> list[Path]:
    """Return the output path of each image: `NAME_detections.jpg`, numbered if names repeat.

    Args:
        images: at least one.
        out: a folder, which is created; or a file in an existing folder, which is the path of all
            images; None is the working folder.

    Raises:
        ValueError: `out` is a file in a folder that does not exist, or one of the images.
    """
    if out is not None and not out.is_dir() and out.suffix:
        if out.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"--out {out}: not the name of an image file; end it in .jpg or .png")
        check_out(out, images)
        return [out] * len(images)
    folder, of_name, paths = out or Path(), Counter[str](), []
    taken = {image.resolve() for image in images}  # An image may have the name of a drawing.
    for image in images:
        while True:
            of_name[image.stem] += 1
            number = f"_{of_name[image.stem]}" if of_name[image.stem] > 1 else ""
            path = folder / f"{image.stem}{number}{DRAWN}.jpg"
            if path.resolve() not in taken:
                break
        taken.add(path.resolve())
        paths.append(path)
    return paths


def draw_images(
    predictor: Predictor, images: Sequence[Path], paths: Sequence[Path]
) -> Iterator[str]:
    """Draw the detections in images, yielding a report line by line.

    If there are several images, those that cannot be read are skipped with a warning.

    Args:
        predictor: detects the objects.
        images: files.
        paths: output path of each; or the same for all, whose drawings are then in one picture.

    Raises:
        ValueError: none of the images can be read.
    """
    total, done = 0, 0
    pictures: list[Tensor] = []
    in_one_file = len(images) > 1 and len(set(paths)) == 1
    for i, (path, out) in enumerate(zip(images, paths, strict=True), 1):
        try:
            image = read_image(path, orientation=True)
        except (ValueError, OSError) as error:
            if len(images) == 1:
                raise
            logger.warning("%s: skipped", error)
            continue
        found = predictor(image)
        picture, place = found.draw(), "" if in_one_file else f" drawn in {out}"
        if in_one_file:
            pictures.append(picture)
        else:
            save_image(picture, out)
        if len(images) == 1:
            yield from _each(found)
        counts = Counter(found.names).most_common()
        objects = ", ".join(f"{count} {name}" for name, count in counts)
        yield f"{i}/{len(images)} {path}: {objects or 'nothing'}{place}"
        total, done = total + len(found), done + 1
    if not done:
        raise ValueError(f"none of the {len(images)} images can be read")
    if pictures:
        save_image(grid(pictures), paths[0])
    skipped = f", {len(images) - done} skipped" if done < len(images) else ""
    where = f", drawn in {paths[0]}" if in_one_file else ""
    yield f"{total} detections in {done} image{'s'[: done != 1]}{skipped}{where}"
    if not total:
        limit = predictor.score_threshold
        yield f"no detection scores above {limit:g}; try a lower --score-threshold"


def draw_frames(
    predictor: Predictor, frames: Iterable[Tensor], batch_size: int
) -> Iterator[tuple[Tensor, int]]:
    """Yield each frame of a video with its detections drawn, and their number.

    Args:
        predictor: detects the objects.
        frames: (3, H, W) uint8 RGB each.
        batch_size: frames that go through the network together.
    """
    for found in predictor(iter(frames), batch_size):
        yield found.draw(), len(found)


def draw_camera(
    predictor: Predictor, frames: Iterable[tuple[Tensor, int]], show: Callable[[Tensor, int], bool]
) -> tuple[int, int, float]:
    """Draw the detections and the frame rate in a camera's frames until stopped.

    Args:
        predictor: detects the objects.
        frames: each with the number of frames that arrived since the previous one, including it.
        show: called with the drawing and that number; returns whether to continue. Ctrl-C also
            stops.

    Returns:
        Frames drawn, frames skipped, and seconds elapsed.
    """
    begin = last = time.monotonic()
    drawn, skipped, a_frame = 0, 0, 0.0
    try:
        for image, new in frames:
            picture = predictor(image).draw()
            now = time.monotonic()
            a_frame = (
                _SMOOTHING * a_frame + (1 - _SMOOTHING) * (now - last) if drawn else now - last
            )
            last, drawn, skipped = now, drawn + 1, skipped + new - 1
            if not show(write_in_corner(picture, f"{1 / max(a_frame, 1e-6):.1f} fps"), new):
                break
    except KeyboardInterrupt:
        pass  # The usual way to stop.
    return drawn, skipped, time.monotonic() - begin


def _each(found: Prediction) -> Iterator[str]:
    for name, score, box in zip(
        found.names, found.scores.tolist(), found.boxes.tolist(), strict=True
    ):
        corners = " ".join(f"{value:.0f}" for value in box)
        yield f"{name} {score:.2f} at {corners}"
