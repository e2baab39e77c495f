"""What a package index shows of README: no link that leads nowhere, and every one absolute once there is an address."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def description(source: str | None) -> str:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.description(README, "1.2.3", source)


def targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_without_an_address_words_stay_and_links_go() -> None:
    text = description(None)
    assert all(target.startswith("https://") for target in targets(text))
    assert "Start leads from here" in text


def test_with_an_address_every_link_is_absolute_and_leads_to_a_file() -> None:
    text = description("https://example.org/recoup/")
    assert len(targets(text)) == len(targets(README))
    for target in targets(text):
        kind = re.fullmatch(r"https://example\.org/recoup/(blob|raw)/v1\.2\.3/(.+)", target)
        if kind is not None:
            assert (ROOT / kind[2]).exists(), target
            assert (kind[1] == "raw") == kind[2].endswith(".png")
        else:
            assert target in targets(README), target
