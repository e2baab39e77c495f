"""The reference as Markdown pages, from the docstrings: nothing of it is written by hand.

Public is what `PAGES` says: the ``__all__`` of a package, of a module without one its own functions and classes. A
page is a text; scripts/site_hooks.py puts them into the site.

    python -m scripts.reference nbsmt        # prints one page
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from scripts.equations import equation

PAGES: dict[str, tuple[str, ...]] = {
    "recoup": ("recoup",),
    "formats": ("recoup.formats",),
    "data": ("recoup.data",),
    "models": ("recoup.models", "recoup.models.attention"),
    "nbsmt": ("recoup.nbsmt",),
    "lba": ("recoup.lba",),
    "lightnorm": ("recoup.lightnorm",),
    "tensorcore": ("recoup.tensorcore",),
    "pipeline": (
        *("recoup.pipeline", "recoup.pipeline.runtime", "recoup.pipeline.wallclock", "recoup.pipeline.norms"),
        "recoup.pipeline.analysis",
    ),
    "search": ("recoup.search",),
    "silicon": ("recoup.silicon", "recoup.silicon.scalesim"),
    "wings": ("recoup.wings",),
    "study": ("recoup.study", "recoup.report"),
    "training": ("recoup.training",),
}
"""Page -> the modules whose public names it has."""
HEADS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns", "Example", "Examples")
ENTRY = re.compile(r"((?:\*{0,2}[\w.|`]+(?:, \*{0,2}[\w.|`]+)*)): (.*)", re.DOTALL)


def public_names(module: ModuleType) -> list[str]:
    """The public names of a module that are no modules, sorted; of one without ``__all__`` what it defines."""
    names = getattr(module, "__all__", None)
    if names is None:
        kinds = (type, type(public_names))
        own = {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
        names = [name for name, value in own.items() if name[0] != "_" and value.__module__ == module.__name__]
    return sorted(name for name in names if not inspect.ismodule(getattr(module, name)) and name != "__version__")


def page(name: str) -> str:
    """One page: every module's docstring, its names, and each of them."""
    parts = [f"# {name if name == 'recoup' else 'recoup.' + name}\n"]
    seen: set[int] = set()
    for path in PAGES[name]:
        module = importlib.import_module(path)
        if path != PAGES[name][0]:
            parts.append(f"## {path}\n")
        parts.append(body(inspect.getdoc(module) or ""))
        for public in public_names(module):
            value = getattr(module, public)
            if id(value) in seen:
                continue
            seen.add(id(value))
            parts.append(entry(f"{path}.{public}", value))
    return "\n".join(parts)


