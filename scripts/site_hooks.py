"""What mkdocs asks while it builds the site: pages that are generated, links out of docs/, equations as MathML.

The reference comes from scripts/reference.py and scripts/command_line.py; nothing generated is kept in the repository.
A link of a page to a file of the repository that is no page (a log, a script) leads to a copy of that file in the site,
so that every figure's log is one click away, without a network.
"""

import importlib
import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
SCHEMA = "reference/policy.schema.json"
LOADED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\bsrc="https?:[^"]*|<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*https?:[^"]*"""
)
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def generated() -> dict[str, str]:
    """Every page and file that is not in docs/: its place in the site -> its text."""
    from scripts import command_line, reference

    from recoup.policy import Policy

    pages = {f"reference/{name}.md": reference.page(name) for name in reference.PAGES}
    pages["reference/command-line.md"] = command_line.page()
    pages[SCHEMA] = json.dumps(Policy.json_schema(), indent=1) + "\n"
    return pages | {f"project/{name}": moved((ROOT / name).read_text("utf-8")) for name in PROJECT}


def moved(text: str) -> str:
    """A file of the repository's root as a page of project/: its links lead where they led."""
    fence = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else LINK.sub(_from_root, part) for number, part in enumerate(fence))


def _from_root(link: re.Match[str]) -> str:
    target = link[2]
    if "://" in target:
        return link[0]
    return (
        link[1] + ("../" + target.removeprefix("docs/") if target.startswith("docs/") else "../../" + target) + link[3]
    )


def outside(page: str, target: str) -> str | None:
    """The file of the repository, outside docs/, that a link of a page of docs/ means; None: it means a page."""
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") or not (ROOT / path).is_file() else path


def linked(page: str, text: str) -> dict[str, str]:
    """The links of a page that lead out of docs/: as they are written -> the file of the repository."""
    found = {match[2]: outside(page, match[2]) for match in LINK.finditer(text)}
    return {written: path for written, path in found.items() if path is not None}


def _place(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return f"project/{path}" if path in PROJECT else f"files/{path}"


def on_files(files: Any, config: Any) -> Any:
    """Add what is generated, and what pages link to outside docs/."""
    kind = importlib.import_module("mkdocs.structure.files").File
    pages = generated()
    for place, text in pages.items():
        files.append(kind.generated(config, place, content=text))
    wanted: set[str] = set()
    for file in files.documentation_pages():
        text = pages.get(file.src_uri) or Path(file.abs_src_path).read_text("utf-8")
        wanted.update(path for path in linked(file.src_uri, text).values() if path not in PROJECT)
    for path in sorted(wanted):
        files.append(kind.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to the copies."""
    source = page.file.src_uri
    for written, path in linked(source, markdown).items():
        target = posixpath.relpath(_place(path), posixpath.dirname(source) or ".")
        markdown = markdown.replace(f"]({written}", f"]({target}")
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Nothing of a page is loaded from elsewhere: the site is read without a network."""
    if found := LOADED.search(output):
        raise RuntimeError(f"{page.file.src_uri} loads {found[0]}: the site is read without a network")
    return output


def mathematics(source: str, *_: Any, **__: Any) -> str:
    """A block of LaTeX as MathML, which browsers draw themselves."""
    convert = importlib.import_module("latex2mathml.converter").convert
    return f'<div class="math">{convert(source, display="block")}</div>'
