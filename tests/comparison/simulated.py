"""Detections of runs that were never trained, for comparisons whose truth is known.

Every object has a difficulty, part of it its image's. A run sees an object as well as its network
sees on the whole, plus this seed's luck on the whole, plus this run's luck with this object;
what is left decides whether it is found, how surely, and how exactly. Things that are no object
but look like one are in the images as well, and the better a run sees, the less it is fooled.

Objects do not touch, so a detection can only belong to its own object: what is right is known
without matching. `as_detections` makes boxes of it all, to show that matching finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinydet.comparison.uncertainty import Scores
from tinydet.evaluation.boxes import GroundTruth, ImageDetections
from tinydet.evaluation.coco import ClassMatches
from tinydet.evaluation.weighted import weighted_area_ap

_SIDE = 40.0  # of an object, in pixels
_CELL = 100.0
_LEAST_SCORE = 0.05


@dataclass(frozen=True)
class World:
    """How runs vary.

    Attributes:
        images: of the test split.
        alike: how many images show the same things, as frames of a video do; divides `images`.
        classes: of objects.
        seed_luck: standard deviation of a seed's luck on the whole.
        own_luck: standard deviation of a run's luck with an object, in all images that show it.
        taste: standard deviation of what suits a network in an object, whatever the seed.
    """

    images: int = 60
    alike: int = 1
    classes: int = 3
    seed_luck: float = 0.06
    own_luck: float = 0.4
    taste: float = 0.15


@dataclass(frozen=True)
class Things:
    """Objects of the test images, or what only looks like one.

    Attributes:
        images: (N,) number of each one's image, ascending.
        labels: (N,).
        difficulty: (N,) of telling what it is.
    """

    images: np.ndarray
    labels: np.ndarray
    difficulty: np.ndarray


@dataclass(frozen=True)
class Run:
    """What a run makes of the objects, then of the other things.

    Attributes:
        scores: (N + M,); below 0.05 it is no detection.
        iou: (N + M,) with the object; 0 where there is none.
    """

    scores: np.ndarray
    iou: np.ndarray


def draw_scene(world: World, rng: np.random.Generator) -> tuple[Things, Things]:
    """Draw the objects of a comparison's test images, and what looks like one."""
    different = world.images // world.alike
    of_image = rng.normal(0, 0.5, different)
    drawn = []
    for mean in (2.0, 1.5):
        counts = rng.poisson(mean * np.exp(0.4 * rng.normal(size=different)))
        images = np.repeat(np.arange(different), counts)
        labels = rng.integers(0, world.classes, len(images))
        difficulty = of_image[images] + rng.normal(0, 0.8, len(images))
        images = [images + different * copy for copy in range(world.alike)]
        copies = np.tile(labels, world.alike), np.tile(difficulty, world.alike)
        drawn.append(Things(np.concatenate(images), *copies))
    return drawn[0], drawn[1]


def draw_run(
    world: World,
    scene: tuple[Things, Things],
    skill: float,
    taste: np.ndarray,
    rng: np.random.Generator,
) -> Run:
    """Draw one run.

    Args:
        world: how runs vary.
        scene: the images.
        skill: how well its network sees.
        taste: how much better than that it sees each object.
        rng: random numbers.
    """
    objects, others = (things.difficulty for things in scene)

    def luck(things: np.ndarray) -> np.ndarray:
        of_one = rng.normal(0, world.own_luck, len(things) // world.alike)
        return np.tile(of_one, world.alike)

    skill = skill + rng.normal(0, world.seed_luck)
    seen = 1.3 + skill + taste + luck(objects) - objects
    fooled = -0.2 - skill + luck(others) - others
    sure = np.concatenate([seen + rng.normal(0, 0.3, len(seen)), fooled])
    iou = np.clip(0.72 + 0.1 * seen + rng.normal(0, 0.08, len(seen)), 0.05, 0.97)
    return Run(1 / (1 + np.exp(-1.5 * sure)), np.concatenate([iou, np.zeros(len(others))]))


def as_matches(world: World, scene: tuple[Things, Things], run: Run) -> list[ClassMatches]:
    """Return what `voc_matches` finds in a run."""
    objects, others = scene
    images = np.concatenate([objects.images, others.images])
    labels = np.concatenate([objects.labels, others.labels])
    matches = []
    for label in range(world.classes):
        rows = np.flatnonzero((labels == label) & (run.scores > _LEAST_SCORE))
        rows = rows[np.argsort(-run.scores[rows])]
        boxes = np.bincount(objects.images[objects.labels == label], minlength=world.images)
        right = run.iou[None, rows] >= 0.5
        scores, ignored = run.scores[rows], np.zeros_like(right)
        matches.append(ClassMatches(images[rows], scores, right, ignored, boxes))
    return matches


def as_detections(
    world: World, scene: tuple[Things, Things], run: Run
) -> tuple[list[ImageDetections], list[GroundTruth]]:
    """Return a run's detections as boxes, and the ground truth."""
    objects, others = scene
    left = _CELL * np.arange(len(run.scores))
    boxes = np.stack([left, np.zeros_like(left), left + _SIDE, np.full_like(left, _SIDE)], axis=1)
    shift = _SIDE * (1 - run.iou) / (1 + run.iou)  # gives squares this very IoU
    moved = boxes + shift[:, None] * np.array([1.0, 0, 1, 0])
    images = np.concatenate([objects.images, others.images])
    labels = np.concatenate([objects.labels, others.labels])
    found, truth = [], []
    for image in range(world.images):
        rows = (images == image) & (run.scores > _LEAST_SCORE)
        found.append(ImageDetections(moved[rows], run.scores[rows], labels[rows]))
        rows = np.flatnonzero(objects.images == image)
        truth.append(GroundTruth(boxes[rows], labels[rows], np.zeros(len(rows), bool)))
    return found, truth


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
    images = world.images
    weights = rng.multinomial(images, np.full(images, 1 / images), size=draws)
    weights = np.concatenate([np.ones((1, images)), weights])
    scores = []
    for skill in (0.0, *effects):
        taste = rng.normal(0, world.taste, len(scene[0].difficulty) // world.alike)
        taste = np.tile(taste, world.alike)
        runs = [draw_run(world, scene, skill, taste, rng) for _ in range(seeds)]
        values = [weighted_area_ap(as_matches(world, scene, run), weights) for run in runs]
        values = np.array(values)
        scores.append(Scores(values[:, 0], values[:, 1:]))
    return scores
