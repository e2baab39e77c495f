"""Claim: a pipeline over processes that never drains outruns synchronous schedules and data parallelism at batch one.

Samples a second of one model on 1, 2 and 4 processes of one machine, one thread each, filling and draining included:

- ``recoup``: pipelined backpropagation, an update a sample, on a cut that all ranks measure at once (`balanced`);
- ``recoup, 1``: the same on the first process alone, while the others wait;
- ``predicted``: what a trial of the cut promises (`rank_times`, `pipelined`), and ``predicted, alone``: what the times
  of stages do that one process measured alone;
- ``1F1B``: torch.distributed.pipelining's schedule over the same parts, eight samples an update, drained after each;
- ``DDP``: torch's DistributedDataParallel, one sample a process and an update for all of them;
- ``SGD``: one process, one sample an update, torch's fused optimizer: what all of them are measured against.

All take turns within one run, and ratios are medians over turns: a machine that others use too slows both sides of one.
With fewer cores than processes the processes share them, and no rate says anything about more cores; the results name
both.

    python benchmarks/pipeline_runtime.py [--rounds 7] [--only resnet20] [--processes 2] [--tables]

``--tables`` measures nothing and prints the table of what was saved.
"""

import argparse
import json
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
from recoup.pipeline.runtime import balanced, rank_times, run, run_local
from recoup.pipeline.wallclock import Times, joined, pipelined, timelines
from recoup.plots.pipeline import timeline_figure

UPDATE, MOMENTUM, RATE = 8, 0.9, 1e-4
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and samples a round
    "resnet20": (lambda: models.resnet20(norm="group"), 320),
    "vgg11": (lambda: models.vgg11(norm="group"), 96),
}
COLUMNS = ("SGD", "recoup, 1", "recoup", "predicted", "predicted, alone", "1F1B", "DDP")
RATIOS = ("times as fast as one process", "time taken over predicted", "time taken over predicted, alone")
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


def planned(name: str) -> Plan:
    model, stages = network(name)
    return Plan(model, stages, pipeline.delays(len(stages)), RATE, MOMENTUM, mitigation="lwpv+sc")


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


def process(rank: int, ranks: int, name: str, rounds: int, alone_times: list[Times], folder: str) -> None:
    """One rank: all that runs on so many processes, in turns."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29571"}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    data: Any = samples(NETS[name][1])
    count, plan = len(data), balanced(planned(name), data, rounds=25).plan
    assert plan.cut is not None
    cut, single = list(plan.cut), planned(name)
    ways = {
        "recoup": lambda: run(plan, data).seconds,
        "predicted": lambda: pipelined(rank_times(plan, data), count),
        "DDP": parallel(name, data),
    }
    ways |= {"1F1B": drained(name, data, cut)} if ranks > 1 else {}
    lonely = {"recoup, 1": lambda: run_local(single, data, 1).seconds, "SGD": alone(name, data)} if rank == 0 else {}
    seconds: dict[str, list[float]] = {way: [] for way in (*ways, "recoup, 1", "SGD")}
    for turn in range(rounds + 1):
        for way, own in seconds.items():
            dist.barrier()
            once = ways.get(way) or lonely.get(way)
            found = once() if once else 0.0
            if turn:  # the first one compiles
                own.append(found)
    dist.barrier()
    if rank == 0:
        seconds["predicted, alone"] = [pipelined(joined(alone_times, cut), count)] * rounds
        torch.save((seconds, cut), f"{folder}/{ranks}.pt")
    dist.destroy_process_group()


def row(seconds: dict[str, list[float]], count: int) -> dict[str, object]:
    """Rates, and ratios of what took turns."""
    turns = list(zip(*seconds.values(), strict=True))
    names = list(seconds)

    def ratio(above: str, below: str) -> float:
        return statistics.median(turn[names.index(above)] / turn[names.index(below)] for turn in turns)

    rates: dict[str, object] = {way: count / statistics.median(own) for way, own in seconds.items()}
    pairs = (("recoup, 1", "recoup"), ("recoup", "predicted"), ("recoup", "predicted, alone"))
    return rates | {what: ratio(*pair) for what, pair in zip(RATIOS, pairs, strict=True)}


def draw(name: str, times: list[Times], ranks: int) -> None:
    """The timeline of twelve samples, as the measured times have it."""
    done = timelines(joined(times, pipeline.balance(times, ranks)), samples=12)
    figure = timeline_figure(done, title=f"{name} on {ranks} ranks, times measured stage by stage")
    figure.savefig(RESULTS / "pipeline_runtime_timeline.svg", metadata={"Date": None})


def tables() -> None:
    """The docs' table, of the results file."""
    found = json.loads((RESULTS / "pipeline_runtime.json").read_text("utf-8"))["samples a second"]
    print("| | processes |", " | ".join((*COLUMNS, *RATIOS)), "| cut |")
    print("|---" * (len(COLUMNS) + len(RATIOS) + 3) + "|")
    for name, rows in found.items():
        for ranks, each in rows.items():
            rates = [f"{each[way]:.1f}" if way in each else "" for way in COLUMNS]
            ratios = [f"{each[what]:.2f}" for what in RATIOS]
            print(f"| {name} | {ranks.split()[0]} |", " | ".join([*rates, *ratios]), f"| {each['cut']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=NETS, help="one network; nothing is saved")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="others than these are not saved")
    parser.add_argument("--tables", action="store_true", help="of what was saved")
    given = parser.parse_args()
    if given.tables:
        tables()
        return
    torch.set_num_threads(1)
    saved = not given.only and given.processes == [1, 2, 4]
    results: dict[str, dict] = {}
    for name in [given.only] if given.only else NETS:
        model, stages = network(name)
        late = pipeline.delays(len(stages))
        times = pipeline.stage_times(model, stages, *samples(1)[0], mitigation="lwpv+sc", delays=late, rounds=25)
        for ranks in given.processes:
            with tempfile.TemporaryDirectory() as folder:
                spawn(process, (ranks, name, given.rounds, times, folder), ranks)
                seconds, cut = torch.load(f"{folder}/{ranks}.pt", weights_only=True)
            found = row(seconds, NETS[name][1])
            told = ", ".join(f"{way} {value:.2f}" for way, value in found.items() if isinstance(value, float))
            print(f"{name} on {ranks}: {told}; cut {cut}", flush=True)
            results.setdefault(name, {})[f"{ranks} processes"] = {**found, "cut": cut, "turns": seconds}
        if name == "resnet20" and saved:
            draw("ResNet-20", times, 4)
    if saved:
        print(save("pipeline_runtime", {"rounds": given.rounds, "samples a second": results}))


if __name__ == "__main__":
    main()
