"""Results -> one self-contained report.html, CSV tables and a terminal table."""

from recoup.report.html import render, write_html
from recoup.report.summary import Summary, summarize
from recoup.report.tables import write_tables

__all__ = ["Summary", "render", "summarize", "write_html", "write_tables"]
