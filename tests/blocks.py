"""Blocks of code in README.md and docs, and how they are run: in the order of their page, in one process and folder.

A block that begins with a comment of a file's name, ``# mynet.py``, is written to that file. After a block a line
``prints`` and a block of text say what it prints: words are compared, numbers are those of one machine. What cannot be
run stands behind ``<!-- not run: why -->``. Pages may take names for granted, which `PRELUDES` gives them. Blocks on
data that a reader brings run where `RECOUP_DATA` has them, on a few images.

    python -m tests.blocks docs/index.md    # runs a page and writes into it what its blocks print
"""

import contextlib
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$"
    r"(?:\n\nprints\n\n```text\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"# (\S+\.(?:py|yaml))\n")
WEIGHTS = "recoup-demo/digits_net.safetensors"
# First words of shell lines that are not run here, and who does.
ELSEWHERE = {
    "make": "targets of the Makefile: CI",
    "pip": "scripts/check_install.py",
    "python3": "scripts/check_install.py",
    ".": "scripts/check_install.py",
    "recoup demo": "tests/cli/test_main.py, and CI",
}
BROUGHT = {  # what stands for a reader's own data -> where it lies in RECOUP_DATA
    "cifar10:DIR": "cifar10:{}/cifar10",
    "cifar10:../shared/data/cifar10": "cifar10:{}/cifar10",
    "resnet20.th": "{}/cifar10_models/resnet20-12fca82f.th",
    "resnet20-12fca82f.th": "{}/cifar10_models/resnet20-12fca82f.th",
    "chargpt_tinyshakespeare.pt": "{}/text/chargpt_tinyshakespeare.pt",
    "text:tinyshakespeare.txt": "text:{}/text/tinyshakespeare.txt",
    "sg13g2_stdcell_typ_1p20V_25C.lib": "{}/liberty/sg13g2_stdcell_typ_1p20V_25C.lib",
}
SHORTER = {  # a command on real data -> what makes it short
    "evaluate": "--limit 40 --test-seed 0 --seeds 0 --calibration-images 32 --profile-images 8",
    "train": "--epochs 1 --limit 128 --test-limit 40",
    "search": "--set scoring.images=16 --set test.limit=20 --set calibration.images=16 --set probes=2 --set points=2",
}


@dataclass(frozen=True)
class Block:
    """One block: its language, its text, why it is not run (if so), what it prints (if that is said)."""

    language: str
    body: str
    reason: str | None
    prints: str | None

    @property
    def real(self) -> bool:
        """Whether it needs what a reader brings."""
        return any(name in self.body for name in BROUGHT)


def blocks(page: str) -> list[Block]:
    """The blocks of a page that are code."""
    found = [
        Block(one["language"], one["body"], one["reason"], one["prints"])
        for one in BLOCK.finditer((ROOT / page).read_text("utf-8"))
    ]
    return [block for block in found if block.language not in ("text", "math")]


def run_page(page: str, real: bool) -> None:
    """Run a page's blocks, those on ``real`` data or all others, here; the first fault ends it with exit code 1."""
    names: dict[str, Any] = {"__name__": "__main__", **PRELUDES.get(page, dict)()}
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    for number, block in enumerate(blocks(page), 1):
        if block.reason is not None or block.real != real:
            continue
        try:
            printed = _run(block, brought(block.body), names)
            if block.prints is not None:
                assert blurred(printed) == blurred(block.prints), f"{page} prints\n{printed}\nnot\n{block.prints}"
        except BaseException:
            traceback.print_exc()
            sys.exit(f"{page}, block {number} ({block.language}):\n{block.body}")


def _run(block: Block, body: str, names: dict[str, Any]) -> str:
    """Run a block; what it prints."""
    if file := FILE.match(body):
        Path(file[1]).write_text(body, "utf-8")
        return ""
    if block.language == "python":
        with contextlib.redirect_stdout(io.StringIO()) as told:
            exec(compile(body, "block", "exec"), names)  # noqa: S102 -- that is what these tests are for
        return told.getvalue()
    assert block.language == "sh", f"a block of {block.language} is a file with its name, or says why it is not run"
    return "".join(map(command, body.replace("\\\n", " ").splitlines()))