def entry(name: str, value: Any) -> str:
    """A name with its signature, docstring and, of a class, its own public methods and properties."""
    short = name.rpartition(".")[2]
    parts = [f"### `{short}` {{ #{name} }}\n"]
    if inspect.isclass(value) or callable(value):
        parts.append(f"```python\n{signature(short, value)}\n```\n")
        parts.append(body(inspect.getdoc(value) or ""))
    else:
        parts.append(f"```python\n{short} = {textwrap.shorten(repr(value), 300)}\n```\n")
    if inspect.isclass(value):
        for method, found in members(value):
            parts.append(f"#### `{short}.{method}` {{ #{name}.{method} }}\n")
            if not isinstance(found, property):
                parts.append(f"```python\n{signature(method, found)}\n```\n")
            parts.append(body(inspect.getdoc(found) or ""))
    return "\n".join(parts)


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties with a docstring that a class of recoup defines itself."""
    for name, raw in vars(owner).items():
        found = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        if name[0] != "_" and (inspect.isfunction(found) or isinstance(found, property)) and found.__doc__:
            yield name, found


def signature(name: str, value: Any) -> str:
    """The call as its source writes it; of a class without ``__init__``, such as a dataclass, as Python tells it."""
    own = inspect.isclass(value) and not dataclasses.is_dataclass(value)  # a dataclass's is built, without a source
    target = vars(value).get("__init__", value) if own else value
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(target)))).body[0]
    except (OSError, TypeError, SyntaxError):
        node = None
    if isinstance(node, ast.FunctionDef):
        back = f" -> {ast.unparse(node.returns)}" if node.returns and not inspect.isclass(value) else ""
        return wrapped(name, arguments(node.args), back)
    try:
        told = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return name
    kinds = fields(node) if isinstance(node, ast.ClassDef) else {}
    return wrapped(name, [plain(one, kinds.get(one.name)) for one in told], "")


def fields(owner: ast.ClassDef) -> dict[str, str]:
    """The annotations of a class, as its source writes them."""
    found = (node for node in owner.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    return {ast.unparse(node.target): ast.unparse(node.annotation) for node in found}


def plain(parameter: inspect.Parameter, kind: str | None) -> str:
    """A parameter with its annotation as it is written, or without one."""
    text = str(parameter.replace(annotation=inspect.Parameter.empty))
    written, equal, default = text.partition("=")
    return text if kind is None else f"{written}: {kind}" + (f" = {default}" if equal else "")


def arguments(given: ast.arguments) -> list[str]:
    """Every argument with its annotation and default, without ``self`` and ``cls``."""
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    found = [argument(*one) for one in zip(positional, defaults, strict=True) if one[0].arg not in ("self", "cls")]
    if given.vararg:
        found.append(f"*{argument(given.vararg, None)}")
    elif given.kwonlyargs:
        found.append("*")
    found += [argument(*one) for one in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return found + ([f"**{argument(given.kwarg, None)}"] if given.kwarg else [])


def argument(one: ast.arg, default: ast.expr | None) -> str:
    """One argument."""
    kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    equal = " = " if kind else "="
    return one.arg + kind + (f"{equal}{ast.unparse(default)}" if default is not None else "")


def wrapped(name: str, arguments: list[str], back: str) -> str:
    """A call on one line if it fits, else an argument a line."""
    line = f"{name}({', '.join(arguments)}){back}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in arguments) + f"){back}"


def body(text: str) -> str:
    """A docstring as Markdown: sections, tables, literal blocks and examples."""
    text = re.sub(r":(?:func|class|mod|meth|data|attr):(?=`)", "", text)
    text = re.sub(r"(?<!`)``(?!`)", "`", text)
    text = re.sub(r"\s*# doctest: \+\w+", "", text)
    out: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        head = lines[0].removesuffix(":") if lines else ""
        if not lines:
            continue
        if lines[0].lstrip().startswith(">>>"):
            out.append(f"```pycon\n{textwrap.dedent(block)}\n```\n")
        elif head in HEADS:
            out.append(f"**{head}**\n\n{entries(textwrap.dedent(chr(10).join(lines[1:])))}\n")
        elif lines[0].startswith("==="):
            out.append(table(lines))
        else:
            runs = itertools.groupby(lines, lambda line: line.startswith("    "))
            out += [literal(run) if indented else re.sub(r"::$", ":", "\n".join(run)) + "\n" for indented, run in runs]
    return "\n".join(out)


def literal(lines: Iterable[str]) -> str:
    """An indented block: code where it calls something of recoup's or shows an error, else equations."""
    text = textwrap.dedent("\n".join(lines))
    if re.match(r"recoup\.|RecoupError: ", text):
        return f"```text\n{text}\n```\n"
    return equation(text) + "\n"


def entries(text: str) -> str:
    """The entries of a section as a list: ``name: what it is``, further lines indented."""
    found = re.split(r"\n(?!\s)", text)
    lines = []
    for one in found:
        joined = " ".join(line.strip() for line in one.splitlines())
        match = ENTRY.fullmatch(joined)
        lines.append(f"- `{match[1].replace('`', '')}`: {match[2]}" if match else f"- {joined}")
    return "\n".join(lines)


def table(lines: list[str]) -> str:
    """A simple table of reStructuredText as one of Markdown; its columns begin where the rules do."""
    starts = [match.start() for match in re.finditer(r"=+", lines[0])] + [None]
    rows: list[list[str]] = []
    for line in lines[1:]:
        if line.startswith("==="):
            continue
        cells = [line[begin:end].strip() for begin, end in itertools.pairwise(starts)]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{before} {cell}".strip() for before, cell in zip(rows[-1], cells, strict=True)]
    written = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    empty = "|" + " |" * len(rows[0])
    return "\n".join([empty, "|" + "---|" * len(rows[0]), *written]) + "\n"


if __name__ == "__main__":
    print(page(sys.argv[1]))
