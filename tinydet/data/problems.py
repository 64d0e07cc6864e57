"""Problems of a data set and how they were handled: counts by rule, with examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Rule -> what the report counts and how it was handled, in the order of the report: first what
# loses whole images, mere notes last.
RULES = {
    "missing_image": "missing image files, images left out",
    "missing_annotation": "images without an annotation file, left out",
    "bad_annotation": "annotation files that cannot be read, images left out",
    "bad_image": "images that cannot be read, left out",
    "bad_name": "images with a file name that is not UTF-8, left out",
    "same_labels": "images with the label file of another one, left out",
    "duplicate_id": "names listed more than once in the split, used once",
    "duplicate_objects": "objects of an image listed before under another id, dropped",
    "no_file_name": "images of the annotation file without a file name, left out",
    "unknown_image": "objects of images that the annotation file does not list, dropped",
    "unknown_category": "objects of a category that the data set does not define, dropped",
    "no_class_name": "objects without a class name, dropped",
    "same_name": "categories with the name of another one, merged into one class",
    "absent_class": "classes that the annotation file's categories lack, without objects",
    "class_without_object": "classes without an object in this split",
    "unknown_class": "objects of a class that is not in the list of classes, dropped",
    "bad_box": "objects without a readable box, dropped",
    "zero_area": "boxes without area, dropped",
    "outside": "boxes outside their image, dropped",
    "clipped": "boxes that extend beyond their image, clipped",
    "unclear_mark": "objects with a mark that is neither yes nor no, taken as no",
    "wrong_size": "annotations with a wrong image size, the image file's is used",
    "exif_applied": "images with an EXIF orientation that their annotation matches, rotated",
    "exif_ignored": "images with an EXIF orientation that their annotation lacks, not rotated",
    "no_labels": "images without a label file, taken as images without objects",
    "not_rgb": "images not stored as RGB, converted",
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
        for rule, words in RULES.items():
            count = self.counts.get(rule, 0)
            if not count:
                continue
            if rule == "unknown_class":
                names = sorted(self.unknown_classes.items(), key=lambda item: (-item[1], item[0]))
                shown = ", ".join(f"{name} {n}" for name, n in names[:20])
                more = ", ..." if len(names) > 20 else ""
            else:
                shown = "; ".join(self.examples[rule])
                more = "; ..." if count > len(self.examples[rule]) else ""
            lines.append(f"{words}: {count} ({shown}{more})")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, from which `Problems(**values)` restores the object."""
        return {
            "counts": dict(self.counts),
            "examples": {rule: list(found) for rule, found in self.examples.items()},
            "unknown_classes": dict(self.unknown_classes),
        }