def command(line: str) -> str:
    """Run a line of shell, if it is one of ours; what it prints."""
    from typer.testing import CliRunner

    from recoup.cli.main import app

    words = shlex.split(line, comments=True)
    if not words or words[0] in ELSEWHERE or " ".join(words[:2]) in ELSEWHERE:
        return ""
    assert words[0] == "recoup", f"who runs {line!r}?"
    real = str(_data()) in line
    short = SHORTER.get(words[1], "").split() if real else []
    before = sys.path[:]
    sys.path[:] = [place for place in before if place != os.getcwd()]  # noqa: PTH109 -- as where the command is a program
    try:
        done = CliRunner().invoke(app, [*words[1:], *short])
    finally:
        sys.path[:] = before
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    return done.stdout


def brought(text: str) -> str:
    """A text with RECOUP_DATA's paths for what a reader brings."""
    for name, place in BROUGHT.items():
        text = re.sub(rf"(?<![\w/]){re.escape(name)}", place.format(_data()), text)
    return text


def _data() -> Path:
    from recoup.data import root

    return root()


def blurred(text: str) -> list[str]:
    """The words of a text, with ``#`` for every number."""
    return re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", text).split()


def trained() -> bytes:
    """The weights that `recoup demo` leaves."""
    import tempfile

    from recoup.cli.demo import train_weights

    with tempfile.TemporaryDirectory() as folder:
        train_weights(Path(folder))
        return (Path(folder) / Path(WEIGHTS).name).read_bytes()


def _digits() -> dict[str, Any]:
    import recoup as rc

    model = rc.models.load("digits_net", WEIGHTS).eval()
    images = rc.data.load("digits", "train", limit=128).batches(64)
    test = rc.data.load("digits", "test", limit=100, seed=0).batches(50)
    return {"model": model, "images": images, "test": test, "validation": test}


def _joined() -> dict[str, Any]:
    """Beside the digits a group of one process, which is left for the process's end."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/group", rank=0, world_size=1)  # noqa: PTH109
    return _digits()


def _samples() -> dict[str, Any]:
    import torch

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
    drawn = torch.Generator().manual_seed(0)
    return {"samples": [(torch.randn(1, 3, 32, 32, generator=drawn), torch.tensor([number])) for number in range(2)]}


def _emulated() -> dict[str, Any]:
    """A ResNet-20 on two threads, and one layer's operands in the folder."""
    import numpy

    import recoup as rc

    names = _residual()
    rc.calibrate_(names["model"], names["images"])
    rc.emulate_(names["model"], rc.NBSMT(threads=2))
    numpy.savez("layer.npz", *rc.silicon.capture(names["model"], names["images"])["layer2.1.conv1"])
    return names


def _residual() -> dict[str, Any]:
    import torch

    import recoup as rc

    torch.manual_seed(0)
    model = rc.models.resnet20().eval()
    x = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        labels = model(x).argmax(1)
    batches = list(zip(x.split(8), labels.split(8), strict=True))
    parts = {"train_batches": batches[:1], "test_batches": batches[1:2], "calibration_batches": batches[2:3]}
    images = [batches[0][0]]
    return {"model": model, "images": images, **parts}


PRELUDES: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/lba.md": _digits,
    "docs/lightnorm.md": _joined,
    "docs/recalibration.md": _digits,
    "docs/pipeline.md": _samples,
    "docs/search.md": _residual,
    "docs/silicon.md": _emulated,
}
"""Page -> the names that its blocks take for granted."""


def record(page: str) -> None:
    """Run a page's blocks that need no data, in a folder of their own, and write into the page what they print."""
    import tempfile

    text, place = (ROOT / page).read_text("utf-8"), os.getcwd()  # noqa: PTH109
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path(WEIGHTS).parent.mkdir()
        Path(WEIGHTS).write_bytes(trained())
        names: dict[str, Any] = {"__name__": "__main__", **PRELUDES.get(page, dict)()}
        sys.path.insert(0, folder)
        for block in blocks(page):
            if block.reason is None and not block.real:
                printed = _run(block, block.body, names).strip("\n")
                if block.prints is not None:
                    before = f"{block.body}```\n\nprints\n\n```text\n"
                    text = text.replace(f"{before}{block.prints}```", f"{before}{printed}\n```")
        os.chdir(place)
    (ROOT / page).write_text(text, "utf-8")


if __name__ == "__main__":
    for given in sys.argv[1:]:
        record(given)
