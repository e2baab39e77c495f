"""Claim: emulating two threads takes at most twice the memory of the native float network.

Each variant runs inference in a process of its own. Two figures: the peak resident memory of the whole process, and
that peak less what the process held before the network was built (interpreter, torch, recoup, LLVM), which a small
network's compiled kernels and oneDNN's scratch memory dominate. Inputs are included on both sides.

    python benchmarks/nbsmt_memory.py
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NETWORKS = {"ResNet-20 b64": ("resnet20", (64, 3, 32, 32)), "ResNet-18 b8": ("resnet18", (8, 3, 224, 224))}
VARIANTS = ("native", "2T", "4T", "2T float32 path")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak(network: str, variant: str) -> tuple[int, int]:
    """Peak bytes of this process while one variant runs, and how much of it came with the network."""
    import torch

    import recoup as rc
    from recoup.nbsmt import cpu
    from recoup.nbsmt.groups import groups

    # Needed once, whatever the network: the probe, and LLVM, which the first operand kernel loads (40 MB).
    cpu.probe()
    cpu.operands(torch.rand(4, 4), 0.1, rc.NBSMT(), (groups(rc.NBSMT())[1].activation,))
    factory, shape = NETWORKS[network]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    model = getattr(rc.models, factory)().eval().to(memory_format=torch.channels_last)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    path = "float32" if "float32" in variant else rc.nbsmt.current_backend()
    if variant != "native":
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        for layer in convolutions[1:]:
            layer.activation_scale = 0.02  # type: ignore[assignment]
        rc.emulate_(model, rc.NBSMT(threads=int(variant[0])))
    with torch.inference_mode(), rc.nbsmt.backend(path):
        for _ in range(3):
            model(x)
    return resident("VmHWM"), resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "VARIANT"), help="measure one variant in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(peak(*arguments.one)))
        return
    from benchmarks.measure import save

    rows = {}
    for network in NETWORKS:
        found = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--one", network, variant]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[variant] = [value / 2**20 for value in json.loads(done.stdout)]
        rows[network] = {}
        for variant, (process, added) in found.items():
            ratios = process / found["native"][0], added / found["native"][1]
            rows[network][variant] = {
                "process MiB": round(process, 1),
                "process ratio": round(ratios[0], 2),
                "added MiB": round(added, 1),
                "added ratio": round(ratios[1], 2),
            }
            print(f"{network}, {variant:16s}", *(f"{k} {v}" for k, v in rows[network][variant].items()), sep="  ")
    print(save("nbsmt_memory", {"peak memory": rows}))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
