"""The package's description: README.md with links that hold wherever it is shown.

In the repository README's links are relative, so that they lead to the files beside it. A package index shows the text
alone: there a link begins with the address that ``[project.urls]`` of pyproject.toml calls ``Source``, at the tag of
the version. While the project states no address, a relative link becomes its text and a picture goes: a description
has no link that leads nowhere.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def description(text: str, version: str, source: str | None) -> str:
    """``text`` with every relative link under ``source`` at the tag ``v<version>``, or without them."""

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if source is None:
            return "" if picture else words
        return f"{picture}[{words}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return LINK.sub(link, text)


class Description(MetadataHookInterface):
    """Sets ``readme``, which pyproject.toml names as dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, object]) -> None:
        """Called by hatchling with the project's table."""
        root = Path(self.root)
        version = re.search(r'^__version__ = "(.+)"$', (root / self.config["version"]).read_text("utf-8"), re.M)
        assert version is not None
        urls = metadata.get("urls")
        source = urls.get("Source") if isinstance(urls, dict) else None
        text = description((root / "README.md").read_text("utf-8"), version[1], source)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
