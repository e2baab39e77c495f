"""What scripts/dist_check.py concludes from what it finds; its installations are `make dist-check`'s."""

from pathlib import Path

import pytest
from scripts import dist_check

SDIST, WHEEL = "recoup-0.2.0.tar.gz", "recoup-0.2.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "found none; make dist"),
        ([SDIST], f"one source archive and one wheel are checked; found {SDIST};"),
        ([SDIST, WHEEL, "recoup-0.1.0.tar.gz"], f"found recoup-0.1.0.tar.gz, {SDIST}, {WHEEL};"),
        (["recoup-0.1.0.tar.gz", WHEEL], "are of two versions"),
    ],
)
def test_other_than_one_pair_is_refused(tmp_path: Path, names: list[str], message: str):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        dist_check.archives(tmp_path)


def test_one_pair(tmp_path: Path):
    for name in (SDIST, WHEEL):
        (tmp_path / name).touch()
    assert [path.name for path in dist_check.archives(tmp_path)] == [SDIST, WHEEL]


@pytest.mark.parametrize(
    ("version", "place", "left", "wrong"),
    [
        ("0.2.0", "home/lib/recoup/__init__.py", dist_check.MADE, []),
        ("0.1.0", "home/lib/recoup/__init__.py", dist_check.MADE, [f"{WHEEL} installs version 0.1.0"]),
        ("0.2.0", "elsewhere/recoup/__init__.py", dist_check.MADE, ["not from the environment"]),
        ("0.2.0", "home/lib/recoup/__init__.py", dist_check.MADE[:1], ["the demo left no report.html"]),
        ("", "", (), ["version nothing", "from nowhere", "no results.json", "no report.html"]),
    ],
)
def test_what_is_wrong_with_an_installation(tmp_path: Path, version, place, left, wrong):
    made = tmp_path / "empty" / "recoup-demo"
    made.mkdir(parents=True)
    for name in left:
        (made / name).touch()
    told = f"{version}\n{tmp_path / place if place else ''}\n"
    found = dist_check.faults(told, Path(WHEEL), tmp_path / "home", tmp_path / "empty")
    assert len(found) == len(wrong)
    assert all(part in text for part, text in zip(wrong, found, strict=True))


def test_nothing_leads_python_back_to_the_repository(monkeypatch: pytest.MonkeyPatch):
    for name in ("PYTHONPATH", "PYTHONHOME", "RECOUP_DATA", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "somewhere")
    monkeypatch.setenv("PIP_TIMEOUT", "60")
    found = dist_check.environment()
    assert not {"PYTHONPATH", "PYTHONHOME", "RECOUP_DATA", "VIRTUAL_ENV"} & found.keys()
    assert found["PIP_TIMEOUT"] == "60"
