"""Problems of a data set and how they were handled: counts by rule, with examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Rule -> (singular, plural) of the report line after the count, in the order of the report: first
# what loses whole images, mere notes last.
RULES = {
    "missing_image": (
        "image file is missing: image left out",
        "image files are missing: images left out",
    ),
    "missing_annotation": (
        "image has no annotation file: image left out",
        "images have no annotation file: images left out",
    ),
    "bad_annotation": (
        "annotation file cannot be read: image left out",
        "annotation files cannot be read: images left out",
    ),
    "bad_image": (
        "image cannot be read: left out",
        "images cannot be read: left out",
    ),
    "bad_name": (
        "image has a file name that is not UTF-8: left out",
        "images have file names that are not UTF-8: left out",
    ),
    "same_labels": (
        "image has the label file of another one: left out",
        "images have the label files of other ones: left out",
    ),
    "duplicate_id": (
        "name is listed twice in the split: used once",
        "names are listed more than once in the split: used once",
    ),
    "no_file_name": (
        "image of the annotation file has no file name: left out",
        "images of the annotation file have no file name: left out",
    ),
    "unknown_image": (
        "object belongs to an image that the annotation file does not list: dropped",
        "objects belong to images that the annotation file does not list: dropped",
    ),
    "unknown_category": (
        "object has a category number that the data set does not define: dropped",
        "objects have category numbers that the data set does not define: dropped",
    ),
    "no_class_name": (
        "object has no class name: dropped",
        "objects have no class name: dropped",
    ),
    "same_name": (
        "category has the name of another one: merged into one class",
        "categories have the names of other ones: merged into one class",
    ),
    "absent_class": (
        "class is not in the annotation file's list of categories: it has no object",
        "classes are not in the annotation file's list of categories: they have no object",
    ),
    "class_without_object": (
        "class of the list of classes has no object in this split",
        "classes of the list of classes have no object in this split",
    ),
    "unknown_class": (
        "object has a class that is not in the list of classes: dropped",
        "objects have a class that is not in the list of classes: dropped",
    ),
    "bad_box": ("object has no readable box: dropped", "objects have no readable box: dropped"),
    "zero_area": ("box has no area: dropped", "boxes have no area: dropped"),
    "outside": ("box lies outside its image: dropped", "boxes lie outside their images: dropped"),
    "clipped": (
        "box extends beyond its image: clipped",
        "boxes extend beyond their images: clipped",
    ),
    "unclear_mark": (
        "object has a mark that is neither yes nor no: taken as no",
        "objects have a mark that is neither yes nor no: taken as no",
    ),
    "wrong_size": (
        "annotation states a wrong image size: the image file's is used",
        "annotations state a wrong image size: the image file's is used",
    ),
    "exif_applied": (
        "image has an EXIF orientation that matches its annotation's size: rotated",
        "images have an EXIF orientation that matches their annotations' sizes: rotated",
    ),
    "exif_ignored": (
        "image has an EXIF orientation that its annotation's size does not match: not rotated",
        "images have an EXIF orientation that their annotations' sizes do not match: not rotated",
    ),
    "no_labels": (
        "image has no label file: taken as an image without objects",
        "images have no label file: taken as images without objects",
    ),
    "not_rgb": (
        "image is not stored as RGB: converted",
        "images are not stored as RGB: converted",
    ),
}

_MAX_EXAMPLES = 5


@dataclass
class Problems:
    """Counts and examples of what was dropped, repaired or assumed.

    Attributes:
        counts: occurrences of each rule of `RULES` that occurred.
        examples: the first few occurrences of each rule, as "name: what".
        unknown_classes: objects dropped for each class name that is not in the list of classes.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    unknown_classes: dict[str, int] = field(default_factory=dict)

    def add(self, rule: str, name: str, what: str = "") -> None:
        """Count one occurrence of `rule` in the image `name`; `what` has the details."""
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}")
        self.counts[rule] = self.counts.get(rule, 0) + 1
        examples = self.examples.setdefault(rule, [])
        if len(examples) < _MAX_EXAMPLES:
            example = f"{name}: {what}" if what else name
            # File names may be of any bytes, which no report could be written with.
            examples.append(example.encode("utf-8", "backslashreplace").decode())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def summary(self) -> list[str]:
        """Return one line for each rule that occurred, with its first examples."""
        lines = []
        for rule, (one, many) in RULES.items():
            count = self.counts.get(rule, 0)
            if not count:
                continue
            line = f"{count} {one if count == 1 else many}"
            if rule == "unknown_class":
                names = sorted(self.unknown_classes.items(), key=lambda item: (-item[1], item[0]))
                named = ", ".join(f"{name} ({n})" for name, n in names[:20])
                line += f": {named}" + (", ..." if len(names) > 20 else "")
            else:
                more = "; ..." if count > len(self.examples[rule]) else ""
                line += f" ({'; '.join(self.examples[rule])}{more})"
            lines.append(line)
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, from which `Problems(**values)` restores the object."""
        return {
            "counts": dict(self.counts),
            "examples": {rule: list(found) for rule, found in self.examples.items()},
            "unknown_classes": dict(self.unknown_classes),
        }
