"""Claim, to be tested: an H100 or H200 gives the bits that the emulator gives, in FP8, float16, bfloat16 and TF32.

The card against the emulator, output by output: `torch._scaled_mm` with fast accumulation against `hopper_fp8`, without
it against promotion every 128, and float16, bfloat16 and TF32 products with their reductions pinned to float32. K goes
from one instruction to 4,096, data from normal to cancelling and to terms at the last bit kept. Where bits differ, the
operands that show it are printed, and how often neighbouring units agree with the card; operands and the card's bits
are kept in results/tensorcore_gpu_vectors.npz. The library may split K into parts, which it adds in float32: where bits
differ, even splits are tried, and one that explains every output is named. Before that the Triton path is compared with
the CPU's kernels.

Then giga multiply-adds a second of the emulator beside torch's own products, between CUDA events. The units are those
of Hopper; on another card it says so and the comparison is of that card with Hopper.

    python benchmarks/tensorcore_gpu.py [--bits | --speed]
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import Tensor

import recoup as rc
from benchmarks.measure import RESULTS, medians, save
from benchmarks.nbsmt_gpu import events
from recoup import TensorCore

SHAPES = ((4096, 4096, 4096), (384, 1152, 1024), (64, 576, 16384), (512, 4608, 512))
SIDE, KEPT_SIDE, KEPT_K = 128, 8, 128  # rows and columns compared, and what is kept of them
WIDE = 2048  # rows and columns of the longest K: enough tiles for the library not to split K
TERMS = (16, 32, 64, 128, 512, 1024, 4096)
KINDS = ("normal", "codes", "zeros", "subnormal", "cancelling", "last bit")
SPLITS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 24, 32, 64)  # parts of K that a library may add in float32
SHOWN = 3
DTYPES = {
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
}


@dataclass(frozen=True)
class Case:
    """A unit and the product of the card that should equal it: float32 [M, K] x [K, N] of its formats."""

    name: str
    unit: TensorCore
    card: Callable[[Tensor, Tensor], Tensor]


def scaled(pair: tuple[str, str], fast: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's FP8 product with scales of 1; it takes the right operand by columns."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        one = torch.ones((), device=a.device)
        x, y = a.to(DTYPES[pair[0]]), b.t().contiguous().to(DTYPES[pair[1]]).t()
        product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return product(x, y, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast)

    return run


def half(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's product of 16-bit operands into float32."""
    return lambda a, b: torch.mm(a.to(DTYPES[name]), b.to(DTYPES[name]), out_dtype=torch.float32)


def tf32(a: Tensor, b: Tensor) -> Tensor:
    """The library's float32 product in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def cases() -> list[Case]:
    """What is compared."""
    e4m3, mixed = ("e4m3fn", "e4m3fn"), ("e5m2", "e4m3fn")
    return [
        Case("e4m3, fast accumulation", TensorCore.hopper_fp8(), scaled(e4m3, True)),
        Case("e5m2 x e4m3, fast accumulation", TensorCore.hopper_fp8(operands=mixed), scaled(mixed, True)),
        Case("e4m3, promoted", TensorCore.hopper_fp8(promotion=128), scaled(e4m3, False)),
        Case("float16", TensorCore.hopper_f16(), half("float16")),
        Case("bfloat16", TensorCore.hopper_bf16(), half("bfloat16")),
        Case("tf32", TensorCore.hopper_tf32(), tf32),
    ]


def operands(unit: TensorCore, shape: tuple[int, int, int], kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """a [M, K] and b [K, N], values of the unit's formats, on the CPU."""
    M, K, N = shape
    generator, made = torch.Generator().manual_seed(seed), []
    for size, form in zip(((M, K), (K, N)), unit.formats, strict=True):
        x = torch.randn(size, generator=generator)
        low, high = max(form.min_exponent, -60), min(form.max_exponent, 60)
        if kind == "codes":
            significands = torch.randint(2 << form.mantissa, size, generator=generator) * 2.0**-form.mantissa
            x = significands.copysign(x).ldexp(torch.randint(low, high, size, generator=generator))
        elif kind == "zeros":
            x *= torch.rand(size, generator=generator) < 0.4
        elif kind == "subnormal":
            x *= 2.0 ** (low - 1)
        made.append(x)
    a, b = made
    if kind == "cancelling":
        half_k = K // 2
        a[:, half_k:], b[half_k:] = -a[:, :half_k], b[:half_k].clone()
    elif kind == "last bit":
        ends = [min(form.max_exponent, 20) - 1 for form in unit.formats]
        below = unit.fraction // 2, unit.fraction - unit.fraction // 2
        sizes = (2.0 ** (end - bits) for end, bits in zip(ends, below, strict=True))
        a, b = (torch.where(x.abs() < 0.7, 0.5, x.sign()) * size for x, size in zip(made, sizes, strict=True))
        a[:, seed % K], b[seed % K] = 2.0 ** ends[0], 2.0 ** ends[1]
    first, second = unit.formats
    return rc.quantize(a, first), rc.quantize(b, second)


