"""What a process of recoup's own settles before torch is loaded; each case in an interpreter of its own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from recoup.cli import main
from recoup.kernels import process
from recoup.kernels.process import ALLOCATING, SPINNING, WAITING, waiting

GLIBC = sys.platform.startswith("linux") and "CS_GNU_LIBC_VERSION" in os.confstr_names

FAULTS = """
import resource
import numpy as np
from recoup.kernels import process
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(process.keep_pages())
for _ in range(2):  # the first block's pages are new in any case
    before = faults()
    np.empty(48 << 20, np.uint8)[::4096] = 1
print(faults() - before)
"""


def alone(code, **variables):
    """The lines that code prints in a new interpreter, whose environment says nothing but this."""
    environment = {name: value for name, value in os.environ.items() if name not in (*SPINNING, *ALLOCATING)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[:-1]


BEGIN = "import os, sys; from recoup.kernels import process; process.begin(); "
SAID = BEGIN + f"print(os.environ.get('{WAITING}'), 'torch' in sys.modules)"


def test_threads_of_an_own_process_soon_sleep_while_they_wait():
    assert alone(SAID) == ["10000 False"]


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), (WAITING, "5"), ("KMP_BLOCKTIME", "1")])
def test_what_the_user_says_of_waiting_stays(name, value):
    wanted = value if name == WAITING else "None"
    assert alone(SAID, **{name: value}) == [f"{wanted} False"]


def test_a_process_that_has_loaded_torch_is_the_users():
    assert alone("import sys; sys.modules['torch'] = sys; " + SAID) == ["None True"]


def test_importing_recoup_changes_no_environment():
    assert alone(f"import os; import recoup; print(os.environ.get('{WAITING}'))") == ["None"]


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
def test_freed_memory_stays_and_comes_again_without_new_pages():
    kept, faults = alone(FAULTS)
    assert kept == "True"
    assert int(faults) < 10  # of 12,288, or 24 of 2 MiB


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_says_of_memory_stays(name):
    value = "131072" if name.startswith("MALLOC") else "glibc.malloc.trim_threshold=131072"
    kept, faults = alone(FAULTS, **{name: value})
    assert kept == "False"
    assert int(faults) > 20  # huge pages are fewer, but new all the same


@pytest.mark.skipif(not GLIBC, reason="mallopt is glibc's")
@pytest.mark.parametrize(("most", "kept"), [(1 << 40, 1 << 26), (1 << 25, 1 << 25), (1 << 19, None)])
def test_a_c_library_that_takes_smaller_blocks_alone_keeps_those_or_is_left_as_it_was(monkeypatch, most, kept):
    """glibc refused more than 32 MiB up to some years ago; the other bound alone stops it from adapting this one."""
    found = {}

    def mallopt(name, value):
        taken = name != process.MMAP_THRESHOLD or value <= most
        found.update({name: value} if taken else {})
        return int(taken)

    for name in ALLOCATING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert process.keep_pages() == (kept is not None)
    assert found == ({process.MMAP_THRESHOLD: kept, process.TRIM_THRESHOLD: 1 << 30} if kept else {})


def test_a_command_settles_it_before_its_module_is_imported(monkeypatch):
    order = []

    def imported(name):
        order.append(name)
        raise ImportError(name)

    monkeypatch.setattr(main.process, "begin", lambda: order.append("begin"))
    monkeypatch.setattr(main.importlib, "import_module", imported)
    with pytest.raises(ImportError):
        main._loaded("evaluate")
    assert order == ["begin", "recoup.cli.evaluate"]


def test_the_command_line_itself_loads_no_torch():
    assert alone("import sys; import recoup.cli.main; print('torch' in sys.modules)") == ["False"]


def test_how_threads_wait_in_words(monkeypatch):
    for name in SPINNING:
        monkeypatch.delenv(name, raising=False)
    assert waiting() == "spinning (GOMP_SPINCOUNT and OMP_WAIT_POLICY are not set)"
    monkeypatch.setenv(WAITING, "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert waiting() == "OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=0"
