"""Whether what ``make dist`` made is enough: each archive in an empty environment, and the demo from an empty folder.

For every Python that pyproject.toml names and this machine has, and for the source archive and the wheel by themselves:
a new environment, ``pip install -c constraints.txt ARCHIVE`` as pip is configured here, and ``recoup demo`` in a new
folder, with nothing of this repository on Python's path and no network for data. The demo must end well and leave its
report, and the package must be the environment's own, of the version that the archive is called by. A Python that is
not here is named and proves nothing; none at all is a failure. Pip's own settings decide which build of the pinned
torch is taken (those for CPUs where they name an index of them, as by PIP_EXTRA_INDEX_URL), and every line names it: an
environment with a CUDA build takes 5.6 GB. It is removed as soon as it has been looked at.

    make dist-check                            # makes dist/ first
    python scripts/dist_check.py               # all Pythons
    python scripts/dist_check.py 3.12 3.13     # some
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script, which has its own folder there

from scripts.check_install import ROOT, interpreter, pythons

DIST = ROOT / "dist"
MADE = ("results.json", "report.html")  # what the demo leaves in recoup-demo
MINUTES = 30
ASKED = (
    "import pathlib, recoup, torch; print(recoup.__version__, pathlib.Path(recoup.__file__).resolve(), "
    "torch.__version__, sep='\\n')"
)


def archives(folder: Path) -> list[Path]:
    """The source archive and the wheel, of one version.

    Raises:
        ValueError: one is missing, there are several, or they are of two versions.
    """
    found = [sorted(folder.glob(pattern)) for pattern in ("recoup-*.tar.gz", "recoup-*.whl")]
    if [len(several) for several in found] != [1, 1]:
        names = ", ".join(path.name for several in found for path in several) or "none"
        raise ValueError(f"{folder}: one source archive and one wheel are checked; found {names}; make dist makes them")
    pair = [several[0] for several in found]
    if version(pair[0]) != version(pair[1]):
        raise ValueError(f"{folder}: {pair[0].name} and {pair[1].name} are of two versions; make dist makes them anew")
    return pair


def version(archive: Path) -> str:
    """The version that an archive is called by."""
    return archive.name.removesuffix(".tar.gz").split("-")[1]


def environment() -> dict[str, str]:
    """The variables without what leads Python or recoup elsewhere; pip's stay."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RECOUP", "VIRTUAL_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def faults(told: str, archive: Path, home: Path, folder: Path) -> list[str]:
    """What is wrong with an installed package that told its version and place, and with what its demo left."""
    said, place, *_ = [*told.split("\n"), "", ""]
    found = [] if said == version(archive) else [f"{archive.name} installs version {said or 'nothing'}"]
    if not Path(place).is_relative_to(home.resolve()):
        found.append(f"recoup was imported from {place or 'nowhere'}, not from the environment")
    missing = [name for name in MADE if not (folder / "recoup-demo" / name).is_file()]
    return found + [f"the demo left no {name}" for name in missing]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """One command in a folder."""
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=MINUTES * 60
    )


def check(python: str, archive: Path, folder: Path) -> tuple[list[str], str]:
    """Install an archive for one Python and run its demo; what went wrong, and the torch that came with it."""
    home, empty = folder / "environment", folder / "empty"
    empty.mkdir()
    own = str(home / "bin" / "python")
    steps = (
        [python, "-m", "venv", str(home)],
        [own, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(archive)],
        [str(home / "bin" / "recoup"), "demo"],
    )
    for step in steps:
        done = run(step, empty)
        if done.returncode:
            return [f"{' '.join(step)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"], ""
    told = run([own, "-c", ASKED], empty).stdout
    return faults(told, archive, home, empty), told.strip().rpartition("\n")[2]


def main() -> None:
    """Exit code 1 if an archive does not install or run, or if there is no Python to try."""
    asked = sys.argv[1:] or pythons()
    unknown = [one for one in asked if one not in pythons()]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: recoup is for Python {', '.join(pythons())}")
    try:
        pair = archives(DIST)
    except ValueError as error:
        sys.exit(str(error))
    results: list[bool] = []
    for python in asked:
        own = interpreter(python)
        if own is None:
            print(f"Python {python}: not on this machine, nothing is known of it", flush=True)
            continue
        for archive in pair:
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                wrong, torch = check(own, archive, Path(folder))
            said = "FAILS\n" + "\n".join(wrong) if wrong else f"installs, with torch {torch}, and runs the demo"
            print(f"Python {python}: {archive.name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
            results.append(not wrong)
    sys.exit(0 if results and all(results) else 1)


if __name__ == "__main__":
    main()
