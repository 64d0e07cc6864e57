"""The training loop, top to bottom."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from tinydet.config import ConfigError, Experiment
from tinydet.data.dataset import load_split
from tinydet.data.index import Index
from tinydet.data.loader import DetectionLoader, make_train_loader
from tinydet.data.voc import VocDataset
from tinydet.training.checkpoint import build_unloaded, read_checkpoint, save_checkpoint
from tinydet.training.device import pick_device
from tinydet.training.evaluate import evaluate_detector
from tinydet.training.log import RunLog
from tinydet.training.pictures import sample_images
from tinydet.training.results import write_experiment, write_results
from tinydet.training.runs import new_run_dir
from tinydet.training.state import TrainingState, keep_precision, start_training
from tinydet.yolof.detector import build_detector

logger = logging.getLogger(__name__)


def train(
    experiment: Experiment, run_dir: Path | None = None, resume_from: Path | None = None
) -> None:
    """Train, evaluate and save; everything the run makes is in one folder.

    Args:
        experiment: what to train.
        run_dir: the folder; None makes a new one in `runs/`, once all is found to be in order.
        resume_from: a training checkpoint to go on from, at the start of its next epoch.

    Raises:
        ConfigError: a field of the experiment cannot be met.
        CheckpointError: `resume_from` cannot be used.
        DivergedError: the loss became NaN or infinite.
    """
    resumed = read_checkpoint(resume_from) if resume_from is not None else None
    if resumed is not None:
        experiment = keep_precision(experiment, resumed)
    elif run_dir is not None:
        _check_unused(run_dir)
    data, settings = experiment.data, experiment.train
    device = pick_device(settings.device)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(settings.seed)
    train_index, test_index = load_split(data, data.train_split), load_split(data, data.test_split)
    loader = make_train_loader(
        VocDataset(train_index), data, settings.batch_size, settings.seed, device=device
    )
    build = build_detector if resumed is None else build_unloaded
    detector = build(experiment.model, train_index.classes).to(device)
    state = start_training(experiment, detector, len(loader), next(iter(loader)).to(device))
    if resumed is not None:
        state.resume(resumed, resume_from)
    run_dir = run_dir or new_run_dir(experiment.name)
    write_experiment(run_dir, experiment)
    logger.info(
        f"{experiment.name}: {experiment.model.backbone} from {experiment.model.weights} weights, "
        f"{len(train_index)} images to train on, {len(test_index)} to test on, "
        f"{len(detector.classes)} classes, {state.plan.iterations} iterations, into {run_dir}"
    )
    try:
        _run_epochs(state, loader, train_index, test_index, run_dir, device)
    except KeyboardInterrupt:
        if (run_dir / "last.pt").is_file():
            logger.info(f"{state.epoch} epochs are kept: --resume-from {run_dir / 'last.pt'}")
        raise


def _run_epochs(
    state: TrainingState,
    loader: DetectionLoader,
    train_index: Index,
    test_index: Index,
    run_dir: Path,
    device: torch.device,
) -> None:
    data, settings = state.experiment.data, state.experiment.train
    with RunLog(run_dir, settings.epochs * len(loader), state.epoch * len(loader)) as log:
        while state.epoch < settings.epochs:
            started = time.perf_counter()
            _train_epoch(state, loader, device, log)
            state.train_seconds += time.perf_counter() - started
            state.images_seen += len(loader) * settings.batch_size
            state.epoch += 1
            if state.epoch % settings.eval_every == 0 or state.epoch == settings.epochs:
                metrics = evaluate_detector(
                    state.shipped, test_index, data, settings.eval_batch_size, device
                )
                is_best = not metrics.ap50 <= state.best_ap50
                state.best_ap50 = max(state.best_ap50, metrics.ap50)
                images = sample_images(metrics, test_index)
                log.evaluation(state.epoch, state.epoch * len(loader), metrics.as_dict(), images)
                if is_best:
                    save_checkpoint(run_dir / "best.pt", state.checkpoint())
                write_results(run_dir, state, metrics, is_best, train_index, test_index)
                logger.info(
                    f"epoch {state.epoch}/{settings.epochs}: AP50 {metrics.ap50:.4f}, "
                    f"AP {metrics.ap:.4f}, best AP50 {state.best_ap50:.4f}, "
                    f"{state.train_seconds / 60:.1f} min of training"
                )
            save_checkpoint(run_dir / "last.pt", state.checkpoint())


def _train_epoch(
    state: TrainingState, loader: DetectionLoader, device: torch.device, log: RunLog
) -> None:
    settings, optim = state.experiment.train, state.experiment.optim
    loader.set_epoch(state.epoch)
    state.detector.train()
    log.start_epoch()
    for step, batch in enumerate(loader, start=1):
        batch = batch.to(device, non_blocking=True)
        images = batch.images.contiguous(memory_format=state.precision.torch_format)
        with state.precision.autocast(device):
            losses = state.detector(images, batch.targets)
        loss = sum(losses.values()) / settings.accumulate
        state.scaler.scale(loss).backward()
        lr = state.optimizer.param_groups[-1]["lr"]
        if step % settings.accumulate == 0 or step == len(loader):
            if optim.clip_norm:
                state.scaler.unscale_(state.optimizer)
                clip_grad_norm_(state.detector.parameters(), optim.clip_norm)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad()
            state.schedule.step()
            if state.ema is not None:
                state.ema.update_parameters(state.detector)
        log.step(state.epoch + 1, state.epoch * len(loader) + step, losses, lr, len(batch))
    log.flush(state.epoch + 1, (state.epoch + 1) * len(loader), lr)


def _check_unused(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"--work-dir {run_dir}: is a file; name a folder")
    if any((run_dir / name).exists() for name in ("last.pt", "log.jsonl")):
        raise ConfigError(
            f"--work-dir {run_dir}: holds a run already; add --resume to go on, or name another"
        )
