"""How report tests look at pages, terminal text and verdicts."""

from functools import cache
from html.parser import HTMLParser

from rich.console import Console

from recoup.report import render
from recoup.report.summary import summarize
from recoup.report.terminal import tables
from recoup.study import Results
from tests.study.examples import results

EVIL = """<script>alert("1")</script>&'"><img src=x onerror=alert(1)>"""
VOID = {"meta", "br", "use", "path", "rect", "link", "input", "img"}


class Page(HTMLParser):
    """Checks nesting and collects attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@cache
def plain_page() -> str:
    """The page of `results()`, rendered once a process: matplotlib takes seconds over its plots."""
    return render(results())


def shown(*made, width: int = 80) -> str:
    """What the terminal shows of results."""
    console = Console(width=width, record=True)
    with console.capture() as capture:
        console.print(tables(*made))
    return capture.get()


def verdicts(made: Results) -> list[str]:
    """In plain spaces."""
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in summarize(made).verdicts]
