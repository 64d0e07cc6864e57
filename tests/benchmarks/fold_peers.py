"""Time `fold` beside timm's and torch.fx's tools: python tests/benchmarks/fold_peers.py [NAME ...].

Each run is in a process of its own, on one thread, the tools in turns: CPU seconds, and the most
memory beyond what the process had before. timm's tool only knows its own blocks; torch.fx's only
fuses a norm into the convolution right before it, in networks that can be traced as a whole.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import timm
import torch
from fold_cost import Cost, measured
from fold_zoo import process_context
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from tinydet.cli import run
from tinydet.config import Model
from tinydet.reparam import fold
from tinydet.report.table import markdown_table
from tinydet.yolof.build import build_detector


class LargeKernel(nn.Module):
    """RepLKNet's (arXiv 2203.06717) depthwise 31x31 and 5x5, each with a norm, and the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large, self.small = (
            nn.Sequential(
                nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels, bias=False),
                nn.BatchNorm2d(channels),
            )
            for side in (31, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return self.large(x) + self.small(x) + x


def _timm(name: str) -> tuple[nn.Module, Tensor]:
    return timm.create_model(name), torch.randn(1, 3, 224, 224)


def _yolof() -> tuple[nn.Module, Tensor]:
    model = Model(backbone="resnet50.tv_in1k", weights="random")
    return build_detector(model, [str(i) for i in range(80)]), 255 * torch.rand(1, 3, 224, 224)


def _large_kernel(channels: int) -> tuple[nn.Module, Tensor]:
    return LargeKernel(channels), torch.randn(1, channels, 14, 14)


_TIMM = (
    "repvgg_b1", "mobileone_s4", "fastvit_ma36", "resnet101", "efficientnet_b4", "convnext_base",
    "sequencer2d_s",
)  # fmt: skip
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{name: partial(_timm, name) for name in _TIMM},
    "yolof_resnet50": _yolof,
    **{f"31x31 depthwise, {n} channels": partial(_large_kernel, n) for n in (128, 1024)},
}
"""Each returns a network and an example input."""

TOOLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "fold": fold,
    "timm": lambda model, _: reparameterize_model(model),
    "torch.fx": lambda model, _: fuse(model),
}


def measure(tool: str, network: str) -> Cost | str:
    """Return what a tool takes to fold a network, or the error with which it fails."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, example = NETWORKS[network]()
    model.eval()
    try:
        return measured(lambda: TOOLS[tool](model, example))[1]
    except Exception as error:
        # A tool may not be made for the network, and fail in any way.
        return type(error).__name__


def measure_in_turns(
    network: str, repeats: int, measure: Callable[[str, str], Cost | str] = measure
) -> dict[str, Cost | str]:
    """Return the median over runs of each tool, each in a process of its own, or its error.

    Args:
        network: one of `NETWORKS`.
        repeats: runs of each tool.
        measure: what a process does; must be importable.

    Raises:
        ValueError: there is no such network.
    """
    if network not in NETWORKS:
        raise ValueError(f"{network}: not one of {', '.join(NETWORKS)}")
    found: dict[str, list[Cost | str]] = {tool: [] for tool in TOOLS}
    with ProcessPoolExecutor(1, mp_context=process_context(), max_tasks_per_child=1) as pool:
        for _ in range(repeats):
            for tool, costs in found.items():
                costs.append(pool.submit(measure, tool, network).result())
    return {tool: _median(costs) for tool, costs in found.items()}


def _median(costs: Sequence[Cost | str]) -> Cost | str:
    done = [cost for cost in costs if isinstance(cost, Cost)]
    if len(done) < len(costs):
        return next(cost for cost in costs if isinstance(cost, str))
    peaks = [cost.peak_mb for cost in done if cost.peak_mb is not None]
    return Cost(
        statistics.median(cost.cpu_seconds for cost in done),
        statistics.median(peaks) if peaks else None,
    )


def _cells(network: str, costs: dict[str, Cost | str]) -> list[str]:
    own, timms = costs["fold"], costs["timm"]
    cells = [network]
    for cost in costs.values():
        if isinstance(cost, str):
            cells += [cost, ""]
        else:
            cells += [f"{cost.cpu_seconds:.2f}"]
            cells += ["" if cost.peak_mb is None else f"{cost.peak_mb:.0f}"]
    both = isinstance(own, Cost) and isinstance(timms, Cost)
    # timm's tool may find nothing to do, and take no time that can be measured.
    ratio = f"{own.cpu_seconds / timms.cpu_seconds:.1f}" if both and timms.cpu_seconds else ""
    return [*cells, ratio]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "networks", nargs="*", metavar="NAME", help=f"default: {'; '.join(NETWORKS)}"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each tool, default 3")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure, print."""
    header = ["network", *(f"{tool}, {what}" for tool in TOOLS for what in ("CPU s", "MB"))]
    for number, name in enumerate(args.networks or NETWORKS):
        rows = [_cells(name, measure_in_turns(name, args.repeats))]
        lines = markdown_table([*header, "fold : timm"], rows, right=range(1, 8))
        # A line as soon as it is known; the header only once.
        print("\n".join(lines[2:] if number else lines), flush=True)


if __name__ == "__main__":
    run(main, _parser())
