"""The training loop, top to bottom."""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tinydet.config import ConfigError, Experiment
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.data.loader import (
    DetectionLoader,
    WorkerDiedError,
    dead_workers_named,
    make_train_loader,
)
from tinydet.data.seeding import seed_globally
from tinydet.data.voc import VocDataset
from tinydet.evaluation.saved_detections import save_detections
from tinydet.training.checkpoint import build_unloaded, previous_of, read_last
from tinydet.training.device import pick_device
from tinydet.training.distributed import (
    alike,
    all_agree,
    from_first,
    process_group,
    rank,
    world_size,
)
from tinydet.training.divergence import BadSteps
from tinydet.training.evaluate import evaluate_detector
from tinydet.training.interrupt import Interrupts
from tinydet.training.log import RunLog
from tinydet.training.pictures import sample_images
from tinydet.training.results import write_experiment, write_results
from tinydet.training.resume import (
    changed_settings,
    check_resumable,
    keep_precision,
    restore,
)
from tinydet.training.runs import new_run_dir
from tinydet.training.saving import Saver, going_on
from tinydet.training.state import TrainingState, start_training
from tinydet.yolof.detector import build_detector

logger = logging.getLogger(__name__)


def train(
    experiment: Experiment, run_dir: Path | None = None, resume_from: Path | None = None
) -> None:
    """Train, evaluate and save; everything the run makes is in one folder.

    Processes that torchrun started train together; the first one writes.

    Args:
        experiment: what to train.
        run_dir: the folder; None makes a new one in `runs/`, once all is found to be in order.
        resume_from: a training checkpoint to go on from, exactly where it was written.

    Raises:
        ConfigError: a field of the experiment cannot be met.
        CheckpointError: `resume_from` cannot be used.
        DivergedError: too many steps in a row had a loss that was NaN or infinite.
        WorkerDiedError: a loader process was killed.
        Interrupted: Ctrl-C or SIGTERM; last.pt has been written.
        OSError: the first or the last checkpoint cannot be written.
    """
    with process_group(experiment.train.device) as device:
        _train(experiment, run_dir, resume_from, pick_device(device))


def _train(
    experiment: Experiment, run_dir: Path | None, resume_from: Path | None, device: torch.device
) -> None:
    resumed = from_first(lambda: read_last(resume_from)) if resume_from is not None else None
    changed: list[str] = []
    if resumed is not None:
        check_resumable(experiment, resumed, resume_from)
        experiment = keep_precision(experiment, resumed, device)
        changed = changed_settings(experiment, resumed, device)
    if run_dir is not None and (resumed is None or not _same(run_dir, resume_from.parent)):
        _check_unused(run_dir)
    state, loader, train_index, test_index = prepare(experiment, device, resumed)
    if resumed is not None:
        restore(state, resumed, resume_from)
    run_dir = from_first(lambda: run_dir or new_run_dir(experiment.name))
    if rank() == 0:
        write_experiment(run_dir, experiment, changed)
    if changed:
        logger.warning("resumed with other settings: %s", ", ".join(changed))
    logger.info(
        f"{experiment.name}: {experiment.model.backbone} from {experiment.model.weights} weights, "
        f"{len(train_index)} images to train on, {len(test_index)} to test on, "
        f"{len(state.detector.classes)} classes, {state.plan.iterations} iterations, into {run_dir}"
    )
    saver = Saver(run_dir, state)
    if resumed is None:
        saver.save_last()  # A folder that cannot be written to is found out now, not in an hour.
    try:
        with dead_workers_named():
            _run_epochs(state, loader, (train_index, test_index), run_dir, device, saver)
    except (KeyboardInterrupt, WorkerDiedError, OSError):
        logger.info(saver.how_to_go_on())
        raise


def prepare(
    experiment: Experiment, device: torch.device, resumed: dict[str, Any] | None = None
) -> tuple[TrainingState, DetectionLoader, Index, Index]:
    """Return a run about to begin, its batches, and the splits to train and to evaluate on.

    Args:
        experiment: what to train.
        device: where.
        resumed: a checkpoint whose weights are about to take the place of the detector's own.

    Raises:
        ConfigError: a field of the experiment cannot be met.
    """
    data, settings = experiment.data, experiment.train
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(settings.seed)
    train_index, test_index = from_first(
        lambda: (load_split(data, data.train_split), load_split(data, data.test_split))
    )
    loader = make_train_loader(
        VocDataset(train_index),
        data,
        settings.batch_size,
        settings.seed,
        epochs=settings.epochs,
        rank=rank(),
        world_size=world_size(),
        device=device,
    )
    build = build_detector if resumed is None else build_unloaded
    detector = build(experiment.model, train_index.classes).to(device)
    state = start_training(experiment, detector, len(loader), next(iter(loader)).to(device))
    return state, loader, train_index, test_index


