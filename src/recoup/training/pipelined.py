"""Training as a pipeline does it: one sample at a time, late weights, mitigations; resumable after any sample."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recoup.data import Dataset
from recoup.errors import RecoupError
from recoup.evaluation import evaluate
from recoup.fields import integer
from recoup.network.batches import device_of
from recoup.pipeline import Mitigation, Simulator, automatic, chain, constant_delays, scale_hyperparameters
from recoup.pipeline.schedule import MAX_STAGES, check_delays
from recoup.pipeline.schedule import delays as scheduled
from recoup.storage.digest import of_model
from recoup.storage.files import keeping
from recoup.storage.folder import make
from recoup.storage.lock import Lock
from recoup.storage.statefile import Difference, StateFile, kind_and_text, torch_bytes, torch_state
from recoup.training.progress import bar
from recoup.training.schedule import schedule
from recoup.training.settings import Settings

FILE = "pipeline.pt"
SCHEDULES = ("fine-grained", "1f1b")


def delays_named(value: str | int) -> str | int:
    """What delays may be called: ``fine-grained``, ``1f1b``, or a number of updates, the same in all stages.

    Raises:
        RecoupError: anything else.
    """
    if value in SCHEDULES:
        return value
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= MAX_STAGES:
        return number
    raise RecoupError(
        f"delays {value!r}: must be {', '.join(SCHEDULES)} or an integer from 0 to {MAX_STAGES}, for all stages"
    )


def _delays(value: str | int | Sequence[int] | None, stages: int) -> list[int]:
    """Of every stage."""
    if value is not None and not isinstance(value, str | int):
        return check_delays(value, stages)
    named = delays_named("fine-grained" if value is None else value)
    if isinstance(named, int):
        return constant_delays(stages, named)
    return scheduled(stages, "1f1b" if named == "1f1b" else "fine-grained")


@dataclass(frozen=True, slots=True)
class Pipelined:
    """What is trained with, worked out: stages and delays, the rate of every update, and the rest of an update."""

    stages: list[list[str]]
    delays: list[int]
    rate: Callable[[int], float]
    highest: float
    momentum: float
    mitigation: Mitigation
    update_size: int
    epochs: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        count: int,
        settings: Settings,
        *,
        mitigation: Mitigation | str,
        epochs: int,
        learning_rate: float,
        reference_batch: int = 128,
        stages: Sequence[Sequence[str]] | None = None,
        delays: str | int | Sequence[int] | None = None,
        update_size: int = 1,
    ) -> "Pipelined":
        """Of `train_pipelined`'s arguments, for ``count`` samples an epoch."""
        made = [list(names) for names in (_stages(model) if stages is None else stages)]
        update_size = integer("train_pipelined", "update_size", update_size, (1, max(1, epochs * count)))
        rate, momentum = scale_hyperparameters(learning_rate, settings.momentum, reference_batch, update_size)
        updates = epochs * count // update_size
        factor = schedule(settings.schedule, updates, settings.warm_up)
        how = Mitigation.parse(mitigation) if isinstance(mitigation, str) else mitigation

        def falling(update: int) -> float:
            return rate * factor(min(update, updates - 1))

        return cls(made, _delays(delays, len(made)), falling, rate, momentum, how, update_size, epochs)

    def identity(self, model: nn.Module, data: Dataset, settings: Settings) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "weights": of_model(model),
            "data": [data.name, data.split, len(data)],
            "epochs": self.epochs,
            "rate": self.highest,
            "settings": repr(settings),
            "mitigation": repr(self.mitigation),
            "delays": self.delays,
            "update_size": self.update_size,
        }

    def simulator(self, model: nn.Module, settings: Settings) -> Simulator:
        """The pipeline on one process."""
        return Simulator(
            model,
            self.stages,
            self.delays,
            self.rate,
            self.momentum,
            settings.weight_decay,
            self.mitigation,
            F.cross_entropy,
            update_size=self.update_size,
            seed=settings.seed,
        )


def _stages(model: nn.Module) -> list[list[str]]:
    """By a rule for its class, else by its operations."""
    try:
        return automatic(model)
    except RecoupError:
        return chain(model).stages


