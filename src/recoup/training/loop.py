"""The training loop: stages of epochs over a data set, resumable after any step."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recoup.data import Dataset
from recoup.errors import RecoupError
from recoup.evaluation import evaluate
from recoup.network.batches import device_of
from recoup.network.checks import instance, is_module
from recoup.network.emulated import emulated_layers
from recoup.storage.digest import of_model
from recoup.storage.files import keeping, write_atomically
from recoup.storage.folder import make
from recoup.training import checkpoint
from recoup.training.progress import Shown, bar
from recoup.training.schedule import schedule
from recoup.training.settings import Settings, Stage

LOG = "training.jsonl"
PROGRESS = ("stage", "epoch", "step", "loss", "rows")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run gave: one row per epoch (stage, epoch, loss, top1 in percent, learning rate, seconds)."""

    epochs: list[dict[str, Any]]

    @property
    def top1(self) -> float:
        """Accuracy after the last epoch, in percent; an error where none was measured."""
        if not self.epochs:
            raise RecoupError("Trained.top1: no epoch was trained")
        if self.epochs[-1]["top1"] is None:
            raise RecoupError("Trained.top1: nothing was measured: pass test images to train")
        return self.epochs[-1]["top1"]


def train(
    model: nn.Module,
    data: Dataset,
    test: Dataset | None,
    stages: Sequence[Stage],
    settings: Settings = Settings(),  # noqa: B008 -- frozen
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Trained:
    """Train a classifier in place, stage by stage.

    With a ``folder`` the run leaves checkpoint.safetensors (see `recoup.training.checkpoint`) and training.jsonl there.
    Called again after it was interrupted or killed, with the same arguments and the model as it was at the start (same
    weights, gains and layers' configs), it goes on after the last checkpoint and ends with the weights of an
    uninterrupted run, bit for bit.

    Args:
        model: maps images to logits. It ends in eval mode.
        data: what to train on.
        test: what to measure after every epoch; None: nothing.
        stages: in order.
        settings: the rest.
        folder: for checkpoints; None keeps none.
        progress: whether to show a progress bar on standard error.

    Raises:
        RecoupError: a loss that is not finite (the last checkpoint stays), fewer images than a batch, a checkpoint of
            another run: the message names the first difference.
        KeyboardInterrupt: with a note that says where the run can be taken up.
    """
    is_module(model, "train")
    instance(data, Dataset, "train", "data", "recoup.data.load('digits')")
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not all(isinstance(s, Stage) for s in stages):
        raise RecoupError(f"train: stages must be Stage objects; got {stages!r}")
    if not stages:
        raise RecoupError("train: there are no stages")
    if len(data) < settings.batch_size:
        raise RecoupError(f"train: {len(data)} images are less than a batch of {settings.batch_size}")
    return _Run(model, data, test, stages, settings, None if folder is None else Path(folder)).finish(progress)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        test: Dataset | None,
        stages: Any,
        settings: Settings,
        folder: Path | None,
    ) -> None:
        self.model, self.data, self.test, self.settings, self.folder = model, data, test, settings, folder
        self.stages: Sequence[Stage] = stages
        self.stage = self.epoch = self.step = 0  # of the epoch
        self.loss = 0.0
        self.rows: list[dict[str, Any]] = []
        self.kept: tuple[int, int, int] | None = None  # where the last checkpoint stands
        identity = {
            "settings": asdict(settings),
            "layers": {name: repr(layer.config) for name, layer in emulated_layers(model).items()},
            "stages": [[s.name, s.epochs, s.learning_rate] for s in stages],
            "data": [data.name, data.split, len(data)],
            "model": [type(model).__name__, sum(p.numel() for p in model.parameters())],
            "weights": of_model(model),
        }
        self.file = None if folder is None else checkpoint.state_file(folder, identity)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.data) // self.settings.batch_size

    def finish(self, progress: bool) -> Trained:
        tensors = self._resume()
        if tensors is None:
            torch.manual_seed(self.settings.seed)
        try:
            with bar(progress, sum(s.epochs for s in self.stages) * self.steps) as advance:
                advance(
                    sum(s.epochs for s in self.stages[: self.stage]) * self.steps + self.epoch * self.steps + self.step
                )
                while self.stage < len(self.stages):
                    self._run_stage(tensors, advance)
                    tensors = None
        except KeyboardInterrupt as interrupt:
            if self.folder is not None:
                interrupt.add_note(
                    f"the run is kept in {self.folder}; the same call, with the model as it was at the start, goes on "
                    "from there"
                )
            raise
        finally:
            self.model.eval()
        return Trained(self.rows)

    def _run_stage(self, tensors: Any, advance: Shown) -> None:
        stage = self.stages[self.stage]
        stage.prepare(self.model)
        optimizer = self._optimizer(stage)
        if tensors is not None:
            checkpoint.restore(tensors, self.model, optimizer)
        factor = schedule(self.settings.schedule, stage.epochs * self.steps, self.settings.warm_up)
        while self.epoch < stage.epochs:
            self._run_epoch(stage, optimizer, factor, advance)
        self.stage, self.epoch = self.stage + 1, 0
        if self.stage == len(self.stages):
            self._save(optimizer)

    def _run_epoch(self, stage: Stage, optimizer: Any, factor: Callable[[int], float], advance: Any) -> None:
        started, settings = time.perf_counter(), self.settings
        device = device_of(self.model)
        number = sum(s.epochs for s in self.stages[: self.stage]) + self.epoch
        batches = self.data.batches(
            settings.batch_size,
            augment=settings.augment and self.data.augmentation is not None,
            seed=settings.seed * 100_003 + number,
            shuffle=True,
            drop_last=True,
        )
        self.model.train()
        rate = 0.0
        for index, (x, y) in enumerate(batches):
            if index < self.step:
                continue
            rate = stage.learning_rate * factor(self.epoch * self.steps + index)
            for group in optimizer.param_groups:
                group["lr"] = rate
            self.loss += self._step(optimizer, x.to(device), y.to(device), stage)
            self.step = index + 1
            if self.step % settings.save_every == 0 and self.step < self.steps:
                self._save(optimizer)
            advance(1)
        top1 = None
        if self.test is not None:
            top1 = evaluate(self.model, self.test.batches(250)).top1
        row = {"stage": stage.name, "epoch": self.epoch + 1, "loss": self.loss / self.steps, "top1": top1}
        self.rows.append({**row, "learning_rate": rate, "seconds": round(time.perf_counter() - started, 3)})
        advance.epoch(self.rows[-1])
        self.epoch, self.step, self.loss = self.epoch + 1, 0, 0.0
        self._save(optimizer)

    def _step(self, optimizer: Any, x: torch.Tensor, y: torch.Tensor, stage: Stage) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y, label_smoothing=self.settings.label_smoothing)
        value = float(loss.detach())
        if not math.isfinite(value):
            kept = "" if self.folder is None else f"; {self.folder} keeps the last checkpoint"
            raise RecoupError(
                f"train: the loss is {value} in stage {stage.name!r}, epoch {self.epoch + 1}, step {self.step + 1}: "
                f"lower the learning rate or set clip{kept}"
            )
        loss.backward()
        if self.settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        optimizer.step()
        return value

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        s = self.settings
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if s.optimizer == "adamw":
            return torch.optim.AdamW(parameters, stage.learning_rate, weight_decay=s.weight_decay)
        return torch.optim.SGD(
            parameters, stage.learning_rate, s.momentum, weight_decay=s.weight_decay, nesterov=s.nesterov
        )

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        if self.folder is None or self.file is None:
            return
        make(self.folder)
        where = {name: getattr(self, name) for name in PROGRESS}
        with keeping(self._kept):
            self.file.write((checkpoint.tensors(self.model, optimizer), where))
            self.kept = (self.stage, self.epoch, self.step)
            write_atomically(self.folder / LOG, "".join(json.dumps(row) + "\n" for row in self.rows))

    def _kept(self) -> str:
        """What a run that cannot be kept any further leaves."""
        if self.kept is None:
            return "no checkpoint is kept"
        stage, epoch, step = self.kept
        where = (
            "the end"
            if stage == len(self.stages)
            else f"stage {self.stages[stage].name!r}, epoch {epoch + 1}, step {step}"
        )
        return (
            f"the checkpoint at {where} is kept; the same call, with the model as it was at the start, goes on from it"
        )

    def _resume(self) -> Any:
        """The tensors of the last checkpoint, None without one; the counters are set to it."""
        kept = None if self.file is None else self.file.read()
        if kept is None:
            return None
        tensors, where = kept
        for name in PROGRESS:
            setattr(self, name, where[name])
        self.kept = (self.stage, self.epoch, self.step)
        if self.stage == len(self.stages):  # finished: only the weights are wanted
            self.stages[-1].prepare(self.model)
            checkpoint.restore(tensors, self.model, self._optimizer(self.stages[-1]))
        return tensors
