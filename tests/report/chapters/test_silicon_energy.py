"""Energies beside accuracy: drawn, listed, and kept beside the areas that another command measures."""

import pytest

pytest.importorskip("amaranth")

from typer.testing import CliRunner

import recoup.silicon
from recoup.cli.main import app
from recoup.report import render
from recoup.report.summary import quoted_of, summarize
from recoup.study.measures import silicon_energy
from recoup.study.measures.silicon import Energies, EnergyRow, SiliconResults, areas
from tests.report.chapters.test_silicon import built
from tests.report.pages import EVIL, Page, shown
from tests.study.examples import FOUR, TWO, results


def row(module, image, counterpart=False):
    kind = {"config": repr(TWO), "kind": "NBSMT", "counterpart": counterpart, "module": module}
    return EnergyRow(**kind, image=image, gated=image / 2, operation=1000 * image, layers=18)


MEASURED = Energies(
    rows=(row("2T", 146.6), row("1T", 195.9, True)), left={repr(FOUR): f"no gates: {EVIL}"},
    images=8, lanes=64, lower_bound=False, tool="yosys 9", liberty=(("a.lib", "cd" * 32),),
)  # fmt: skip
ENERGY = SiliconResults(rows=(), left={}, tool="", energies=MEASURED)


def test_energies_have_the_accuracy_of_the_study():
    made = results()
    found = ENERGY.joined(made, quoted_of(summarize(made)))
    own, single = found.spent
    assert (own.title, own.module, own.image) == ("2 threads, S+A", "2T", 146.6)
    assert own.reached != single.reached == pytest.approx(91.7)  # the counterpart stands at 8 bit
    assert set(found.unspent) == {"4 threads, S+A"}
    alone = ENERGY.joined(None)
    assert [one.reached for one in alone.spent] == [None, None]
    assert set(alone.unspent) == {repr(FOUR)}


def test_the_chapter():
    page = render(results(), ENERGY)
    read = Page(page)
    assert read.open == []
    assert {tag for tag, _ in read.seen} & {"script", "img"} == set()  # of the reason too
    labels = [str(attributes["aria-label"]) for tag, attributes in read.seen if tag == "svg"]
    assert any(label.startswith("Accuracy by energy, NBSMT. 2 threads, S+A: 146.6 uJ an image") for label in labels)
    assert "fill: none" in page[page.index('id="silicon"') :]  # the counterpart's open mark
    text = " ".join("".join(read.text).split())
    assert "64 outputs drawn of every layer, operands of 8 test images, glitches included. yosys 9; a.lib" in text
    assert "4 threads, S+A has no energy here: no gates" in text
    assert "2 threads, S+A has no area here: silicon.json does not have it; `recoup silicon area --study`" in text
    told = shown(results(), ENERGY)
    assert "Energy beside conventional counterparts" in told
    assert "73.30" in told
    bound = ENERGY.model_copy(update={"energies": MEASURED.model_copy(update={"lower_bound": True})})
    assert "without glitches: a lower bound" in shown(results(), bound)


def test_areas_alone_say_how_energy_is_measured():
    page = render(results(), areas(results(), built))
    assert "Energy was not measured: <code>recoup silicon energy --study" in page
    assert "uJ an image" not in page


def call(*words):
    return CliRunner().invoke(app, ["silicon", *map(str, words)])


def test_neither_command_replaces_what_the_other_found(tmp_path, monkeypatch):
    results().save(tmp_path)
    asked = []
    monkeypatch.setattr("recoup.report.write_html", lambda _, folder, *studies: studies and folder / "report.html")
    monkeypatch.setattr(recoup.silicon, "build", built)
    monkeypatch.setattr("recoup.silicon.generate.options_of", lambda _: {})
    monkeypatch.setattr(silicon_energy, "energies", lambda *given, **named: asked.append((given, named)) or MEASURED)
    words = ("energy", "--study", tmp_path, "--liberty", "a.lib")
    assert call(*words).exit_code == 0
    assert SiliconResults.load(tmp_path) == ENERGY
    done = call("area", "--study", tmp_path, "--no-parts")
    assert done.exit_code == 0, done.stderr
    both = areas(results(), built, parts=False).model_copy(update={"energies": MEASURED})
    assert SiliconResults.load(tmp_path) == both
    done = call(*words, "--no-glitches", "--no-baselines")
    assert done.exit_code == 0, done.stderr
    assert SiliconResults.load(tmp_path) == both
    given, named = asked[-1]
    assert [str(path) for path in given[3]] == ["a.lib"]
    assert (named["glitches"], named["baselines"]) == (False, False)


def test_what_is_refused(tmp_path, monkeypatch):
    results().save(tmp_path)
    monkeypatch.setattr(recoup.silicon, "build", built)
    monkeypatch.setattr("recoup.silicon.generate.options_of", lambda _: {})
    assert "--liberty FILE is needed: plain gates have no energy" in call("energy", "--study", tmp_path).stderr
    done = call("energy", "--study", tmp_path, "--liberty", "a.lib", "--operands", "a.npz")
    assert (done.exit_code, "and --operands: the study has them" in done.stderr) == (2, True)
    (tmp_path / "silicon.json").write_text("{")
    done = call("energy", "--study", tmp_path, "--liberty", "a.lib")
    assert (done.exit_code, "not the areas and energies of a study" in done.stderr) == (2, True)
    done = call("area", "--study", tmp_path)  # it is what mends the file, and says what goes
    assert done.exit_code == 0, done.stderr
    assert "what it held is replaced" in done.stderr
