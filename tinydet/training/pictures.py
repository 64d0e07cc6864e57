"""Drawings of detections and errors: by rank, a fixed sample, or two detectors compared."""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from tinydet.data.image import read_image
from tinydet.data.index import Index
from tinydet.evaluation import Metrics
from tinydet.evaluation.errors import ImageChange, ImageErrors, image_errors
from tinydet.evaluation.tide_table import HEADS
from tinydet.report.draw import draw_errors, encode_jpeg, resize_between, side_by_side
from tinydet.report.fonts import class_names
from tinydet.training.evaluate import ground_truth

logger = logging.getLogger(__name__)

# Pixels of a longer side, at least and at most: names can be read, and a page of six drawings stays
# below a megabyte; TensorBoard's are PNGs, and there are some at each evaluation.
_ON_PAGE, _IN_EVENTS = (384, 640), (320, 320)


def ranked_images(
    metrics: Metrics, index: Index, count: int = 6
) -> dict[str, list[dict[str, Any]]]:
    """Return the worst, the median and the best images by the confidence of their errors.

    They are sorted by `ImageErrors.badness`; of images with equal errors, those with the fewest
    objects are worse. Images without errors are not among the worst, and no image is shown twice.

    Args:
        metrics: of the split, with its detections.
        index: the split.
        count: of the worst images at most; half as many of the others.

    Returns:
        By "worst", "median" and "best" a list of images, each with "name", "caption", "jpeg" (in
        base64), "width" and "height".
    """
    errors = image_errors(metrics.detections, ground_truth(index), len(index.classes))
    order = sorted(range(len(errors)), key=lambda i: (-errors[i].badness, errors[i].num_counted))
    few = count // 2
    middle = (len(order) - few) // 2
    chosen = {
        "worst": [i for i in order[:count] if errors[i].badness],
        "best": order[::-1][:few],
        "median": order[middle : middle + few],
    }
    shown: set[int] = set()
    ranked: dict[str, list[dict[str, Any]]] = {"worst": [], "median": [], "best": []}
    for rank, numbers in chosen.items():
        for i in numbers:
            drawing = None if i in shown else _draw(index, i, errors[i], _ON_PAGE)
            if drawing is None:
                continue
            shown.add(i)
            ranked[rank].append(
                {
                    "name": index.image_ids[i],
                    "caption": _caption(errors[i]),
                    "jpeg": base64.b64encode(encode_jpeg(drawing)).decode(),
                    "width": drawing.shape[2],
                    "height": drawing.shape[1],
                }
            )
    return ranked


def draw_samples(metrics: Metrics, index: Index, count: int = 4) -> dict[str, Tensor]:
    """Return drawings of a few images spread evenly over the split, the same ones each time.

    Args:
        metrics: of the split, with its detections.
        index: the split.
        count: images at most.

    Returns:
        (3, H, W) uint8 RGB for each name of an image.
    """
    chosen = sorted({round(i) for i in np.linspace(0, len(index) - 1, count)})
    truth = ground_truth(index)
    errors = image_errors(
        [metrics.detections[i] for i in chosen], [truth[i] for i in chosen], len(index.classes)
    )
    drawn = {
        index.image_ids[i]: _draw(index, i, of_image, _IN_EVENTS)
        for i, of_image in zip(chosen, errors, strict=True)
    }
    return {name: drawing for name, drawing in drawn.items() if drawing is not None}


def draw_change(change: ImageChange, index: Index, names: Sequence[str]) -> Tensor | None:
    """Return the errors of two detectors side by side; None if the image cannot be read.

    Errors that only one of them makes are drawn thick and labelled.

    Args:
        change: of one image.
        index: the split.
        names: of the base and of the idea.

    Returns:
        (3, H, W) uint8 RGB.
    """
    sides = ((change.base, change.found, change.gone), (change.idea, change.lost, change.new))
    drawings, captions = [], []
    for name, (errors, missed, wrong) in zip(names, sides, strict=True):
        here_alone = replace(errors, missed=missed, wrong=wrong)
        drawing = _draw(index, change.index, here_alone, _ON_PAGE)
        if drawing is None:
            return None
        drawings.append(drawing)
        captions.append(f"{name}: {_caption(errors)}")
    below = "ground truth dashed, detections solid; thick with a label: an error on this side only"
    return side_by_side(drawings, captions, f"{index.image_ids[change.index]}: {below}")


def _draw(index: Index, i: int, errors: ImageErrors, sides: tuple[int, int]) -> Tensor | None:
    """Return an image with its errors drawn; None if it cannot be read."""
    try:
        image = read_image(index.image_path(i), bool(index.exif_rotated[i]))
    except (OSError, ValueError) as error:
        logger.info("%s cannot be drawn: %s", index.image_ids[i], error)
        return None
    image, factor = resize_between(image, *sides)
    names, found = class_names(tuple(index.classes)), errors.detections
    order = np.argsort(-found.scores, kind="stable")
    return draw_errors(
        image,
        factor * errors.truth.boxes,
        [names[label] for label in errors.truth.labels],
        errors.missed,
        factor * found.boxes[order],
        [
            f"{names[found.labels[i]]} {found.scores[i]:.2f} {HEADS.get(errors.kinds[i], '')}"
            for i in order
        ],
        errors.wrong[order],
    )


def _caption(errors: ImageErrors) -> str:
    missed, counted = int(errors.missed.sum()), errors.num_counted
    wrong = errors.detections.scores[errors.wrong]
    surest = f", the surest at {wrong.max():.2f}" if len(wrong) else ""
    return f"{missed} of {counted} objects missed, {len(wrong)} false detections{surest}"
