"""Detections of runs that were never trained, for comparisons whose truth is known.

Every object has a difficulty, part of it its image's. A run sees an object as well as its network
sees on the whole, plus this seed's luck on the whole, plus this run's luck with this object;
what is left decides whether it is found, how surely, and how exactly. What is no object but
looks like one is in the images as well, likelier in some, and the better a run sees, the less it
is fooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.comparison.uncertainty import Scores
from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.weighted import voc_matches, weighted_area_ap

_SIDE = 40.0  # of an object, in pixels
_CELL = 100.0  # objects do not touch


@dataclass(frozen=True)
class World:
    """How runs vary.

    Attributes:
        images: of the test split.
        classes: of objects.
        seed_luck: standard deviation of a seed's luck on the whole.
        own_luck: standard deviation of a run's luck with an object.
        idea_luck: standard deviation of what suits a network in an object, whatever the seed.
    """

    images: int = 60
    classes: int = 3
    seed_luck: float = 0.06
    own_luck: float = 0.4
    idea_luck: float = 0.15


@dataclass(frozen=True)
class Scene:
    """The test images, and what makes them hard.

    Attributes:
        truth: of each image.
        difficulty: of each object, all images one after another.
        traps: as objects, what is none.
        trap_difficulty: of each trap.
    """

    truth: list[GroundTruth]
    difficulty: np.ndarray
    traps: list[GroundTruth]
    trap_difficulty: np.ndarray


def draw_scene(world: World, rng: np.random.Generator) -> Scene:
    """Draw the images of a comparison."""
    of_image = rng.normal(0, 0.5, world.images)
    parts = []
    for mean in (2.0, 1.5):
        counts = rng.poisson(mean * np.exp(0.4 * rng.normal(size=world.images)))
        boxes = [_boxes(count, int(mean == 1.5)) for count in counts]
        labels = [rng.integers(0, world.classes, count) for count in counts]
        objects = [
            GroundTruth(b, k, np.zeros(len(k), bool)) for b, k in zip(boxes, labels, strict=True)
        ]
        difficulty = np.repeat(of_image, counts) + rng.normal(0, 0.8, counts.sum())
        parts += [objects, difficulty]
    return Scene(*parts)


def _boxes(count: int, row: int) -> np.ndarray:
    left = _CELL * np.arange(count)
    top = np.full(count, _CELL * row)
    return np.stack([left, top, left + _SIDE, top + _SIDE], axis=1)


def draw_run(
    world: World, scene: Scene, skill: float, taste: np.ndarray, rng: np.random.Generator
) -> list[ImageDetections]:
    """Draw one run's detections.

    Args:
        world: how runs vary.
        scene: the images.
        skill: how well its network sees.
        taste: how much better than that it sees each object.
        rng: of this run alone.
    """
    skill = skill + rng.normal(0, world.seed_luck)
    luck = rng.normal(0, world.own_luck, len(taste))
    seen = 1.3 + skill + taste + luck - scene.difficulty
    sure = 1 / (1 + np.exp(-1.5 * (seen + rng.normal(0, 0.3, len(seen)))))
    iou = np.clip(0.72 + 0.1 * seen + rng.normal(0, 0.08, len(seen)), 0.05, 0.97)
    shift = _SIDE * (1 - iou) / (1 + iou)  # gives squares this very IoU
    fooled = -0.2 - skill + rng.normal(0, world.own_luck, len(scene.trap_difficulty))
    fooled = 1 / (1 + np.exp(-1.5 * (fooled - scene.trap_difficulty)))
    found, begin, trap_begin = [], 0, 0
    for truth, traps in zip(scene.truth, scene.traps, strict=True):
        own = slice(begin, begin + len(truth.labels))
        trap = slice(trap_begin, trap_begin + len(traps.labels))
        begin, trap_begin = own.stop, trap.stop
        boxes = truth.boxes + shift[own, None] * np.array([1.0, 0, 1, 0])
        scores = np.concatenate([sure[own], fooled[trap]])
        kept = scores > 0.05
        boxes = np.concatenate([boxes, traps.boxes])[kept]
        labels = np.concatenate([truth.labels, traps.labels])[kept]
        found.append(ImageDetections(boxes, scores[kept], labels))
    return found


def draw_comparison(
    world: World, effects: Sequence[float], seeds: int, number: int, draws: int = 200
) -> list[Scores]:
    """Draw a base and ideas, and score them on AP50 as a comparison does.

    Args:
        world: how runs vary.
        effects: of each idea on how well its network sees.
        seeds: of each experiment.
        number: of the comparison; each has its own random numbers.
        draws: of the bootstrap over images.

    Returns:
        The scores of the base, then those of each idea.
    """
    rng = np.random.default_rng([number, 77])
    scene = draw_scene(world, rng)
    images = len(scene.truth)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=draws)
    weights = np.concatenate([np.ones((1, images)), weights])
    scores = []
    for skill in (0.0, *effects):
        taste = rng.normal(0, world.idea_luck, len(scene.difficulty))
        values = []
        for _ in range(seeds):
            found = draw_run(world, scene, skill, taste, rng)
            matches = voc_matches(found, scene.truth, world.classes)
            values.append(weighted_area_ap(matches, weights))
        values = np.array(values)
        scores.append(Scores(values[:, 0], values[:, 1:]))
    return scores
