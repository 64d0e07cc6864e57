"""What training-time branches cost beside the convs and inside their weights.

python tests/benchmarks/expand_cost.py [--backbones ...] [--blocks ...] [--sizes 160 320]

Training steps (forward, backward, SGD) of the plain network and of its expanded forms take turns in
one process, one thread and float32. Ratios are of the processor's time, medians over the rounds. MB
is the most memory that a step takes beyond the weights and the optimizer's state: activations,
gradients and, online, the kernels.
"""

from __future__ import annotations

import argparse
import statistics

from fold_cost import Cost, measured

from tinydet.cli import run

BACKBONES = ("tf_efficientnet_lite0", "resnet18", "regnetx_002")
BLOCKS = ("repvgg", "acnet", "dbb", "orepa", "mobileone")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, help="names of timm's")
    parser.add_argument("--blocks", nargs="+", default=BLOCKS, help="blocks of expand")
    parser.add_argument("--where", default="3x3 5x5", help='convs to expand; default "3x3 5x5"')
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 320], help="image sides")
    parser.add_argument("--batch", type=int, default=8, help="images a step; default 8")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each; default 3")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print a row for each backbone, size and block."""
    import timm
    import torch
    from torch import nn

    from tinydet.memory import machine_memory
    from tinydet.reparam import expand
    from tinydet.training.precision import Precision

    torch.set_num_threads(1)
    precision = Precision("float32", "channels_last", "")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
        sum(map_.square().mean() for map_ in model(images)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def costs(models: list[nn.Module], images: torch.Tensor) -> list[list[Cost]]:
        found: list[list[Cost]] = [[] for _ in models]
        optimizers = [torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9) for m in models]
        for done in range(args.rounds + 1):
            for model, optimizer, costs in zip(models, optimizers, found, strict=True):
                _, cost = measured(lambda m=model, o=optimizer: step(m, o, images))
                if done:  # The first step makes the optimizer's state.
                    costs.append(cost)
        return found

    print(f"torch {torch.__version__}, {machine_memory() / 1e9:.0f} GB, batch {args.batch}")
    print(
        "backbone               px block         plain s  beside  online  plain MB  beside  online"
    )
    for name in args.backbones:
        for size in args.sizes:
            images = torch.randn(args.batch, 3, size, size)
            images = images.contiguous(memory_format=torch.channels_last)
            for block in args.blocks:
                torch.manual_seed(0)
                plain = timm.create_model(name, features_only=True).train()
                forms = [expand(plain, block, args.where, online=o) for o in (False, True)]
                models = [plain, *forms]
                for model in models:
                    precision.prepare(model)
                found = costs(models, images)
                seconds = [[cost.cpu_seconds for cost in form] for form in found]
                ratios = [
                    statistics.median(a / b for a, b in zip(form, seconds[0], strict=True))
                    for form in seconds[1:]
                ]
                peaks = [statistics.median(cost.peak_mb or 0 for cost in form) for form in found]
                print(
                    f"{name:22} {size:3} {block:12} {statistics.median(seconds[0]):8.2f} "
                    f"{ratios[0]:7.2f} {ratios[1]:7.2f} {peaks[0]:9.0f} "
                    f"{peaks[1] / peaks[0]:7.2f} {peaks[2] / peaks[0]:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    run(main, _parser())