def train_pipelined(
    model: nn.Module,
    data: Dataset,
    test: Dataset | None,
    *,
    mitigation: Mitigation | str,
    epochs: int,
    learning_rate: float,
    settings: Settings,
    reference_batch: int = 128,
    stages: Sequence[Sequence[str]] | None = None,
    delays: str | int | Sequence[int] | None = None,
    update_size: int = 1,
    folder: str | Path | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train at batch one with the delays of a pipeline, in place.

    Args:
        model, data, test, folder, progress: as for `train`.
        mitigation: see `Mitigation`; ``"none"`` with ``delays=0`` is plain SGD with momentum at batch one.
        epochs: passes over the data.
        learning_rate: at its highest, and ``settings.momentum``: those of batches of ``reference_batch``;
            `scale_hyperparameters` turns them into those of ``update_size``.
        settings: momentum, weight decay, schedule, warm-up (in updates), augmentation, seed and save_every (in
            samples); ``batch_size`` is not used.
        reference_batch: as large as ``update_size`` takes the hyperparameters as they are.
        stages: lists of module names; None: `pipeline.automatic`, or the stages of `pipeline.chain`.
        delays: of every stage in updates, or one number for all, ``"1f1b"`` or ``"fine-grained"``; None: the latter.
        update_size: samples whose gradients are averaged into one update. What is left of the last one is not used.

    Returns:
        A row per epoch: epoch, loss, top1, learning_rate.

    Raises:
        RecoupError: what `Simulator` raises, with the sample; delays that do not exist; a checkpoint of another run.
    """
    plan = Pipelined.of(
        model,
        len(data),
        settings,
        mitigation=mitigation,
        epochs=epochs,
        learning_rate=learning_rate,
        reference_batch=reference_batch,
        stages=stages,
        delays=delays,
        update_size=update_size,
    )
    identity = plan.identity(model, data, settings)
    simulator = plan.simulator(model, settings)
    keeper = _Keeper(None if folder is None else Path(folder), identity, simulator)
    if not keeper.there:
        torch.manual_seed(settings.seed)  # of what draws outside layers; a checkpoint has its state
    try:
        rows = _trained(model, data, test, simulator, keeper, epochs, settings, progress)
    finally:
        keeper.close()
    model.eval()
    return rows


def _trained(
    model: nn.Module,
    data: Dataset,
    test: Dataset | None,
    simulator: Simulator,
    keeper: "_Keeper",
    epochs: int,
    settings: Settings,
    progress: bool,
) -> list[dict[str, Any]]:
    """All epochs from where the keeper was left; their rows."""
    rows, loss = keeper.resume()
    device = device_of(model)
    augment = settings.augment and data.augmentation is not None
    with bar(progress, epochs * len(data)) as advance:
        advance(simulator.steps)
        for epoch in range(simulator.steps // len(data), epochs):
            model.train()
            done = simulator.steps - epoch * len(data)
            batches = data.batches(1, augment=augment, seed=settings.seed * 100_003 + epoch, shuffle=True)
            for index, (x, y) in enumerate(batches):
                if index < done:
                    continue
                loss += _step(simulator, x.to(device), y.to(device), epoch, index)
                advance(1)
                if simulator.steps % settings.save_every == 0 and index + 1 < len(data):
                    keeper.save(rows, loss)
            top1 = None if test is None else evaluate(model, test.batches(250)).top1
            row = {"epoch": epoch + 1, "loss": loss / len(data), "top1": top1, "learning_rate": simulator.rate}
            advance.epoch(row)
            rows, loss = [*rows, row], 0.0
            keeper.save(rows, loss)
    return rows


def _step(simulator: Simulator, x: Tensor, y: Tensor, epoch: int, sample: int) -> float:
    """A step, whose error says where in the training it is."""
    try:
        return simulator.step(x, y)
    except RecoupError as error:
        raise RecoupError(f"train_pipelined: epoch {epoch + 1}, sample {sample + 1}: {error}") from error


class _Keeper:
    """One checkpoint: the simulator's state, and the rows and the loss so far."""

    def __init__(self, folder: Path | None, identity: dict[str, Any], simulator: Simulator) -> None:
        self.simulator, self.file, self.lock = simulator, None, None
        if folder is not None:
            make(folder)
            self.lock = Lock(folder / "pipeline.lock", "train_pipelined")
            self.file = StateFile(folder / FILE, identity, _encoded, _decoded, _damaged, _foreign)

    def close(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            self.lock.release()

    @property
    def there(self) -> bool:
        """Whether there is one."""
        return self.file is not None and self.file.path.exists()

    def resume(self) -> tuple[list[dict[str, Any]], float]:
        """Take up what the folder keeps, if anything."""
        kept = None if self.file is None else self.file.read()
        if kept is None:
            return [], 0.0
        rows, loss, state = kept
        self.simulator.load_state_dict(state)
        return rows, loss

    def save(self, rows: list[dict[str, Any]], loss: float) -> None:
        """Keep everything."""
        if self.file is not None:
            with keeping(self._kept):
                self.file.write((rows, loss, self.simulator.state_dict()))

    def _kept(self) -> str:
        if not self.there:
            return "no checkpoint is kept"
        return "the checkpoint before it is kept; the same call, with the model as it was at the start, goes on from it"


def _encoded(state: tuple[list[dict[str, Any]], float, Any], identity: Mapping[str, Any]) -> bytes:
    rows, loss, simulator = state
    return torch_bytes(
        {"identity": json.dumps(identity), "rows": json.dumps(rows), "loss": loss, "simulator": simulator}
    )


def _decoded(path: Path) -> tuple[Any, dict[str, Any]]:
    content = torch_state(path)
    state = json.loads(content["rows"]), float(content["loss"]), content["simulator"]
    return state, json.loads(content["identity"])


def _damaged(path: Path, error: Exception) -> str:
    return f"train_pipelined: {path} is no checkpoint ({kind_and_text(error)}); delete it to start anew"


def _foreign(path: Path, different: list[Difference]) -> str:
    name, before, now = different[0]
    return f"train_pipelined: {path} is of another run ({name} was {before!r}, is {now!r}): choose another folder"
