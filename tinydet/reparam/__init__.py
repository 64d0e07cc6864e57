"""Structural re-parameterization of any PyTorch network.

`expand` adds training-time branches to convolutions; `fold` merges such branches, batch norms and
constant factors into single convolutions. Neither changes the network's function. See README.md.
"""

from tinydet.reparam.branches import BLOCKS
from tinydet.reparam.expand import expand, expanded_names
from tinydet.reparam.fold import fold
from tinydet.reparam.report import FoldReport, Step
from tinydet.reparam.verify import OutputDifference, compare_outputs
from tinydet.reparam.weight_ranges import WeightRange, weight_ranges

__all__ = [
    "BLOCKS",
    "FoldReport",
    "OutputDifference",
    "Step",
    "WeightRange",
    "compare_outputs",
    "expand",
    "expanded_names",
    "fold",
    "weight_ranges",
]
