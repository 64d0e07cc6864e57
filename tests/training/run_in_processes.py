"""What `test_distributed.py` does in one process and, started by torchrun, in several."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

from tinydet.config import Model
from tinydet.data.dataset import load_split
from tinydet.experiment_file import load_experiment
from tinydet.training import distributed, loop, runs
from tinydet.training.distributed import (
    all_gather_dict,
    all_reduce_mean,
    any_rank,
    any_rank_wants,
    broadcast_buffers,
    broadcast_from_rank0,
    process_group,
    rank,
    world_size,
    wrap_ddp,
)
from tinydet.training.evaluate import evaluate_detector
from tinydet.training.nonfinite import NonFiniteGuard
from tinydet.training.signals import Interrupted
from tinydet.yolof.build import build_detector

STOPPED_AT = (2, 7)  # Of 8 steps, with a question every third: before the first, after the last.
SMALL = Model(
    backbone="test_resnet",
    weights="random",
    feature="C4",
    encoder_channels=16,
    encoder_mid_channels=8,
    dilations=(2,),
    cls_convs=1,
    reg_convs=1,
    score_threshold=0.0,
)
ONLINE = replace(SMALL, expand="dbb", expand_online=True)


def learn(model=SMALL, steps=5, batch=6):
    """Train a little, each process on its share of every batch; return losses and weights."""
    # Random numbers that differ from process to process would show: DDP takes the first one's.
    torch.manual_seed(rank())
    detector = build_detector(model, ("a", "b")).train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    network = wrap_ddp(detector, torch.device("cpu"))
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, generator=generator)
        corners = 32 * torch.rand(batch, 3, 2, generator=generator)
        # The numbers of boxes, and with them of positives, differ from process to process.
        targets = [
            {"boxes": torch.cat([c, c + 24], dim=1)[: i % 4], "labels": torch.tensor([0, 1, 1])}
            for i, c in enumerate(corners)
        ]
        targets = [{**t, "labels": t["labels"][: len(t["boxes"])]} for t in targets]
        mine = slice(rank(), None, world_size())
        loss = sum(network(images[mine], targets[mine])[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(all_reduce_mean(loss.detach()).item())
    return losses, {name: p.detach() for name, p in detector.named_parameters()}


def score(data):
    """Evaluate a fixed detector on a split; its buffers are the first process's."""
    torch.manual_seed(0)
    detector = build_detector(SMALL, ("circle", "square", "triangle")).eval()
    for buffer in detector.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1 + rank())
    broadcast_buffers(detector)
    index = load_split(data, data.test_split)
    return evaluate_detector(detector, index, data, 2, torch.device("cpu")).as_dict()


def whole_run(experiment, folder):
    """Run the training loop with frozen norms, which see no batch, on batches of 6 images."""
    settings = replace(experiment.train, batch_size=6 // world_size(), ema_decay=0.9)

    def frozen(*args):
        return freeze_batch_norm_2d(build_detector(*args))

    with mock.patch.object(loop, "build_detector", frozen):
        loop.train(replace(experiment, train=settings), folder)


def stopped(experiment, folder, told_at):
    """Tell the second process alone, in a step of the first epoch, to stop; return what came."""
    calls, saves = iter(range(1, 100)), []
    save_last, step = runs.save_last, NonFiniteGuard.snapshot

    def begin(*args):
        if next(calls) == told_at and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(*args)

    def save(path, content):
        saves.append([content["epoch"], content["step"]])
        save_last(path, content)

    settings = replace(experiment.train, batch_size=1)
    with (
        mock.patch.object(NonFiniteGuard, "snapshot", begin),
        mock.patch.object(runs, "save_last", save),
        mock.patch.object(distributed, "_STEPS_BETWEEN_SYNCS", 3),
    ):
        try:
            loop.train(replace(experiment, train=settings), folder)
        except Interrupted as error:
            return {"status": error.exit_status, "steps": next(calls) - 1, "saves": saves}
    return {}


def timed_precision(experiment):
    """Return what is chosen by timing steps; processes that wait for others' steps would hang."""
    settings = replace(experiment.train, dtype="auto", memory_format="auto")
    state, *_ = loop.prepare(replace(experiment, train=settings), torch.device("cpu"))
    return [state.precision.dtype, state.precision.memory_format]


def _raise():
    raise ValueError("the first process failed")


def _small_parts():
    failed = ""
    try:
        broadcast_from_rank0(_raise)
    except ValueError as error:
        failed = str(error)
    return {
        "rank": rank(),
        "made": broadcast_from_rank0(lambda: f"by {rank()}"),
        "failed": failed,
        "gathered": all_gather_dict({f"of {rank()}": rank()}),
        "mean": all_reduce_mean(torch.tensor([rank(), 4.0])).tolist(),
        "any": [any_rank(torch.tensor(rank() == n)).item() for n in (0, 1, 9)],
        "agreed": [
            any_rank_wants([rank() == 1, False], torch.device("cpu"), *at)
            for at in ((9,), (10,), (11,), (9, 4), (12, 4), (16, 4), ())
        ],
    }


def main(experiment, folder):
    """Do all of it and write what came out, a file a process."""
    torch.set_num_threads(1)
    with process_group("cpu"):
        losses, weights = learn()
        online_losses, online_weights = learn(ONLINE)
        told = {"losses": losses, "online_losses": online_losses}
        told |= {"metrics": score(experiment.data), **_small_parts()}
        told["precision"] = timed_precision(experiment)
        told["stopped"] = [stopped(experiment, folder / f"at_{n}", n) for n in STOPPED_AT]
        (folder / f"{rank()}.json").write_text(json.dumps(told))
        torch.save({"SMALL": weights, "ONLINE": online_weights}, folder / f"{rank()}.pt")
        whole_run(experiment, folder / "run")


if __name__ == "__main__":
    main(load_experiment(Path(sys.argv[1])), Path(sys.argv[2]))
