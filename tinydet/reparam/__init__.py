"""Re-parameterization: turn a trained network into a smaller one that is the same function.

Knows nothing of detection: `fold` takes any eval-mode module and an example of its input.
"""

from tinydet.reparam.fold import fold
from tinydet.reparam.report import FoldReport, Step
from tinydet.reparam.verify import Difference, compare

__all__ = ["Difference", "FoldReport", "Step", "compare", "fold"]
