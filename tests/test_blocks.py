"""Every block of code in README.md and docs is run, or says why not: pages and notebooks in `make test`, the longest
pages in `make slow`, and what needs a reader's data in `make real`. How: tests/blocks.py."""

import json
import warnings
from pathlib import Path
from runpy import run_path

import pytest
from safetensors.torch import save_file
from scripts import notebooks

import recoup as rc
from tests import blocks
from tests.blocks import PAGES, WEIGHTS, blurred, brought, command, run_page
from tests.fresh import Fresh

RUNNING = [page for page in PAGES if any(block.reason is None for block in blocks.blocks(page))]
REAL = [page for page in RUNNING if any(block.real and block.reason is None for block in blocks.blocks(page))]


LONG = ("docs/search.md", "docs/cluster.md")
"""Pages that take longest."""
NOTEBOOKS = sorted(notebooks.FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def weights() -> bytes:
    with warnings.catch_warnings():
        return blocks.trained()


def in_a_folder_of_its_own(page: str, weights: bytes, folder: Path, real: bool) -> None:
    (folder / WEIGHTS).parent.mkdir()
    (folder / WEIGHTS).write_bytes(weights)
    (folder / "results" / "search-resnet20").mkdir(parents=True)
    for name in ("chipA", "chipB", "results/search-resnet20/policy-03"):
        rc.Policy({"re:layer.*conv.*": "nbsmt-2t" if name == "chipA" else "nbsmt-4t"}, Path(name).name).save(
            folder / f"{name}.yaml"
        )
    done = Fresh(run_page, page, real, cwd=folder).wait()
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in LONG else p for p in RUNNING])
def test_blocks_run(page, weights, tmp_path):
    in_a_folder_of_its_own(page, weights, tmp_path, real=False)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebooks_run(path, weights, tmp_path):
    (tmp_path / WEIGHTS).parent.mkdir()
    (tmp_path / WEIGHTS).write_bytes(weights)
    done = Fresh(run_path, str(path), cwd=tmp_path).wait()
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebooks_are_their_texts(path):
    kept = path.with_suffix(".ipynb").read_text("utf-8")
    assert kept == notebooks.notebook(path.read_text("utf-8")), "python scripts/notebooks.py makes them anew"
    assert "".join("".join(cell["source"]) for cell in json.loads(kept)["cells"]).count("%%") == 0


@pytest.mark.real
@pytest.mark.parametrize("page", REAL)
def test_blocks_on_real_data_run(page, weights, tmp_path):
    if not (rc.data.root() / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 in {rc.data.root()}")
    in_a_folder_of_its_own(page, weights, tmp_path, real=True)


def test_readmes_python_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(WEIGHTS).parent.mkdir()
    save_file(dict(rc.models.digits_net().state_dict()), WEIGHTS)
    (body,) = [block.body for block in blocks.blocks("README.md") if block.language == "python"]
    exec(compile(body, "README.md", "exec"), {})  # noqa: S102
    assert Path("chip.safetensors").exists()


def test_every_block_of_code_is_found():
    """As many fences of code as blocks, so that none is lost between two others."""
    for page in PAGES:
        fences = [line for line in (blocks.ROOT / page).read_text("utf-8").splitlines() if line.startswith("```")]
        code = [line for line in fences[::2] if line not in ("```text", "```math")]
        assert len(blocks.blocks(page)) == len(code), page


def test_a_block_that_fails_is_a_failure():
    with pytest.raises(AssertionError, match="who runs"):
        command("rm -rf everything")
    assert blurred("top 97.82 (3,000)") == blurred("top 1 (2)") != blurred("to 1 (2)")
    assert "cifar10:DIR" not in brought("--data cifar10:DIR")