def differences(one: Tensor, other: Tensor) -> Tensor:
    """Where bits differ; zeros of both signs are alike, as the library's scale may touch them, and all NaN."""
    return (one != other) & ~(one.isnan() & other.isnan())


def split_of(unit: TensorCore, a: Tensor, b: Tensor, card: Tensor) -> int | None:
    """Into how many even parts the library split K, if that explains every output: parts are added in order."""
    K = a.shape[1]
    for parts in SPLITS:
        if K % parts == 0:
            pairs = zip(a.chunk(parts, 1), b.chunk(parts), strict=True)
            products = [rc.tensorcore.matmul(x.contiguous(), y.contiguous(), unit) for x, y in pairs]
            if not differences(functools.reduce(torch.add, products), card).any():
                return parts
    return None


def neighbours(unit: TensorCore) -> Iterator[TensorCore]:
    """Units to try where a card does not give a unit's bits."""
    for group in (4, 8, 16, 32, 64):
        for fraction in range(max(1, unit.fraction - 2), unit.fraction + 3):
            for output in ("e8m13", "float32"):
                for promotion in (None, 64, 128):
                    yield unit.replace(group=group, fraction=fraction, output=output, promotion=promotion)


def examples(a: Tensor, b: Tensor, ours: Tensor, card: Tensor) -> list[dict[str, Any]]:
    """Some outputs that differ, with the operands that are not zero."""
    found = []
    for row, column in differences(ours, card).nonzero()[:SHOWN].tolist():
        x, y = a[row], b[:, column]
        used = ((x != 0) & (y != 0)).nonzero()[:, 0]
        pairs = zip(x[used][:64].tolist(), y[used][:64].tolist(), strict=True)
        texts = [f"{p.hex()} * {q.hex()}" for p, q in pairs]
        values = {"emulator": float(ours[row, column]).hex(), "card": float(card[row, column]).hex()}
        found.append({"row": row, "column": column, "terms": len(used), **values, "first products": texts})
    return found


def agreement(case: Case, kind: str, K: int, device: str) -> dict[str, float]:
    """Shares of outputs on which the best neighbouring units agree with the card."""
    a, b = operands(case.unit, (SIDE, K, SIDE), kind, K)
    card, shares = case.card(a.to(device), b.to(device)).float().cpu(), {}
    for other in neighbours(case.unit):
        y = rc.tensorcore.matmul(a, b, other)
        shares[repr(other)] = 1 - differences(y, card).double().mean().item()
    return dict(sorted(shares.items(), key=lambda item: -item[1])[:SHOWN])


def compared(case: Case, kind: str, K: int, device: str, kept: dict[str, np.ndarray]) -> dict[str, Any]:
    """One case on one kind of data: how many outputs differ, and what shows it; small operands are kept."""
    side = WIDE if max(TERMS) == K else SIDE
    a, b = operands(case.unit, (side, K, side), kind, K)
    x, y = a.to(device), b.to(device)
    ours, card = rc.tensorcore.matmul(x, y, case.unit).cpu(), case.card(x, y).float().cpu()
    count = int(differences(ours, card).sum())
    row: dict[str, Any] = {"case": case.name, "kind": kind, "K": K, "outputs": ours.numel(), "different": count}
    if count and (parts := split_of(case.unit, x, y, card.to(device))):
        row |= {"different": 0, "parts of K": parts, "different if not split": count}
        return row
    if K <= KEPT_K:
        side = slice(KEPT_SIDE)
        for name, value in (("a", a[side]), ("b", b[:, side]), ("card", card[side, side])):
            kept[f"{case.name}/{kind}/{K}/{name}"] = value.contiguous().view(torch.int32).numpy()
    if count:
        error = (ours - card).abs().max().item()
        row |= {"largest difference": error, "examples": examples(a, b, ours, card)}
    return row


