"""Training as a pipeline does it: one sample at a time, late weights, mitigations; resumable after any sample."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recoup.batches import device_of
from recoup.data import Dataset
from recoup.digest import of_model
from recoup.errors import RecoupError
from recoup.evaluate import evaluate
from recoup.files import write_atomically
from recoup.pipeline import Mitigation, Simulator, automatic, scale_hyperparameters
from recoup.pipeline.schedule import delays as fine_grained
from recoup.training.progress import bar
from recoup.training.schedule import schedule
from recoup.training.settings import Settings

FILE = "pipeline.pt"


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
    delays: Sequence[int] | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Train at batch one with the delays of a pipeline, in place.

    Args:
        model, data, test, folder, progress: as for `train`.
        mitigation: see `Mitigation`; ``"none"`` with ``delays`` of zeros is plain SGD at batch one.
        epochs: passes over the data.
        learning_rate: at its highest, and ``settings.momentum``: those of batches of ``reference_batch``;
            `scale_hyperparameters` turns them into those of batch one.
        settings: momentum, weight decay, schedule, warm-up, augmentation, seed and save_every; ``batch_size`` is not
            used.
        reference_batch: 1 takes the hyperparameters as they are.
        stages: lists of module names; None: `pipeline.automatic`.
        delays: of every stage; None: fine-grained.

    Returns:
        A row per epoch: epoch, loss, top1, learning_rate.

    Raises:
        RecoupError: what `Simulator` raises, with the sample; a checkpoint of another run.
    """
    stages = automatic(model) if stages is None else stages
    delays = fine_grained(len(stages)) if delays is None else delays
    rate, momentum = scale_hyperparameters(learning_rate, settings.momentum, reference_batch, 1)
    total = epochs * len(data)
    factor = schedule(settings.schedule, total, settings.warm_up)
    how = Mitigation.parse(mitigation) if isinstance(mitigation, str) else mitigation
    identity = {
        "weights": of_model(model),
        "data": [data.name, data.split, len(data)],
        "epochs": epochs,
        "rate": rate,
        "settings": repr(settings),
        "mitigation": repr(how),
        "delays": list(delays),
    }
    simulator = Simulator(
        model,
        stages,
        delays,
        lambda step: rate * factor(min(step, total - 1)),
        momentum,
        settings.weight_decay,
        how,
        F.cross_entropy,
    )
    keeper = _Keeper(None if folder is None else Path(folder), identity, simulator)
    rows, loss = keeper.resume()
    device = device_of(model)
    with bar(progress, total) as advance:
        advance(simulator.steps)
        for epoch in range(simulator.steps // len(data), epochs):
            model.train()
            done = simulator.steps - epoch * len(data)
            augment = settings.augment and data.augmentation is not None
            batches = data.batches(1, augment=augment, seed=settings.seed * 100_003 + epoch, shuffle=True)
            for index, (x, y) in enumerate(batches):
                if index < done:
                    continue
                loss += simulator.step(x.to(device), y.to(device))
                advance(1)
                if simulator.steps % settings.save_every == 0 and index + 1 < len(data):
                    keeper.save(rows, loss)
            top1 = None if test is None else evaluate(model, test.batches(250)).top1
            row = {"epoch": epoch + 1, "loss": loss / len(data), "top1": top1, "learning_rate": simulator.rate}
            rows, loss = [*rows, row], 0.0
            keeper.save(rows, loss)
    model.eval()
    return rows


class _Keeper:
    """One checkpoint: the simulator's state, and the rows and the loss so far."""

    def __init__(self, folder: Path | None, identity: dict[str, Any], simulator: Simulator) -> None:
        self.path = None if folder is None else folder / FILE
        self.identity, self.simulator = json.dumps(identity), simulator
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> tuple[list[dict[str, Any]], float]:
        """Take up what the folder keeps, if anything."""
        if self.path is None or not self.path.exists():
            return [], 0.0
        try:
            content = torch.load(self.path, weights_only=True, map_location="cpu")
        except (RuntimeError, OSError) as error:
            raise RecoupError(f"train_pipelined: {self.path} is no checkpoint ({error})") from None
        theirs, ours = json.loads(content["identity"]), json.loads(self.identity)
        different = [name for name in ours if theirs.get(name) != ours[name]]
        if different:
            name = different[0]
            raise RecoupError(
                f"train_pipelined: {self.path} is of another run ({name} was {theirs.get(name)!r}, is {ours[name]!r}): "
                "choose another folder"
            )
        self.simulator.load_state_dict(content["simulator"])
        return json.loads(content["rows"]), float(content["loss"])

    def save(self, rows: list[dict[str, Any]], loss: float) -> None:
        """Keep everything."""
        if self.path is None:
            return
        buffer = io.BytesIO()
        state = {"identity": self.identity, "rows": json.dumps(rows), "loss": loss}
        torch.save({**state, "simulator": self.simulator.state_dict()}, buffer)
        write_atomically(self.path, buffer.getvalue())