def _run_epochs(
    state: TrainingState,
    loader: DetectionLoader,
    indexes: tuple[Index, Index],
    run_dir: Path,
    device: torch.device,
    saver: Saver,
) -> None:
    epochs, bad_steps = state.experiment.train.epochs, BadSteps(state, run_dir)
    with (
        RunLog(run_dir, state.steps_done, state.steps_left, state.epoch) as log,
        Interrupts().caught() as interrupts,
    ):
        while state.epoch < epochs:
            with interrupts.held_back():
                train_epoch(state, loader, device, log, bad_steps, saver, interrupts)
                saver.try_last()
                # None leaves before last.pt is written, and none goes on to evaluate alone.
                if all_agree([interrupts.received is not None], device)[0]:
                    interrupts.received = interrupts.received or signal.SIGTERM
            state.epoch, state.step = state.epoch + 1, 0
            if state.epoch % state.experiment.train.eval_every == 0 or state.epoch == epochs:
                # Ctrl-C stops an evaluation at once: last.pt has it still to come.
                _evaluate(state, indexes, run_dir, device, log, saver)
                saver.try_last()
            saver.keep_epoch()
    saver.finish()


def train_epoch(
    state: TrainingState,
    loader: DetectionLoader,
    device: torch.device,
    log: RunLog,
    bad_steps: BadSteps,
    saver: Saver,
    interrupts: Interrupts,
) -> None:
    """Train to the end of the epoch, or to the end of the step in which a signal came."""
    settings = state.experiment.train
    loader.set_epoch(state.epoch, state.step)
    state.network.train()
    log.start_epoch()
    positives: Tensor | float = 0.0
    since = time.perf_counter()
    for batch in loader:
        batch = batch.to(device, non_blocking=True)
        images = batch.images.contiguous(memory_format=state.precision.torch_format)
        seed_globally(device, "step", settings.seed, state.epoch, state.step, rank())
        bad_steps.begin(batch)
        with state.precision.autocast(device):
            losses, num_positives = state.network(images, batch.targets)
        bad_steps.end(losses)
        loss = sum(losses.values())
        if settings.accumulate > 1:
            # Weighted by its positives: the sum over an optimiser step is divided by all of them.
            share = num_positives / settings.batch_size
            loss, positives = loss * share, positives + share
        state.scaler.scale(loss).backward()
        state.step += 1
        state.steps_done += 1
        images_seen = len(batch) * world_size()
        state.images_seen += images_seen
        log.step(state.epoch + 1, state.steps_done, losses, state.lr, images_seen)
        if state.at_optimizer_step:
            _update_weights(state, bad_steps, positives)
            positives = 0.0
            state.train_seconds += time.perf_counter() - since
            asked = (interrupts.received is not None, saver.is_due)
            stops, saves = all_agree(asked, device, state.step, settings.accumulate)
            if stops:
                break
            if saves:
                bad_steps.settle()
                log.flush()
                saver.try_last()
            since = time.perf_counter()
    bad_steps.settle()
    log.flush()


def _update_weights(state: TrainingState, bad_steps: BadSteps, positives: Tensor | float) -> None:
    """Make an optimiser step; accumulated gradients are divided by `positives` first."""
    clip_norm = state.experiment.optim.clip_norm
    weights = [p for p in state.detector.parameters() if p.grad is not None]
    gradients = [p.grad for p in weights]
    state.scaler.unscale_(state.optimizer)
    if state.experiment.train.accumulate > 1:
        torch._foreach_div_(gradients, positives)
    norm = get_total_norm(gradients)
    # On a GPU, looking at the norm would be to wait for it.
    if clip_norm and (norm.is_cuda or norm > clip_norm):
        clip_grads_with_norm_(weights, clip_norm, norm)
    if not bad_steps.skips(norm):
        state.scaler.step(state.optimizer)
        if state.ema is not None:
            state.ema.update()
    state.scaler.update()
    state.optimizer.zero_grad()
    state.set_learning_rate()


def _evaluate(
    state: TrainingState,
    indexes: tuple[Index, Index],
    run_dir: Path,
    device: torch.device,
    log: RunLog,
    saver: Saver,
) -> None:
    data, settings = state.experiment.data, state.experiment.train
    detector = state.shipped.eval()
    alike(detector)
    metrics = evaluate_detector(detector, indexes[1], data, settings.eval_batch_size, device)
    images = sample_images(metrics, indexes[1]) if rank() == 0 else {}
    log.evaluation(state.epoch, state.steps_done, metrics.as_dict(), images)
    best_before = state.best_ap50
    # Where no AP50 is known, since there is nothing to find (NaN), the newest weights are the best.
    is_best = metrics.ap50 > best_before or best_before < 0
    state.best_ap50 = max(best_before, metrics.ap50)  # NaN leaves it
    if is_best and not saver.save_best():
        is_best, state.best_ap50 = False, best_before
    if rank() == 0:
        with going_on(found := run_dir / "detections.npz"):
            save_detections(found, indexes[1].image_ids, metrics.classes, metrics.detections)
        with going_on(run_dir / "metrics.json"):
            write_results(run_dir, state, metrics, is_best, *indexes)
    best = f"best AP50 {state.best_ap50:.4f}, " if state.best_ap50 >= 0 else ""
    logger.info(
        f"epoch {state.epoch}/{settings.epochs}: {metrics.in_words()}, {best}"
        f"{state.train_seconds / 60:.1f} min of training"
    )


def _same(folder: Path, other: Path) -> bool:
    return folder.resolve() == other.resolve()


def _check_unused(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--work-dir {run_dir}: is a file; name a folder")
    last = run_dir / "last.pt"
    if any(path.exists() for path in (last, previous_of(last), run_dir / "log.jsonl")):
        raise ConfigError(
            f"--work-dir {run_dir}: holds a run already; add --resume to go on, or name another"
        )
