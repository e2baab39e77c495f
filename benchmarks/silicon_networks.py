"""Claim: energy of a network on ordinary operands ranks threads as captured operands do, and understates the saving.

ResNet-20's 18 emulated convolutions, an image, with one, two and four threads: what `rc.cost` says with a Liberty file,
in uJ and mm2 of a 16 x 16 array. The captured operands' figures are those of benchmarks/silicon_energy.py.

    python benchmarks/silicon_networks.py [--liberty FILE ...]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import recoup as rc
from benchmarks.measure import save
from recoup.data import root

LIBRARY = "sg13g2_stdcell_typ_1p20V_25C.lib"


def main() -> None:
    """Print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--liberty", nargs="+", default=[str(root() / "liberty" / LIBRARY)])
    liberty = parser.parse_args().liberty
    model, rows = rc.models.load("resnet20"), []
    for threads in (1, 2, 4):
        cost = rc.cost(model, {"re:layer.*conv.*": rc.NBSMT(threads)}, (3, 32, 32), liberty=liberty)
        assert cost.energy is not None
        assert cost.area is not None
        rows.append({"threads": threads, "cycles": cost.cycles, "uJ": cost.energy / 1e6, "mm2": cost.area / 1e6})
        print(*(f"{name} {value:.5g}" for name, value in rows[-1].items()), flush=True)
    save("silicon_networks", {"rows": rows, "liberty": [Path(path).name for path in liberty]})


if __name__ == "__main__":
    main()
