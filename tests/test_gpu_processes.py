"""Every wing's GPU kernels, interpreted and compiled, each in a process of its own: Triton reads its switches once."""

from pathlib import Path

import pytest

from tests import fresh
from tests.fresh import Fresh


@pytest.mark.slow
@pytest.mark.parametrize("wing", ["nbsmt", "lba", "lightnorm", "tensorcore"])
@pytest.mark.parametrize(
    ("tests", "variable"),
    [("test_gpu.py::TestInterpreter", "TRITON_INTERPRET"), ("test_gpu_code.py", "RECOUP_TEST_COMPILER")],
)
def test_in_a_process_of_its_own(wing, tests, variable, tmp_path):
    pytest.importorskip("triton", minversion="3.9", reason="Triton 3.6 interprets no loop with NumPy 2.4")
    env = {variable: "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = Fresh(fresh.tested, f"tests/{wing}/{tests}", cwd=Path(__file__).parents[1], env=env).wait()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
