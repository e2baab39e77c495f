"""Claim: emulating two threads is faster than the float network it emulates; four threads cost about the same.

Whole-network inference time on one thread, ResNet-20 (32 x 32, batch 64) and ResNet-18 (224 x 224, batch 8), against
the same network in native float32 torch: contiguous, channels_last, and channels_last with batch norms folded into
the convolutions (the strongest eager baseline). Every instruction set is forced through oneDNN's limit in a process
of its own; within a process the variants are interleaved and medians compared.

    python benchmarks/nbsmt_speed.py
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

ISAS = {
    "AMX": "AVX512_CORE_AMX",
    "AVX-512 VNNI": "AVX512_CORE_VNNI",
    "AVX2 VNNI": "AVX2_VNNI",
    "no VNNI": "AVX512_CORE",
}


def networks(isa: str) -> dict:
    """Median seconds of every variant of both networks, in this process."""
    import torch

    import recoup as rc
    from benchmarks.measure import interleaved, medians
    from recoup.models import resnet18, resnet20

    torch.set_num_threads(1)
    torch.manual_seed(0)
    out = {}
    for name, model, shape in (
        ("ResNet-20 b64", resnet20(), (64, 3, 32, 32)),
        ("ResNet-18 b8", resnet18(), (8, 3, 224, 224)),
    ):
        model.eval()
        x = torch.randn(shape)
        last = x.contiguous(memory_format=torch.channels_last)
        rc.calibrate_(model, [x])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.fx.experimental.optimization import fuse
        folded = fuse(copy.deepcopy(model)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        native_last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        emulated = {t: rc.emulate_(copy.deepcopy(model), rc.NBSMT(threads=t)) for t in (1, 2, 4)}
        with torch.inference_mode():
            variants = {
                "native contiguous": lambda m=model, x=x: m(x),
                "native channels_last": lambda m=native_last, x=last: m(x),
                "native channels_last, BN folded": lambda m=folded, x=last: m(x),
                "8 bit": lambda m=emulated[1], x=last: m(x),
                "2T": lambda m=emulated[2], x=last: m(x),
                "2T contiguous": lambda m=emulated[2], x=x: m(x),
                "4T": lambda m=emulated[4], x=last: m(x),
            }
            seconds = medians(interleaved(variants, rounds=7 if "18" in name else 15))
        base = seconds["native contiguous"]
        out[name] = {
            "milliseconds": {k: round(1e3 * v, 2) for k, v in seconds.items()},
            "ratio to native contiguous": {k: round(v / base, 3) for k, v in seconds.items()},
        }
    return {"isa": isa, "backend": rc.nbsmt.current_backend(), "networks": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--isa", choices=ISAS, help="measure one instruction set in this process")
    arguments = parser.parse_args()
    if arguments.isa:
        print(json.dumps(networks(arguments.isa)))
        return
    from benchmarks.measure import save

    rows = []
    for isa, limit in ISAS.items():
        command = [sys.executable, __file__, "--isa", isa]
        root = str(Path(__file__).parent.parent)
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit, "PYTHONPATH": root}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{isa}: {done.stderr}")
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        for network, figures in row["networks"].items():
            print(f"{isa} ({row['backend']}), {network}")
            for variant, ratio in figures["ratio to native contiguous"].items():
                print(f"    {variant:32s} {figures['milliseconds'][variant]:9.2f} ms  {ratio:6.3f}")
    print(save("nbsmt_speed", {"threads": 1, "instruction sets": rows}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
