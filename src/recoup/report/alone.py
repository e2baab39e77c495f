"""A page for studies with results of their own, where no recipe's results stand around them."""

from collections.abc import Sequence
from pathlib import Path

from recoup.report.chapters import Study, parts_beside
from recoup.report.html import FILE, STYLE, _environment, _sections
from recoup.storage.files import write_atomically

PAGE = Path(__file__).with_name("alone.html.j2")


def write_alone(folder: Path, heading: str, meta: str, studies: Sequence[Study]) -> Path:
    """Write report.html with the chapters and verdicts of some studies, whole or not at all."""
    parts = parts_beside(studies)
    page = (
        _environment()
        .get_template(str(PAGE))
        .render(
            css=STYLE.read_text("utf-8"),
            heading=heading,
            meta=meta,
            verdicts=[text for chapter, study in parts for text in chapter.verdicts(study)],
            beside=_sections(parts),
        )
    )
    write_atomically(folder / FILE, page)
    return folder / FILE
