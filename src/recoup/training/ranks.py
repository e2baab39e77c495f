"""`recoup train --pipeline ... --ranks N`: the pipeline over processes, with the weights that one process would get.

Started by torchrun, every process runs `train_over_ranks`. On one machine `launch` starts torchrun itself, whose
processes read the recipe that the folder keeps: ``python -m recoup.training.process FOLDER``.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recoup.data import Dataset
from recoup.errors import RecoupError
from recoup.evaluation import evaluate
from recoup.pipeline.plan import Plan
from recoup.pipeline.runtime import balanced, initialize, run
from recoup.training.pipelined import Pipelined
from recoup.training.settings import Settings

FOLDER = "ranks"  # of the checkpoints, in that of the run
RESTARTS = 3
ROUNDS = 5  # in which stages are timed before a run


class Epochs:
    """The samples of all epochs in a row, as `train_pipelined` orders and augments them."""

    def __init__(self, data: Dataset, epochs: int, settings: Settings) -> None:
        self.data, self.epochs, self.settings = data, epochs, settings
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.epochs * len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, at = divmod(index, len(self.data))
        if epoch not in self._open:
            augment = self.settings.augment and self.data.augmentation is not None
            batches = self.data.batches(1, augment=augment, seed=self.settings.seed * 100_003 + epoch, shuffle=True)
            self._open = {**{e: b for e, b in self._open.items() if e == epoch - 1}, epoch: batches}
        return self._open[epoch][at]


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(folder: Path, ranks: int) -> None:
    """Run the recipe in a folder over processes of this machine; their output is this process's.

    Raises:
        RecoupError: they failed, again after restarts.
    """
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(RESTARTS)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "recoup.training.process", str(folder)]
    done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)  # noqa: S603 -- our own interpreter
    if done.returncode:
        raise RecoupError(
            f"recoup train: {ranks} processes ended with status {done.returncode}; what they said is above"
        )


def train_over_ranks(
    model: nn.Module, data: Dataset, test: Dataset | None, plan: Pipelined, settings: Settings, ranks: int, folder: Path
) -> list[dict[str, Any]]:
    """Train as `train_pipelined` does, in every process of torchrun; rows as there, top1 in the last one.

    The model is cut where all processes, measuring at once, find the slowest of them fastest.

    Raises:
        RecoupError: what `pipeline.runtime.run` raises.
    """
    initialize()
    samples = Epochs(data, plan.epochs, settings)
    made = Plan(
        model,
        plan.stages,
        plan.delays,
        plan.rate,
        plan.momentum,
        settings.weight_decay,
        plan.mitigation,
        update_size=plan.update_size,
        seed=settings.seed,
    )
    model.train()
    torch.manual_seed(settings.seed)
    if ranks > 1:
        made = balanced(made, samples, rounds=ROUNDS).plan
    metrics = run(made, samples, folder=folder / FOLDER, every=settings.save_every)
    shared = [metrics.losses]
    dist.broadcast_object_list(shared, ranks - 1)
    losses, count = shared[0], len(data)
    top1 = None if test is None else evaluate(model, test.batches(250)).top1
    model.eval()
    return [
        {
            "epoch": epoch + 1,
            "loss": sum(losses[epoch * count : (epoch + 1) * count]) / count,
            "top1": top1 if epoch + 1 == plan.epochs else None,
            "learning_rate": plan.rate((epoch + 1) * count // plan.update_size),
        }
        for epoch in range(plan.epochs)
    ]
