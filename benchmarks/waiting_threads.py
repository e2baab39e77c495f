"""Claim: commands gain by how long torch's threads spin, and float work loses little.

Wall and CPU time by how long torch's OpenMP threads spin while they wait: by default, not at all, as in commands.

Every policy has a process of its own, in turns; random weights and images. Float work has no kernel of recoup's, so
there a shorter wait can hardly gain.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from measure import medians, save

import recoup as rc
from recoup.kernels.process import SPINNING, TURNS, WAITING

POLICIES: dict[str, dict[str, str]] = {
    "default": {},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "commands": {WAITING: str(TURNS)},
}
BATCH = 128


def evaluation(config: Any = None) -> Callable[[], object]:
    """ResNet-20 on 128 images."""
    model, x = rc.models.resnet20().eval(), torch.rand(BATCH, 3, 32, 32)
    if config is not None:
        rc.emulate_(rc.calibrate_(model, [x]), config)

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def training(model: torch.nn.Module, x: torch.Tensor, classes: int = 10) -> Callable[[], object]:
    """A step of SGD."""
    y = torch.arange(len(x)) % classes
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def works() -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    images = torch.rand(BATCH, 3, 32, 32)
    small = torch.nn.Sequential(torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    return {
        "float ResNet-20, evaluation": evaluation(),
        "float ResNet-20, training": training(rc.models.resnet20(), images),
        "float MLP 784-256-10, training": training(small, torch.rand(BATCH, 784)),
        "NB-SMT 2 threads, evaluation": evaluation(rc.NBSMT(threads=2)),
        "NB-SMT 4 threads, evaluation": evaluation(rc.NBSMT(threads=4)),
        "LBA M7E4, evaluation": evaluation(rc.LBA.m7e4()),
        "LightNorm ResNet-20, training": training(rc.emulate_(rc.models.resnet20(), rc.LightNorm()), images),
    }


def cpu() -> float:
    """Of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(least: float = 0.3) -> dict[str, tuple[float, float]]:
    """Milliseconds a call: wall and CPU time."""
    torch.manual_seed(0)
    found = {}
    for name, run in works().items():
        run()
        calls, began, used = 0, time.perf_counter(), cpu()
        while time.perf_counter() - began < least or calls < 3:
            run()
            calls += 1
        found[name] = (1e3 * (time.perf_counter() - began) / calls, 1e3 * (cpu() - used) / calls)
    return found


def asked(policy: str, threads: int) -> dict[str, list[float]]:
    """The same in a process under a policy."""
    environment = {name: value for name, value in os.environ.items() if name not in SPINNING}
    environment |= {"OMP_NUM_THREADS": str(threads)} | POLICIES[policy]
    command = [sys.executable, __file__, "--measure"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def table(wall: Mapping[str, Mapping[str, list[float]]], used: Mapping[str, Mapping[str, list[float]]]) -> dict:
    """Medians, and how many times less the default takes under the others."""
    found = {}
    for name in wall["default"]:
        kinds = {k: medians({p: t[p][name] for p in POLICIES}) for k, t in (("wall", wall), ("cpu", used))}
        found[name] = kinds
        ratios = [f"{p} {kind} {t['default'] / t[p]:.2f}" for p in list(POLICIES)[1:] for kind, t in kinds.items()]
        print(f"{name:32} {'  '.join(ratios)}")
    return found


def main() -> None:
    """Measure in turns, print default by the others (above 1: they are faster) and keep it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured()))
        return
    wall: dict[str, dict[str, list[float]]] = {policy: {} for policy in POLICIES}
    used: dict[str, dict[str, list[float]]] = {policy: {} for policy in POLICIES}
    for _ in range(arguments.rounds):
        for policy in POLICIES:
            for name, (a, b) in asked(policy, arguments.threads).items():
                wall[policy].setdefault(name, []).append(a)
                used[policy].setdefault(name, []).append(b)
    save("waiting_threads", {"threads": arguments.threads, "milliseconds": table(wall, used)})


if __name__ == "__main__":
    main()
