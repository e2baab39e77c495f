"""Stored single instructions of the public model of the units (MMA-Sim, MIT), where RECOUP_DATA has them."""

import math

import ml_dtypes
import numpy as np
import pytest

from recoup.data import root
from recoup.tensorcore import TensorCore
from recoup.tensorcore.reference import step

FILE = root() / "tensorcore" / "vectors.npz"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FILE.is_file(), reason=f"no tensorcore/vectors.npz in {root().name}: set RECOUP_DATA"),
]
NAMES = {"e4m3": "e4m3fn", "f16": "float16", "bf16": "bfloat16", "f32": "float32"}
TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def values(codes, name):
    if name == "tf32":  # the hardware drops the low 13 bits
        codes = codes & ~0x1FFF
    return codes.view(TYPES.get(name, np.float32)).astype(np.float64)


def test_every_stored_instruction():
    with np.load(FILE) as stored:
        arrays = dict(stored)
    checked = 0
    for preset in sorted({name.split("/")[0] for name in arrays}):
        said = dict(part.split("=") for part in str(arrays[f"{preset}/unit"][0]).split() if "=" in part)
        unit = TensorCore(
            (NAMES.get(said["a"], said["a"]), NAMES.get(said["b"], said["b"])),
            int(said["group"]),
            int(said["fraction"]),
            NAMES.get(said["output"], said["output"]),
        )
        a, b = (values(arrays[f"{preset}/{x}"], said[x]) for x in "ab")
        c, d = (values(arrays[f"{preset}/{x}"], "f16" if said["output"] == "f16" else "f32") for x in "cd")
        for row in range(len(c)):
            got = float(c[row])
            for k in range(0, a.shape[1], unit.group):
                got = step(got, a[row, k : k + unit.group].tolist(), b[row, k : k + unit.group].tolist(), unit)
            alike = got == d[row] and math.copysign(1, got) == math.copysign(1, d[row])
            assert alike or (math.isnan(got) and math.isnan(d[row])), f"{preset}, instruction {row}"
            checked += 1
    assert checked == 2000
