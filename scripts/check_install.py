"""Whether the tested versions install for everybody: constraints.txt resolved as where pip is not configured at all.

For every Python that pyproject.toml names, and recoup alone and with each extra, ``pip install --dry-run -c
constraints.txt`` looks for a set of packages that fits, from pip's default index, without any configuration file,
variable or package of this machine. Nothing is installed. A Python that this machine has resolves for itself; for one
that it lacks, the Python at hand resolves for it, from wheels alone, and the line says so: markers about the Python's
version are then the other's.

    python scripts/check_install.py            # all Pythons
    python scripts/check_install.py 3.12 3.13  # some
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PIP = "pip>=25.1"  # earlier ones download every wheel for a dry run
MINUTES = 15


def pythons() -> list[str]:
    """The versions that the project says it runs on, such as ``3.12``."""
    words = [classifier.split(" :: ") for classifier in PROJECT["classifiers"]]
    return [word[-1] for word in words if word[:2] == ["Programming Language", "Python"]]


def unconfigured() -> dict[str, str]:
    """The environment without what configures pip and Python."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "UV_"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PYENV_VERSION": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def interpreter(version: str) -> str | None:
    """A Python of a version: this one, one on the path, or one that pyenv or uv keeps."""
    found = [sys.executable, shutil.which(f"python{version}")]
    found += map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), reverse=True))
    if uv := shutil.which("uv"):
        asked = subprocess.run([uv, "python", "find", version], capture_output=True, text=True, check=False)
        found.append(asked.stdout.strip())
    told = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, found):
        answer = subprocess.run([python, "-c", told], capture_output=True, text=True, env=unconfigured(), check=False)
        if answer.stdout.strip() == version:
            return python
    return None


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt: what would be installed, by name, or why nothing fits."""

    chosen: dict[str, str]
    error: str = ""


def resolve(pip: list[str], what: str, version: str, foreign: bool) -> Outcome:
    """Ask pip for a set of packages that fits."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [*pip, "--isolated", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        if foreign:
            command += ["--python-version", version, "--only-binary", ":all:", "--target", folder]
        command += ["-c", str(ROOT / "constraints.txt"), what]
        done = subprocess.run(
            command, capture_output=True, text=True, env=unconfigured(), check=False, timeout=MINUTES * 60
        )
        if done.returncode:
            return Outcome({}, done.stderr.strip() or f"pip ended with {done.returncode}")
        installed = [entry["metadata"] for entry in json.loads(report.read_text("utf-8"))["install"]]
        return Outcome({one["name"]: one["version"] for one in installed})


def targets() -> list[str]:
    """What may be asked for: recoup, and recoup with each of its extras."""
    return [str(ROOT), *(f"{ROOT}[{extra}]" for extra in PROJECT["optional-dependencies"])]


def check(version: str, folder: Path) -> bool:
    """Resolve everything for one Python, and say what came of it."""
    own = interpreter(version)
    python, how = (own, "resolved by itself") if own else (sys.executable, "not here: resolved for it, from wheels")
    environment = folder / version
    subprocess.run([python, "-m", "venv", str(environment)], env=unconfigured(), check=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "--isolated", "install", "--quiet", "--upgrade", PIP], env=unconfigured(), check=True)
    right = True
    for what in targets():
        outcome = resolve(pip, what, version, foreign=own is None)
        name = what.replace(str(ROOT), "recoup")
        if outcome.error:
            right = False
            print(f"Python {version} ({how}): {name}: FAILS\n{outcome.error}", flush=True)
        else:
            torch = outcome.chosen.get("torch")
            print(f"Python {version} ({how}): {name}: {len(outcome.chosen)} packages, torch {torch}", flush=True)
    return right


def main() -> None:
    """Exit code 1 if something does not resolve."""
    asked = sys.argv[1:] or pythons()
    unknown = [version for version in asked if version not in pythons()]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: recoup is for Python {', '.join(pythons())}")
    with tempfile.TemporaryDirectory() as folder:
        results = [check(version, Path(folder)) for version in asked]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
