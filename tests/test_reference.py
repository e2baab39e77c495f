"""The reference of the site: every public name is in it and has a docstring, and nothing that is gone.

Public is the ``__all__`` of `recoup` and of every package that it names; what README, docs and examples import is too.
"""

import ast
import importlib
import inspect
import json
import re
import types
from pathlib import Path

import pytest
from scripts import command_line, reference, site_hooks
from scripts.equations import equation

import recoup
from recoup.policy import Policy
from tests.blocks import PAGES, ROOT, blocks

PUBLISHED = {
    f"{path}.{name}": getattr(importlib.import_module(path), name)
    for paths in reference.PAGES.values()
    for path in paths
    for name in reference.public_names(importlib.import_module(path))
}


def test_every_public_package_has_a_page():
    modules = [name for name in recoup.__all__ if inspect.ismodule(getattr(recoup, name))]
    assert {f"recoup.{name}" for name in modules} <= {path for paths in reference.PAGES.values() for path in paths}
    named = re.findall(r"reference/([\w-]+)\.md", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(named) == sorted([*reference.PAGES, "command-line"])


def test_every_public_name_has_a_docstring():
    kinds = type | types.FunctionType
    bare = [name for name, value in PUBLISHED.items() if isinstance(value, kinds) and not inspect.getdoc(value)]
    assert bare == []


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_has_every_name_and_no_other(name):
    text = reference.page(name)
    found = set(re.findall(r"\{ #(recoup[\w.]*) \}", text))
    modules = reference.PAGES[name]
    wanted = {full for full in PUBLISHED if full.rpartition(".")[0] in modules}
    twice = {full for full in wanted if any(PUBLISHED[full] is PUBLISHED[other] for other in wanted - {full})}
    assert wanted - twice <= found
    for full in found - wanted:  # a method or property of one
        owner, _, member = full.rpartition(".")
        assert hasattr(PUBLISHED[owner], member), full
    assert text.count("```") % 2 == 0


@pytest.mark.parametrize(
    ("typed", "drawn"),
    [
        ("s_i = Q_acc(x_i + s_{i-1})", "s<sub>i</sub> = Q<sub>acc</sub>(x<sub>i</sub> + s<sub>i-1</sub>)"),
        ("2^ceil(2^(E-1) - a) x", "2<sup>ceil(2<sup>E-1</sup> \N{MINUS SIGN} a)</sup> x"),
        ("+-2^e (1 + f / 2^-7)", "±2<sup>e</sup> (1 + f / 2<sup>-7</sup>)"),
        ("min_exponent <= e < f", "min_exponent ≤ e &lt; f"),
        ("m_r^(N / N_r), (F + B)_r", "m<sub>r</sub><sup>N / N<sub>r</sub></sup>, (F + B)<sub>r</sub>"),
        ("mu <- sqrt(<z_o, y_o>)", "μ ← √(⟨z<sub>o</sub>, y<sub>o</sub>⟩)"),
        ("S(sum x_q), the sum of what xhat is", "S(Σ x<sub>q</sub>), the sum of what x̂ is"),
        ("w_t if `mu_t <= 1`", "w<sub>t</sub> if <code>mu_t &lt;= 1</code>"),
    ],
)
def test_equations_are_set(typed, drawn):
    assert equation(typed) == f'<pre class="equation">{drawn}</pre>'


def test_an_indented_block_is_an_equation_wherever_it_stands():
    told = reference.body("It is:\n    y_i = x^2\n\nand\n\n    a\n    b\n\nso::\n\n    recoup.wings.register(card)")
    assert told.count('<pre class="equation">') == 2
    assert "a\nb</pre>" in told
    assert "```text\nrecoup.wings.register(card)\n```" in told


def imports(body: str) -> set[str]:
    """What a block of Python imports from recoup, and names of ``rc``."""
    found = {ast.unparse(node) for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Attribute)}
    names = {"recoup." + name[3:] for name in found if re.fullmatch(r"rc(\.\w+)+", name)}
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recoup"):
            names |= {f"{node.module}.{one.name}" for one in node.names}
    return names


INTERNAL = {"recoup.lba.reference.matmul", "recoup.data.text.contexts"}
"""What guides show that is no public name: a definition, and a reader for an example."""


def test_what_the_pages_use_is_public():
    """But for `INTERNAL` every name in a block of Python is in the reference, or a member of what is."""
    used = {
        name for page in PAGES for block in blocks(page) if block.language == "python" for name in imports(block.body)
    }
    roots = {*PUBLISHED, *(path for paths in reference.PAGES.values() for path in paths)}
    strange = {
        name for name in used - INTERNAL if not any(name == one or name.startswith(f"{one}.") for one in PUBLISHED)
    }
    assert {name for name in strange if name not in roots} == set()


def test_the_command_line_has_every_command_and_option():
    text = command_line.page()
    for name in ("evaluate", "search", "silicon", "doctor"):
        assert f"## recoup {name}" in text
    assert "`--calibration-images" in text
    assert "| 1024, or all if fewer |" in text


def test_what_is_generated_is_what_the_navigation_wants():
    for name in site_hooks.PROJECT:
        moved = site_hooks.moved((ROOT / name).read_text("utf-8"))
        assert not re.search(r"\]\(docs/", moved)
    assert json.loads(json.dumps(Policy.json_schema()))["title"] == "recoup policy"
    assert site_hooks.outside("papers/lba.md", "../../benchmarks/results/lba_accuracy.json")
    assert site_hooks.outside("papers/lba.md", "../lba.md") is None
    assert Path(ROOT / "docs" / "index.md").exists()
