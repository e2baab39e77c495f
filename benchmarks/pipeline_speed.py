"""Claim: simulating the pipeline costs hardly more than plain SGD, and many runs at once cost a fraction of one by one.

Seconds a sample on the wall clock, candidates interleaved, medians, batch one, on one thread or more. The peer is
torch's SGD with momentum and weight decay in its three forms: the loop, foreach, and fused, which is the bound. Batched
runs: R networks of one shape, each with its own seed, data order and stale weights, in one batched network.

    python benchmarks/pipeline_speed.py [--rounds 15] [--only NET] [--threads 1]
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
METHODS = ("none", "stash", "sc", "lwpv", "lwpv+sc", "spectrain")
FORMS: dict[str, dict[str, bool]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
BOUNDS = {method: 1.15 if method == "spectrain" else 1.1 for method in METHODS}  # of fused SGD
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


def sgd(model: nn.Module, form: str, sample: Callable[[], tuple[Tensor, Tensor]], repeat: int) -> Callable[[], None]:
    """What everyone writes, the loss read as the simulator reads it."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.999, weight_decay=1e-4, **FORMS[form])

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
    """Milliseconds a sample, printed with the ratio to fused SGD."""
    found = {method: seconds / repeat * 1e3 for method, seconds in medians(interleaved(runs, rounds)).items()}
    for method, each in found.items():
        print(
            f"{name:24} {method:12} {each:8.3f} ms a sample {each / found['SGD fused']:6.3f} of fused SGD", flush=True
        )
    return found


def nets() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """Networks, the shapes of their samples, and steps a round."""
    return {
        "MLP, 18 stages": (mlp, (WIDTH,), 100),
        "resnet20, group norm": (lambda: models.resnet20(norm="group"), (3, 32, 32), 8),
        "vgg11, group norm": (lambda: models.vgg11(norm="group"), (3, 32, 32), 2),
    }


def against_sgd(rounds: int, only: str | None) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    for name, (build, shape, repeat) in nets().items():
        if only is not None and not name.startswith(only):
            continue
        stages = mlp_stages() if build is mlp else pipeline.automatic(build())
        sample = samples(shape)
        runs = {f"SGD {form}": sgd(build(), form, sample, repeat) for form in FORMS}
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
    parser.add_argument("--only", help="a network by the beginning of its name; nothing is saved")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    single = against_sgd(arguments.rounds, arguments.only)
    slow = {
        f"{name}, {method}": results[method] / results["SGD fused"]
        for name, results in single.items()
        for method, bound in BOUNDS.items()
        if results[method] > bound * results["SGD fused"]
    }
    print("above the bound:", slow or "none")
    if arguments.only is not None:
        return
    together = many(arguments.rounds)
    factor = {name: each / together["one"] for name, each in together.items()}
    print("batched:", {name: round(f, 2) for name, f in factor.items()})
    save(
        f"pipeline_speed_{arguments.threads}t",
        {
            "threads": arguments.threads,
            "milliseconds a sample": single,
            "milliseconds a step, batched": together,
            "bounds": {**BOUNDS, "batched": BATCHED_BOUND, "batched goal": BATCHED_GOAL},
            "above the bound": slow,
        },
    )


if __name__ == "__main__":
    main()
