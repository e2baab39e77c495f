"""Claim: a pipeline over processes that never drains outruns synchronous schedules and data parallelism at batch one.

Samples a second of one model on 1, 2 and 4 processes of one machine, one thread each, all in one run and in turns:

- ``recoup``: pipelined backpropagation, an update a sample, cut by measured times of the stages (`balance`);
- ``1F1B``: torch.distributed.pipelining's schedule over the same parts, eight samples an update, drained after each;
- ``DDP``: torch's DistributedDataParallel, one sample a process and an update for all of them;
- ``SGD``: one process, one sample an update, torch's fused optimizer: what all of them are measured against.

Beside recoup's rate stands what the times of the stages predict. With fewer cores than processes the processes share
them, and no rate says anything about more cores; the results name both.

    python benchmarks/pipeline_runtime.py [--rounds 5] [--only resnet20]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.measure import RESULTS, save
from recoup import models, pipeline
from recoup.pipeline.plan import Plan
from recoup.pipeline.runtime import run
from recoup.pipeline.wallclock import Times, joined, period, timelines
from recoup.plots.pipeline import timeline_figure

UPDATE, MOMENTUM, RATE = 8, 0.9, 1e-4
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and samples a round
    "resnet20": (lambda: models.resnet20(norm="group"), 160),
    "vgg11": (lambda: models.vgg11(norm="group"), 24),
}
Sample = tuple[Tensor, Tensor]


def network(name: str) -> tuple[nn.Module, list[list[str]]]:
    torch.manual_seed(0)
    model = NETS[name][0]()
    return model, pipeline.automatic(model)


def samples(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    each = (
        (torch.randn(1, 3, 32, 32, generator=generator), torch.randint(10, (1,), generator=generator))
        for _ in range(count)
    )
    return list(each)


def ours(name: str, data: Any, cut: list[int]) -> Callable[[], float]:
    """Seconds of a round, filling and draining included."""
    model, stages = network(name)
    plan = Plan(model, stages, pipeline.delays(len(stages)), RATE, MOMENTUM, cut=cut, mitigation="lwpv+sc")
    return lambda: run(plan, data).seconds


def drained(name: str, data: list[Sample], cut: list[int]) -> Callable[[], float]:
    """1F1B over the same parts."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, stages = network(name)
    chain = pipeline.chain(model, stages)
    part = chain.part(sum(cut[:rank]), sum(cut[: rank + 1]))
    optimizer = torch.optim.SGD(part.parameters(), RATE, MOMENTUM, fused=True)
    stage = PipelineStage(part, rank, ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, n_microbatches=UPDATE, loss_fn=nn.functional.cross_entropy)
    whole = [data[i : i + UPDATE] for i in range(0, len(data), UPDATE)]
    batches = [(torch.cat([x for x, _ in own]), torch.cat([y for _, y in own])) for own in whole]

    def once() -> float:
        begun = time.perf_counter()
        for x, y in batches:
            optimizer.zero_grad()
            arguments = (x,) if rank == 0 else ()
            options: dict[str, Any] = {"target": y} if rank == ranks - 1 else {}
            schedule.step(*arguments, **options)
            optimizer.step()
        dist.barrier()
        return time.perf_counter() - begun

    return once


def parallel(name: str, data: list[Sample]) -> Callable[[], float]:
    """DDP; every process has its share of the samples."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = nn.parallel.DistributedDataParallel(network(name)[0])
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, fused=True)

    def once() -> float:
        begun = time.perf_counter()
        for x, y in data[rank::ranks]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        dist.barrier()
        return time.perf_counter() - begun

    return once


def alone(name: str, data: list[Sample]) -> Callable[[], float]:
    """Plain SGD in one process."""
    model = network(name)[0]
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, fused=True)

    def once() -> float:
        begun = time.perf_counter()
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return time.perf_counter() - begun

    return once


def process(rank: int, ranks: int, name: str, rounds: int, cut: list[int], folder: str) -> None:
    """One rank: all that runs on so many processes, in turns."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29571"}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    data = samples(NETS[name][1])
    ways = {"recoup": ours(name, data, cut), "DDP": parallel(name, data)}
    ways |= {"1F1B": drained(name, data, cut)} if ranks > 1 else {"SGD": alone(name, data)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, once in ways.items():
            dist.barrier()
            found = once()
            if turn:  # the first one compiles
                seconds[way].append(found)
    dist.barrier()
    if rank == 0:
        torch.save(seconds, f"{folder}/{ranks}.pt")
    dist.destroy_process_group()


def draw(name: str, times: list[Times], ranks: int) -> None:
    """The timeline of twelve samples, as the measured times have it."""
    done = timelines(joined(times, pipeline.balance(times, ranks)), samples=12)
    figure = timeline_figure(done, title=f"{name} on {ranks} ranks, times measured stage by stage")
    figure.savefig(RESULTS / "pipeline_runtime_timeline.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=NETS, help="one network; nothing is saved")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict] = {}
    for name in [given.only] if given.only else NETS:
        model, stages = network(name)
        late = pipeline.delays(len(stages))
        times = pipeline.stage_times(model, stages, *samples(1)[0], mitigation="lwpv+sc", delays=late, rounds=25)
        for ranks in (1, 2, 4):
            cut = pipeline.balance(times, ranks)
            with tempfile.TemporaryDirectory() as folder:
                spawn(process, (ranks, name, given.rounds, cut, folder), ranks)
                seconds = torch.load(f"{folder}/{ranks}.pt", weights_only=True)
            count = NETS[name][1]
            row: dict[str, object] = {way: count / statistics.median(own) for way, own in seconds.items()}
            row |= {"cut": cut, "predicted": 1 / period(joined(times, cut))}
            results.setdefault(name, {})[f"{ranks} processes"] = row
            told = " ".join(f"{way} {rate:.1f}" for way, rate in row.items() if isinstance(rate, float))
            print(f"{name} on {ranks}: {told} samples a second; cut {cut}", flush=True)
        if name == "resnet20" and not given.only:
            draw("ResNet-20", times, 4)
    if not given.only:
        print(save("pipeline_runtime", {"rounds": given.rounds, "samples a second": results}))


if __name__ == "__main__":
    main()
