"""Claim: on a GPU, whole networks under NB-SMT emulation run at the speed measured here, against the native network.

ResNet-20 (32 x 32, batch 256) and ResNet-18 (224 x 224, batch 64) in inference: native float32 with torch's defaults
(TF32 convolutions, cuDNN's choice of algorithm), contiguous and channels_last, against 8 bit, two and four threads.
Times are between CUDA events around a whole forward pass, so gaps in which the GPU waits for the host count; variants
are interleaved and medians compared.

    python benchmarks/nbsmt_gpu.py
    python benchmarks/nbsmt_gpu.py --tiles     # is `gpu_convolution.tile` a good choice? every block on every layer
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 21


def events(
    variants: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds per call of every variant on the GPU's clock, round by round."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def models() -> dict[str, tuple[Any, Tensor]]:
    """The networks with random weights, calibrated on the input they are timed with."""
    import recoup as rc
    from recoup.models import resnet18, resnet20

    torch.manual_seed(0)
    out = {}
    for name, model, shape in (
        ("ResNet-20 b256", resnet20(), (256, 3, 32, 32)),
        ("ResNet-18 b64", resnet18(), (64, 3, 224, 224)),
    ):
        x = torch.randn(shape, device="cuda")
        rc.calibrate_(model.eval().cuda(), [x])
        out[name] = model, x
    return out


def networks() -> dict[str, dict]:
    """Median milliseconds of every variant of both networks, and ratios to the native network as torch runs it."""
    import recoup as rc
    from benchmarks.measure import medians

    out = {}
    for name, (model, x) in models().items():
        last = x.contiguous(memory_format=torch.channels_last)
        native = copy.deepcopy(model).to(memory_format=torch.channels_last)
        emulated = {t: rc.emulate_(copy.deepcopy(model), rc.NBSMT(threads=t)) for t in (1, 2, 4)}
        variants = {
            "native contiguous": lambda m=model, x=x: m(x),
            "native channels_last": lambda m=native, x=last: m(x),
            "8 bit": lambda m=emulated[1], x=last: m(x),
            "2T": lambda m=emulated[2], x=last: m(x),
            "2T contiguous": lambda m=emulated[2], x=x: m(x),
            "4T": lambda m=emulated[4], x=last: m(x),
        }
        with torch.inference_mode():
            seconds = medians(events(variants))
        base = seconds["native contiguous"]
        out[name] = {
            "milliseconds": {k: round(1e3 * v, 3) for k, v in seconds.items()},
            "ratio to native contiguous": {k: round(v / base, 3) for k, v in seconds.items()},
        }
    return out


def layers(model: nn.Module, x: Tensor) -> dict[tuple, int]:
    """The distinct convolutions of a calibrated network, (input shape, weight shape, stride, padding), and how many."""
    found: dict[tuple, int] = {}

    def note(m: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(m, nn.Conv2d)
        key = (tuple(inputs[0].shape), tuple(m.weight.shape), m.stride, m.padding)
        found[key] = found.get(key, 0) + 1

    chosen = [m for m in model.modules() if isinstance(m, nn.Conv2d) and getattr(m, "activation_scale", None)]
    handles = [m.register_forward_hook(note) for m in chosen]
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def tiles(threads: int) -> None:
    """Print, for every layer, the time of its three kernels, and of the convolution under other blocks."""
    from benchmarks.measure import medians
    from recoup.nbsmt import NBSMT
    from recoup.nbsmt.gpu_convolution import Tile, convolve, tile
    from recoup.nbsmt.gpu_operands import activation_operands, weight_operands
    from recoup.nbsmt.gpu_plan import Plan
    from recoup.network.convolution import Geometry

    for name, (model, batch) in models().items():
        print(f"{name}, {threads} threads, microseconds")
        for (x_shape, weight_shape, stride, padding), count in layers(model, batch).items():
            plan = Plan.of(
                x_shape, weight_shape, NBSMT(threads), Geometry(weight_shape[2:], stride, padding, (1, 1), 1)
            )
            x = torch.rand(x_shape, device="cuda").contiguous(memory_format=torch.channels_last)
            weight, faults = torch.randn(weight_shape, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
            weight_OLK, offset_O, _ = weight_operands(plan, weight, None, faults)
            operand_PK = activation_operands(plan, x, None, 0.01, faults)
            out = torch.empty(x_shape[0], *plan.out, weight_shape[0], device="cuda")
            chosen = tile(out.numel() // weight_shape[0], weight_shape[0], operand_PK.shape[-1])
            others = [
                Tile(*sizes, warps, stages)
                for sizes in product((64, 128), {16, 32, 64, 128, chosen.outputs}, (32, 64, 128))
                for warps, stages in product((4, 8), (3, 4))
                if sizes[2] <= chosen.columns and sizes[1] <= chosen.outputs
            ]
            variants: dict[str, Callable[[], object]] = {
                "weights": lambda p=plan, w=weight, f=faults: weight_operands(p, w, None, f),
                "operands": lambda p=plan, x=x, f=faults: activation_operands(p, x, None, 0.01, f),
            }
            for block in dict.fromkeys([chosen, *others]):
                arguments = (plan, operand_PK, weight_OLK, offset_O, out)
                variants[str(block)] = lambda a=arguments, b=block: convolve(*a, block=b)
            seconds = medians(events(variants, rounds=11))
            best = min((v, k) for k, v in seconds.items() if k.startswith("Tile"))
            print(f"  {count} x input {list(x_shape)}, weight {list(weight_shape)}, stride {stride[0]}")
            for label in ("weights", "operands", str(chosen)):
                print(f"    {1e6 * seconds[label]:9.1f}  {label}")
            print(f"    {1e6 * best[0]:9.1f}  {best[1]} (best)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiles", action="store_true", help="time single layers under other blocks; nothing is saved")
    parser.add_argument("--threads", type=int, default=2, choices=(1, 2, 4), help="for --tiles")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/nbsmt_gpu.py: torch sees no CUDA GPU here, so there is nothing to measure")
    if arguments.tiles:
        tiles(arguments.threads)
        return
    from benchmarks.measure import save

    rows = networks()
    gpu = torch.cuda.get_device_name()
    for network, figures in rows.items():
        print(f"{gpu}, {network}")
        for variant, ratio in figures["ratio to native contiguous"].items():
            print(f"    {variant:24s} {figures['milliseconds'][variant]:9.3f} ms  {ratio:6.3f}")
    print(save("nbsmt_gpu", {"gpu": gpu, "networks": rows}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
