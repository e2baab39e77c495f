"""Claim: simulating the pipeline costs hardly more than plain SGD, and many runs at once cost a fraction of one by one.

Seconds a sample on the wall clock, candidates interleaved, medians, one thread, batch one. torch's SGD with momentum
and weight decay is the bound; the simulator is exact and adds the copies of weight versions. Batched runs: R networks
of one shape, each with its own seed, data order and stale weights, in one batched network.

    python benchmarks/pipeline_speed.py [--rounds 15]
"""

import argparse
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.measure import interleaved, medians, save
from recoup import models, pipeline
from recoup.pipeline.batched import Batched, Run

STAGES, WIDTH, RUNS = 18, 64, 32
METHODS = ("none", "stash", "sc", "lwpv", "lwpw+sc", "spectrain")
BOUNDS = {"resnet20, group norm": 1.15, "MLP, 18 stages": 1.1}
BATCHED_BOUND, BATCHED_GOAL = 20.0, 8.0


def mlp(seed: int = 0) -> nn.Sequential:
    """18 linear layers of 64 units with ReLU, for digits of 8 x 8."""
    torch.manual_seed(seed)
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(STAGES - 1)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def mlp_stages() -> list[list[str]]:
    return [[str(s)] for s in range(STAGES)]


def samples(shape: tuple[int, ...], leading: tuple[int, ...] = ()) -> Callable[[], tuple[Tensor, Tensor]]:
    """An endless supply of the same eight samples."""
    generator = torch.Generator().manual_seed(0)
    some = cycle(
        [
            (
                torch.randn(*leading, 1, *shape, generator=generator),
                torch.randint(10, (*leading, 1), generator=generator),
            )
            for _ in range(8)
        ]
    )
    return lambda: next(some)


def sgd(model: nn.Module, sample: Callable[[], tuple[Tensor, Tensor]], repeat: int) -> Callable[[], None]:
    """The loop everyone writes, the loss read as the simulator reads it."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.999, weight_decay=1e-4)

    def run() -> None:
        for _ in range(repeat):
            x, y = sample()
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(x), y)
            value.item()
            value.backward()
            optimizer.step()

    return run


def simulated(
    model: nn.Module,
    stages: list[list[str]],
    method: str,
    sample: Callable[[], tuple[Tensor, Tensor]],
    repeat: int,
) -> Callable[[], None]:
    simulator = pipeline.Simulator(model, stages, pipeline.delays(len(stages)), 1e-4, 0.999, 1e-4, method)

    def run() -> None:
        for _ in range(repeat):
            simulator.step(*sample())

    return run


def batched(runs: list[Run], repeat: int) -> Callable[[], None]:
    together = Batched([mlp(seed) for seed in range(len(runs))], mlp_stages(), runs)
    sample = samples((WIDTH,), (len(runs),))

    def run() -> None:
        for _ in range(repeat):
            together.step(*sample())

    return run


def ratios(name: str, runs: dict[str, Callable[[], None]], repeat: int, rounds: int) -> dict[str, float]:
    """Milliseconds a sample, printed with the ratio to SGD."""
    found = {method: seconds / repeat * 1e3 for method, seconds in medians(interleaved(runs, rounds)).items()}
    for method, each in found.items():
        print(f"{name:24} {method:12} {each:8.3f} ms a sample {each / found['torch SGD']:6.3f} of SGD", flush=True)
    return found


def against_sgd(rounds: int) -> dict[str, dict[str, float]]:
    image, digit = samples((3, 32, 32)), samples((WIDTH,))
    resnet = models.resnet20(norm="group")
    results: dict[str, dict[str, float]] = {}
    cases: list[tuple[str, Callable[[], nn.Module], list[list[str]], Callable[[], tuple[Tensor, Tensor]], int]] = [
        ("resnet20, group norm", lambda: models.resnet20(norm="group"), pipeline.automatic(resnet), image, 8),
        ("MLP, 18 stages", mlp, mlp_stages(), digit, 60),
    ]
    for name, build, stages, sample, repeat in cases:
        runs = {"torch SGD": sgd(build(), sample, repeat)}
        runs |= {method: simulated(build(), stages, method, sample, repeat) for method in METHODS}
        results[name] = ratios(name, runs, repeat, rounds)
    return results


def many(rounds: int) -> dict[str, float]:
    """Milliseconds a step of all runs, and how many single runs that is."""
    delays = pipeline.delays(STAGES)
    alike = [Run(delays, "none", 1e-4, 0.999, 1e-4) for _ in range(RUNS)]
    mixed = [Run(delays if i % 2 else [0] * STAGES, METHODS[i % len(METHODS)], 1e-4, 0.999, 1e-4) for i in range(RUNS)]
    repeat = 10
    one = simulated(mlp(), mlp_stages(), "none", samples((WIDTH,)), repeat)
    plan = {"one": one, "32 seeds": batched(alike, repeat), "32 mixed": batched(mixed, repeat)}
    found = {name: seconds / repeat * 1e3 for name, seconds in medians(interleaved(plan, rounds)).items()}
    for name, each in found.items():
        print(f"{name:24} {each:8.3f} ms a step {each / found['one']:6.2f} times one run", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    single, together = against_sgd(arguments.rounds), many(arguments.rounds)
    slow = {
        f"{name}, {method}": each / results["torch SGD"]
        for name, results in single.items()
        for method, each in results.items()
        if each > BOUNDS[name] * results["torch SGD"]
    }
    factor = {name: each / together["one"] for name, each in together.items()}
    print("above the bound:", slow or "none", "; batched:", {name: round(f, 2) for name, f in factor.items()})
    save(
        "pipeline_speed",
        {
            "threads": 1,
            "milliseconds a sample": single,
            "milliseconds a step, batched": together,
            "bounds": {**BOUNDS, "batched": BATCHED_BOUND, "batched goal": BATCHED_GOAL},
            "above the bound": slow,
        },
    )


if __name__ == "__main__":
    main()
