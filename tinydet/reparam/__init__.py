"""Re-parameterization: turn a trained network into a smaller one that is the same function.

Knows nothing of detection: `fold` takes any eval-mode module and an example of its input, and
`expand`, its inverse, lets the convolutions of any module grow branches to train with.
"""

from tinydet.reparam.branches import BLOCKS
from tinydet.reparam.expand import expand, expanded_names
from tinydet.reparam.fold import fold
from tinydet.reparam.report import FoldReport, Step
from tinydet.reparam.verify import OutputDifference, compare_outputs

__all__ = [
    "BLOCKS",
    "FoldReport",
    "OutputDifference",
    "Step",
    "compare_outputs",
    "expand",
    "expanded_names",
    "fold",
]
