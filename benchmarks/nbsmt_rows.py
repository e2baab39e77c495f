"""Claim: linear layers of many rows take less time on NB-SMT than in float32, on one and two threads of the multiplier.

`torch.nn.Linear` of transformers' shapes, normally distributed weights and inputs, signed activations: forward, and
forward and backward, of layers on one, two and four threads relative to torch's own in float32. Interleaved; the median
of the rounds' ratios. One thread of torch's is measured in CPU time, more by the clock.

    python benchmarks/nbsmt_rows.py
    OMP_WAIT_POLICY=PASSIVE python benchmarks/nbsmt_rows.py --torch-threads 2
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn

import recoup as rc
from benchmarks.measure import clock_of_threads, interleaved, medians, ratio_of, save
from recoup.nbsmt import cpu

# Rows, features in, features out: sentence encoders' and BERT's, and a few words of one sentence.
SHAPES = [(1024, 384, 384), (1024, 384, 1536), (1024, 1536, 384), (512, 768, 3072), (512, 3072, 768), (16, 768, 3072)]
THREADS = (1, 2, 4)


def layer(rows: int, inputs: int, outputs: int) -> tuple[nn.Linear, Tensor]:
    """torch's own, and an input."""
    random = torch.Generator().manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs, generator=random) * inputs**-0.5)
    return linear, torch.randn(rows, inputs, generator=random)


def emulated(rows: int, inputs: int, outputs: int, threads: int) -> nn.Module:
    """The same on the shared multiplier."""
    linear, x = layer(rows, inputs, outputs)
    return rc.emulate_(rc.calibrate_(nn.Sequential(linear), [x], {"0": True}), rc.NBSMT(threads))


def run(model: nn.Module, x: Tensor, train: bool) -> Callable[[], object]:
    """Forward, or forward and backward."""
    if not train:
        return torch.inference_mode()(lambda: model(x))
    own = x.clone().requires_grad_()

    def step() -> None:
        own.grad = None
        model.zero_grad()
        y = model(own)
        y.backward(torch.ones_like(y))

    return step


def ratios(shape: tuple[int, int, int], train: bool, rounds: int) -> dict[str, float]:
    """Of every number of threads, to torch's; and torch's milliseconds."""
    linear, x = layer(*shape)
    models = {"float32": linear} | {f"{threads}T": emulated(*shape, threads) for threads in THREADS}
    runs = {name: run(model, x, train) for name, model in models.items()}
    seconds = interleaved(runs, rounds, clock=clock_of_threads(torch.get_num_threads()))
    own = {name: round(ratio_of(seconds, name, "float32"), 2) for name in seconds if name != "float32"}
    return own | {"float32_ms": round(1e3 * medians(seconds)["float32"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--torch-threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.torch_threads)
    rows = []
    print("| rows x in x out | 1 thread | 2 threads | 4 threads | with backward: 1 | 2 | 4 |")
    print("|---" * 7 + "|")
    for shape in SHAPES:
        found = {kind: ratios(shape, kind == "step", given.rounds) for kind in ("forward", "step")}
        rows.append({"shape": shape, **found})
        cells = [f"{found[kind][f'{threads}T']:.2f}" for kind in found for threads in THREADS]
        print(f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)
    isa, parts = cpu.probe().isa, ["nbsmt_rows"]
    parts += ["amx"] if isa == "AMX" else []
    results = {"isa": isa, "threads": given.torch_threads, "rounds": given.rounds, "rows": rows}
    print(save("_".join([*parts, f"{given.torch_threads}t"]), results))


if __name__ == "__main__":
    main()
