"""A rank of a pipeline in a process of its own, for test_runtime.py: what it does, and torchrun's agent for it."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from recoup.errors import RecoupError
from recoup.pipeline import delays, shared
from recoup.pipeline.runtime import Plan, initialize, run

STAGES = [["0"], ["1.0"], ["1.1"], ["2"], ["3"]]
COUNT = 40
PATIENCE = 12  # seconds that a neighbour may be silent, where one will be: as long as a loaded machine may take
VICTIMS = {"kill": [(0, 23), (3, 27)], "kill again": [(1, 33)]}  # rank and update, one after the other
BROKEN = (2, 31)  # where those that were killed fail in the end


def samples():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(1, 6, generator=generator), torch.randint(4, (1,), generator=generator)) for _ in range(COUNT)]


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)),
        nn.Linear(8, 4),
    )


def rate(k):
    return 0.05 / (1 + 0.02 * k)


def plan(model, mitigation, momentum=0.9, **changes):
    values = {"model": model, "stages": STAGES, "delays": delays(5), "lr": rate, "momentum": momentum}
    return Plan(**{**values, "weight_decay": 1e-3, "mitigation": mitigation, **changes})


def work(folder: str, mitigations: str, fault: str) -> None:
    """One rank: train with every mitigation and leave its results in the folder; or have the fault on the way."""
    torch.set_num_threads(1)
    initialize(timeout=60)
    if fault == "machines":  # two ranks share one, so that neighbours have memory in common or have not
        shared.machine = lambda: f"machine {dist.get_rank() // 2}"
    rank, attempt = dist.get_rank(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def faulty(k):
        victims = VICTIMS.get(fault, [])
        left = [victim for victim in victims if not (Path(folder) / f"killed-{victim[0]}").exists()]
        if (rank, k) in left[:1] and len(victims) - len(left) <= attempt:  # the next one in the next attempt
            (Path(folder) / f"killed-{rank}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "kill" and not left and (rank, k) == BROKEN:
            os._exit(3)
        if fault == "stop" and rank == 1 and k == 9:
            os.kill(os.getpid(), signal.SIGSTOP)
        return rate(k)

    data = [(x * float("nan") if fault == "nan" and k == 5 else x, y) for k, (x, y) in enumerate(samples())]
    for mitigation in mitigations.split(","):
        net = network()
        try:
            checkpoints = f"{folder}/checkpoints" if fault in VICTIMS else None
            timeout = PATIENCE if fault in ("stop", "nan") else 60
            metrics = run(plan(net, mitigation, lr=faulty), data, folder=checkpoints, every=6, timeout=timeout)
        except RecoupError as error:
            sys.stdout.write(f"rank {rank}: {error}\n")
            sys.stdout.flush()
            if fault == "nan" and rank == 2:
                time.sleep(60)  # who raises and does not end must not keep the others
            os._exit(7)
        measured = [net.state_dict(), metrics.losses, metrics.samples, metrics.rate]
        torch.save(measured, f"{folder}/{mitigation}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def elastic(ranks: int, restarts: int, *arguments: str) -> None:
    """What ``torchrun --standalone --nproc-per-node RANKS --max-restarts RESTARTS`` does, but forking its workers.

    Importing torch would take most of their lives.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    config = LaunchConfig(1, 1, ranks, max_restarts=restarts, start_method="fork", **rendezvous)
    elastic_launch(config, work)(*arguments)


if __name__ == "__main__":
    work(*sys.argv[1:])