def same_as_cpu(device: str) -> int:
    """Outputs of the Triton path that differ from the CPU's kernels, over units and data: 0, or there is a bug here."""
    wrong = 0
    for case in cases():
        for kind in KINDS:
            a, b = operands(case.unit, (40, 200, 70), kind, 1)
            ours = rc.tensorcore.matmul(a.to(device), b.to(device), case.unit).cpu()
            wrong += int(differences(ours, rc.tensorcore.matmul(a, b, case.unit)).sum())
    return wrong


def bits(device: str = "cuda") -> dict[str, Any]:
    """The whole comparison."""
    wrong = same_as_cpu(device)
    print(f"the Triton path against the CPU's kernels: {wrong} outputs differ", flush=True)
    rows, kept = [], {}
    for case in cases():
        for kind in KINDS:
            for K in TERMS:
                row = compared(case, kind, K, device, kept)
                rows.append(row)
                told = f", K in {row['parts of K']} parts" if "parts of K" in row else ""
                print(
                    f"{case.name:32} {kind:12} K {K:5} {row['different']:7} of {row['outputs']} differ{told}",
                    flush=True,
                )
                for example in row.get("examples", [])[:1]:
                    products = " + ".join(example["first products"])
                    print(f"    emulator {example['emulator']}, card {example['card']}: {products}")
    for case in cases():  # one pair of operands a case: every neighbour is compiled
        wrong_rows = [row for row in rows if row["case"] == case.name and row["different"]]
        if wrong_rows:
            row = min(wrong_rows, key=lambda row: (row["K"], -row["different"]))
            row["neighbours that agree"] = agreement(case, row["kind"], row["K"], device)
            print(f"{case.name}, {row['kind']}, K {row['K']}: neighbours that agree with the card")
            for unit, share in row["neighbours that agree"].items():
                print(f"    {share:7.2%} with {unit}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    np.savez_compressed(RESULTS / "tensorcore_gpu_vectors.npz", **kept)
    return {"triton against cpu": wrong, "card": rows}


def speed() -> dict[str, dict[str, float]]:
    """GMAC/s on every shape."""
    units = {case.name: case.unit for case in cases()} | {"ampere-bf16": TensorCore.ampere_bf16()}
    results: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        M, K, N = shape
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, generator=generator).cuda() for size in ((M, K), (K, N)))
        candidates: dict[str, Callable[[], Tensor]] = {"torch float32": lambda x=a, y=b: x @ y}
        for case in cases():
            x, y = (rc.quantize(v, form) for v, form in zip((a, b), case.unit.formats, strict=True))
            candidates[f"torch {case.name}, cast too"] = lambda c=case, x=x, y=y: c.card(x, y)
        for name, unit in units.items():
            x, y = (rc.quantize(v, form) for v, form in zip((a, b), unit.formats, strict=True))
            candidates[f"recoup {name}"] = lambda u=unit, x=x, y=y: rc.tensorcore.matmul(x, y, u)
        seconds = medians(events(candidates, rounds=9))
        label = " x ".join(map(str, shape))
        results[label] = {name: M * K * N / 1e9 / value for name, value in seconds.items()}
        for name, rate in results[label].items():
            print(f"{label:20} {name:48} {rate:10.1f} GMAC/s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--bits", action="store_true", help="only compare")
    parser.add_argument("--speed", action="store_true", help="only time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/tensorcore_gpu.py: torch sees no CUDA GPU here, so there is no card to compare with")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if capability != (9, 0):
        print(f"{name} is no Hopper (compute capability 9.0): the units below are Hopper's", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    results: dict[str, Any] = {"gpu": name, "capability": capability, "cuda": torch.version.cuda}
    if arguments.bits or not arguments.speed:
        results["bits"] = bits()
    if arguments.speed or not arguments.bits:
        results["gmacs"] = speed()
    print(save("tensorcore_gpu", results))


if __name__ == "__main__":
    main()
