"""The training loop, top to bottom."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tinydet.atomic import warn_on_oserror
from tinydet.config import ConfigError, Experiment
from tinydet.console import show_log
from tinydet.data.dataset import DetectionDataset, load_split
from tinydet.data.index import Index
from tinydet.data.loader import (
    DetectionLoader,
    WorkerDiedError,
    dead_workers_named,
    make_train_loader,
)
from tinydet.data.sample import Batch
from tinydet.data.seeding import seed_globally
from tinydet.evaluation.saved_detections import save_detections
from tinydet.memory import is_out_of_memory
from tinydet.reparam.unfold import calibrate_norms
from tinydet.training.checkpoint import build_unloaded, previous_of, read_last
from tinydet.training.device import pick_device
from tinydet.training.distributed import (
    any_rank_wants,
    broadcast_buffers,
    broadcast_from_rank0,
    process_group,
    rank,
    world_size,
)
from tinydet.training.evaluate import evaluate_detector, require_objects
from tinydet.training.log import RunLog
from tinydet.training.nonfinite import NonFiniteGuard
from tinydet.training.pictures import draw_samples
from tinydet.training.results import write_experiment, write_results
from tinydet.training.resume import (
    changed_settings,
    check_resumable,
    keep_precision,
    restore,
)
from tinydet.training.runs import Saver, claimed, new_run_dir
from tinydet.training.signals import Signals
from tinydet.training.state import TrainingState, start_training
from tinydet.training.threads import Threads
from tinydet.yolof.build import build_detector

logger = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    run_dir: str | Path | None = None,
    resume_from: str | Path | None = None,
    *,
    arguments: Sequence[str] | None = None,
    code: str = "",
) -> Path:
    """Train, evaluate and save a detector; everything goes into one folder, which is returned.

    Processes started by torchrun train together; rank 0 writes. Progress and results are logged;
    they are printed if the program has set up no logging.

    Args:
        experiment: what is trained.
        run_dir: the run's folder; None creates the next one in `runs/`.
        resume_from: a training checkpoint to resume from, at exactly the step it was written.
        arguments: of `tools/train.py` that give this experiment, for the command that resumes it
            and is printed if it is interrupted; None is the run's experiment.json.
        code: `tinydet.experiment_code.experiment_code` of the experiment's file, to be recorded.

    Raises:
        ConfigError: a field of the experiment is wrong.
        CheckpointError: `resume_from` cannot be used, or another process trains in that folder.
        DivergedError: too many steps in a row had a non-finite loss.
        WorkerDiedError: a loader process was killed.
        Interrupted: Ctrl-C or SIGTERM; last.pt has been written.
        OSError: the first or the last checkpoint cannot be written.
    """
    show_log()
    folder = None if run_dir is None else Path(run_dir)
    checkpoint = None if resume_from is None else Path(resume_from)
    with process_group(experiment.train.device) as device_name, ExitStack() as held:
        device = pick_device(device_name)
        return _train(experiment, folder, checkpoint, arguments, code, device, held)


def _train(
    experiment: Experiment,
    run_dir: Path | None,
    resume_from: Path | None,
    arguments: Sequence[str] | None,
    code: str,
    device: torch.device,
    held: ExitStack,
) -> Path:
    checkpoint: dict[str, Any] | None = None
    changed: list[str] = []
    goes_on = bool(
        run_dir and resume_from and run_dir.is_dir() and _same(run_dir, resume_from.parent)
    )
    if goes_on:
        broadcast_from_rank0(lambda: _claim(run_dir, experiment.name, held))
    if resume_from is not None:
        checkpoint = broadcast_from_rank0(lambda: read_last(resume_from))
        check_resumable(experiment, checkpoint, resume_from)
        experiment = keep_precision(experiment, checkpoint, device)
        changed = changed_settings(experiment, checkpoint, device)
    if run_dir is not None and not goes_on:
        _check_unused(run_dir)
    state, loader, train_index, test_index = prepare(experiment, device, checkpoint)
    if checkpoint is not None and resume_from is not None:
        restore(state, checkpoint, resume_from)
        logger.info(
            f"resuming from {resume_from}: {state.epoch} epochs and {state.step} of {len(loader)} "
            "batches are done"
        )
    if run_dir is None or not goes_on:
        run_dir = broadcast_from_rank0(lambda: _claim(run_dir, experiment.name, held))
    if rank() == 0:
        write_experiment(run_dir, experiment, changed, code)
    if changed:
        logger.warning("resumed with other settings: %s", ", ".join(changed))
    try:
        require_objects(test_index)
    except ConfigError as error:
        logger.warning("%s", error)
    logger.info(
        f"{experiment.name}: {experiment.model.backbone}, {experiment.model.weights} weights; "
        f"{len(train_index)} training and {len(test_index)} test images, "
        f"{len(state.detector.classes)} classes; {state.schedule.iterations} iterations; {run_dir}"
    )
    saver = Saver(run_dir, state)
    if checkpoint is None:
        saver.save_last()  # A folder that cannot be written to shows now and not in an hour.
    else:
        # Of the folder, not of the checkpoint: that may be of another one, or older than best.pt.
        state.best_ap50 = broadcast_from_rank0(saver.best_ap50)
    try:
        with dead_workers_named():
            _train_epochs(state, loader, train_index, test_index, run_dir, device, saver)
    except BaseException as error:
        resumable = isinstance(error, (KeyboardInterrupt, WorkerDiedError, OSError))
        if resumable or is_out_of_memory(error):
            logger.info(saver.resume_command(arguments))
        raise
    return run_dir


def prepare(
    experiment: Experiment, device: torch.device, checkpoint: dict[str, Any] | None = None
) -> tuple[TrainingState, DetectionLoader, Index, Index]:
    """Return the state of a new run, its training loader, and the training and the test split.

    Args:
        experiment: what is trained.
        device: where.
        checkpoint: whose weights will replace the detector's initial ones, which are not fetched.

    Raises:
        ConfigError: a field of the experiment is wrong.
    """
    data, settings = experiment.data, experiment.train
    # The fastest algorithm is not the same one each time.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(settings.seed)
    threads = Threads(device)
    threads.adapt()
    train_index, test_index = broadcast_from_rank0(
        lambda: (load_split(data, data.train_split), load_split(data, data.test_split))
    )
    if train_index.difficult.all():
        raise ConfigError(
            f"{train_index.root} ({train_index.split}): all of its objects are difficult, and so "
            "left out of training; name another data.train_split, or mark them otherwise"
        )
    loader = make_train_loader(
        DetectionDataset(train_index),
        data,
        settings.batch_size,
        settings.seed,
        epochs=settings.epochs,
        rank=rank(),
        world_size=world_size(),
        device=device,
    )
    model = experiment.model
    is_frozen = model.freeze_stages > 0 or model.freeze_norms
    if checkpoint is None and model.weights == "random" and is_frozen:
        logger.warning(
            "model.weights=random: frozen layers never learn; let them with "
            "model.freeze_stages=0 model.freeze_norms=false"
        )
    build = build_detector if checkpoint is None else build_unloaded
    detector = build(model, train_index.classes).to(device)
    first_batch = next(iter(loader)).to(device)
    if detector.norms_without_statistics:
        calibrate_norms(detector, detector.norms_without_statistics, first_batch.images)
        detector.norms_without_statistics = ()
    state = start_training(experiment, detector, len(loader), first_batch, threads)
    return state, loader, train_index, test_index


def _train_epochs(
    state: TrainingState,
    loader: DetectionLoader,
    train_index: Index,
    test_index: Index,
    run_dir: Path,
    device: torch.device,
    saver: Saver,
) -> None:
    settings = state.experiment.train
    guard = NonFiniteGuard(state, run_dir)
    with (
        RunLog(run_dir, state.steps_done, state.steps_left, state.epoch, settings.epochs) as log,
        Signals().catch() as signals,
    ):
        while state.epoch < settings.epochs:
            with signals.deferred():  # A signal raises at its end, before the epoch is counted.
                train_epoch(state, loader, device, log, guard, saver, signals)
                saver.try_save_last(ends=signals.received is not None)
                # All ranks wait for last.pt, and stop together.
                if any_rank_wants([signals.received is not None], device)[0]:
                    signals.received = signals.received or signal.SIGTERM
            state.epoch, state.step = state.epoch + 1, 0
            evaluates = state.epoch % settings.eval_every == 0 or state.epoch == settings.epochs
            if evaluates:
                # Ctrl-C stops an evaluation at once: resuming repeats it.
                _evaluate(state, train_index, test_index, run_dir, device, log, saver)
            saver.save_epoch()  # Before last.pt, from where a killed run would go on without it.
            if evaluates:
                saver.try_save_last()
    saver.finish()


def train_epoch(
    state: TrainingState,
    loader: DetectionLoader,
    device: torch.device,
    log: RunLog,
    guard: NonFiniteGuard,
    saver: Saver,
    signals: Signals,
) -> None:
    """Train to the end of the epoch, or until a signal ends it after an optimizer step.

    A single process stops and saves after the step in which it was asked to; several processes
    agree on it in every tenth step.
    """
    settings = state.experiment.train
    loader.set_epoch(state.epoch, state.step)
    state.network.train()
    log.start_epoch()
    start = time.perf_counter()
    for batches in _groups(loader, settings.accumulate):  # an optimizer step each
        state.threads.adapt()
        guard.snapshot()  # of the norms' running statistics, should the step be skipped
        losses: list[Mapping[str, Tensor]] = []
        loss_weights: list[Tensor] = []
        for batch in batches:
            batch = batch.to(device)
            images = batch.images.contiguous(memory_format=state.precision.torch_format)
            # So that a resumed run draws what an uninterrupted one does, in dropout for example.
            seed_globally(device, "step", settings.seed, state.epoch, state.step, rank())
            with state.precision.autocast(device):
                batch_losses, num_positives = state.network(images, batch.targets)
            loss: Tensor = sum(batch_losses.values())
            if settings.accumulate > 1:
                # A mean over the batch's positives (of all ranks): weighted by their number, and
                # the gradient divided by the sum of the weights, it adds up to that of one large
                # batch. Dividing by the batch size keeps float16 in range.
                loss_weights.append(num_positives / settings.batch_size)
                loss = loss * loss_weights[-1]
            # DDP averages every batch: `no_sync` would give the same sum.
            state.scaler.scale(loss).backward()
            losses.append(batch_losses)
            images_done = len(batch) * world_size()
            state.count_batch(images_done)
            log.step(state.epoch + 1, state.steps_done, batch_losses, state.lr, images_done)
        _optimizer_step(state, guard, batches, losses, loss_weights)
        state.train_seconds += time.perf_counter() - start
        wanted = (signals.received is not None, saver.is_due)
        stop, save = any_rank_wants(wanted, device, state.step, settings.accumulate)
        if stop:
            signals.received = signals.received or signal.SIGTERM  # sent to another rank
            break
        if save:
            guard.settle()  # Verdicts of a GPU come a step late.
            log.flush()
            saver.try_save_last()
        start = time.perf_counter()
    guard.settle()
    log.end_epoch()


def _optimizer_step(
    state: TrainingState,
    guard: NonFiniteGuard,
    batches: Sequence[Batch],
    losses: Sequence[Mapping[str, Tensor]],
    loss_weights: list[Tensor],
) -> None:
    """Clip the gradient, update the weights and their average, and set the next learning rate."""
    clip_norm = state.experiment.optim.clip_norm
    parameters = [p for p in state.detector.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    state.scaler.unscale_(state.optimizer)
    if loss_weights:
        torch._foreach_div_(gradients, torch.stack(loss_weights).sum())
    norm = get_total_norm(gradients)
    # Comparing would make the host wait for a GPU: there the gradient is always multiplied.
    if clip_norm and (norm.is_cuda or norm > clip_norm):
        clip_grads_with_norm_(parameters, clip_norm, norm)
    # With CUDA always True: there the fused optimizer skips a non-finite step by itself.
    if guard.accepts(batches, losses, norm):
        state.scaler.step(state.optimizer)
        if state.ema is not None:
            state.ema.update()
    state.scaler.update()
    state.optimizer.zero_grad()
    state.set_learning_rate()


def _evaluate(
    state: TrainingState,
    train_index: Index,
    test_index: Index,
    run_dir: Path,
    device: torch.device,
    log: RunLog,
    saver: Saver,
) -> None:
    """Evaluate on the test split; write best.pt, detections.npz, metrics.json and report.html."""
    data, settings = state.experiment.data, state.experiment.train
    detector = state.eval_model.eval()
    broadcast_buffers(detector)
    metrics = evaluate_detector(detector, test_index, data, settings.eval_batch_size, device)
    images = draw_samples(metrics, test_index) if rank() == 0 else {}
    log.evaluation(state.epoch, state.steps_done, metrics.as_dict(), images)
    best_before = state.best_ap50
    # Where AP50 is undefined (NaN: nothing to find), the newest weights are the best. Equal AP50 is
    # that of this evaluation repeated, if the run was killed after best.pt was written.
    is_best = metrics.ap50 >= best_before or best_before < 0
    state.best_ap50 = max(best_before, metrics.ap50)  # NaN leaves it
    if is_best and not saver.save_best():
        is_best, state.best_ap50 = False, best_before
    if rank() == 0:
        with warn_on_oserror(path := run_dir / "detections.npz"):
            save_detections(path, test_index.image_ids, metrics.classes, metrics.detections)
        with warn_on_oserror(run_dir / "metrics.json"):
            write_results(run_dir, state, metrics, is_best, train_index, test_index)
    best = f"best AP50 {100 * state.best_ap50:.2f} %, " if state.best_ap50 >= 0 else ""
    logger.info(
        f"epoch {state.epoch}/{settings.epochs}: {metrics.in_words()}, {best}"
        f"{state.train_seconds / 60:.1f} min of training"
    )


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield `size` batches at a time; the last group may be shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _same(folder: Path, other: Path) -> bool:
    return folder.resolve() == other.resolve()


def _claim(run_dir: Path | None, name: str, held: ExitStack) -> Path:
    """Return the run's folder, a new one if there is none, kept for this process by `held`."""
    folder = run_dir or new_run_dir(name)
    held.enter_context(claimed(folder))
    return folder


def _check_unused(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--work-dir {run_dir}: is a file; name a folder")
    last = run_dir / "last.pt"
    if any(path.exists() for path in (last, previous_of(last), run_dir / "log.jsonl")):
        raise ConfigError(
            f"--work-dir {run_dir}: holds a run already; add --resume to resume it, or name another"
        )
