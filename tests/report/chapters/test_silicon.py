"""Areas beside accuracy: measured from a study, drawn, and said where there are none."""

import pytest

pytest.importorskip("amaranth")

from typer.testing import CliRunner

import recoup.silicon
from recoup.cli.main import app
from recoup.errors import RecoupError
from recoup.lba import LBA
from recoup.policy import Policy
from recoup.report import render
from recoup.report.figures import VARIABLES
from recoup.report.summary import quoted_of, summarize
from recoup.silicon.measured import Measured
from recoup.study.measures.silicon import SEVERAL, SiliconResults, areas
from recoup.study.repairs import NONE
from tests.report.pages import EVIL, Page, plain_page, shown
from tests.silicon.test_verify import MUL
from tests.study.examples import results, with_accuracy

ONE = Policy({"conv1": "nbsmt-2t", "re:.*": "nbsmt-2t"}, name="one unit")
BOTH = Policy({"conv1": "nbsmt-2t", "re:.*": "nbsmt-4t"}, name="two units")
LARGER = MUL.replace(title="5 x 4", name="larger")


def built(config):
    """A multiplier for two threads beside a conventional one; none for four."""
    if config.threads == 4:
        raise RecoupError(f"no gates today: {EVIL}")
    return Measured.of(MUL.replace(work=2.0, baselines=lambda: {"larger": LARGER}))


@pytest.fixture(scope="module")
def study():
    return areas(results(), built)


def joined(study, made):
    return study.joined(made, quoted_of(summarize(made)))


def test_a_row_a_module_with_the_accuracy_that_the_verdict_quotes(study):
    found = joined(study, results())
    own, other = found.rows
    assert (own.title, own.module, own.counterpart, own.kind) == ("2 threads, S+A", "4 x 4", False, "NBSMT")
    assert own.nand2 == other.nand2 > 20
    assert other.per_operation == 2 * own.per_operation
    assert own.state == NONE  # nothing to repair, the verdict says
    assert own.reached != other.reached == pytest.approx(91.7)  # the counterpart stands at 8 bit
    assert list(found.left) == ["4 threads, S+A"]
    assert own.parts == {"multipliers": pytest.approx(own.nand2)}
    assert len(areas(results(), built, baselines=False).rows) == 1
    assert areas(results(), built, parts=False).rows[0].parts == {}


def test_a_counterpart_that_fails_leaves_the_figure_of_its_config():
    def area(self, *given, **named):
        if self.title == LARGER.title:
            raise RecoupError(f"takes longer than there is: {EVIL}")
        return Measured.area(self, *given, **named)

    class Failing(Measured):
        """A module whose counterpart cannot be measured."""

        def counterparts(self):
            return {"larger": Failing.of(LARGER)}

    Failing.area = area
    found = areas(results(), lambda config: Failing.of(built(config)))
    assert [row.module for row in found.rows] == ["4 x 4"]
    assert list(found.missing.values()) == [{"5 x 4": f"takes longer than there is: {EVIL}"}]
    left = joined(found, results()).left
    assert list(left) == ["5 x 4 beside 2 threads, S+A", "4 threads, S+A"]
    page = render(results(), found)
    assert Page(page).open == []
    assert "5 x 4 beside 2 threads, S+A has no area here: takes longer than there is" in page


def test_a_policy_of_one_unit_is_measured_and_one_of_several_is_called_so():
    made = results()
    recipe = made.recipe.model_copy(update={"policy": (ONE, BOTH)})
    made = made.model_copy(update={"recipe": recipe})
    found = joined(areas(made, built), made)
    measured = [row.title for row in found.rows if not row.counterpart]
    assert [name.split(" (")[0] for name in measured] == ["2 threads, S+A", "one unit"]
    told = {name.split(" (")[0]: reason for name, reason in found.left.items()}
    assert told["two units"] == SEVERAL
    assert set(told) == {"4 threads, S+A", "two units"}


def test_a_study_that_changed_has_its_own_accuracy_and_names_what_was_not_measured(study):
    changed = results()
    accuracy = tuple(row.model_copy(update={"top1": row.top1 - 10}) for row in changed.accuracy)
    lba = changed.recipe.model_copy(update={"configs": (*changed.recipe.configs, LBA.m7e4())})
    changed = with_accuracy(changed, accuracy, churn=60, recipe=lba)
    before, after = joined(study, results()), joined(study, changed)
    assert [row.reached - 10 for row in before.rows] == pytest.approx([row.reached for row in after.rows])
    assert "top1" not in study.model_dump_json()
    assert len(after.left) == len(before.left) + 1
    assert "has no area here: silicon.json does not have it" in render(changed, study)


def test_what_is_not_there_is_said_and_nothing_fails():
    def absent(config):
        raise RecoupError("silicon needs amaranth: pip install 'recoup[silicon]'")

    found = areas(results(), absent)
    assert found.rows == ()
    page = render(results(), found)
    assert "2 threads, S+A has no area here: silicon needs amaranth" in page
    assert 'id="silicon"' in page


def test_the_chapter(study):
    plain, page = plain_page(), render(results(), study)
    assert 'id="silicon"' not in plain
    assert page.count("<svg") == plain.count("<svg") + 2
    read = Page(page)
    assert read.open == []
    assert {tag for tag, _ in read.seen} & {"script", "img"} == set()  # of the reason too
    assert not any(colour in page for colour in VARIABLES)
    labels = [str(attributes["aria-label"]) for tag, attributes in read.seen if tag == "svg"]
    assert any(f"2 threads, S+A: {study.rows[0].per_operation:,.0f} NAND2 an operation" in label for label in labels)
    assert any(label.startswith("Area by kind of part, NAND2. 4 x 4: multipliers") for label in labels)
    assert "fill: none" in page[page.index('id="silicon"') :]  # the counterpart's open mark
    assert "Area beside conventional counterparts" in shown(results(), study)


def test_an_option_that_no_generator_has_is_refused(tmp_path, monkeypatch):
    results().save(tmp_path)
    monkeypatch.setattr(recoup.silicon, "build", lambda config, **options: told.append(options) or built(config))
    told = []
    done = CliRunner().invoke(app, ["silicon", "area", "--study", str(tmp_path), "--set", "registrs=none"])
    assert done.exit_code == 2
    assert "registrs='none': no such option; legal are registers, drain" in done.stderr
    assert not (tmp_path / "silicon.json").exists()
    done = CliRunner().invoke(app, ["silicon", "area", "--study", str(tmp_path), "--set", "registers=none"])
    assert done.exit_code == 0, done.stderr
    assert told == [{"registers": "none"}] * 2


def test_the_command_adds_the_chapter(tmp_path, monkeypatch):
    results().save(tmp_path)
    monkeypatch.setattr(recoup.silicon, "build", built)
    monkeypatch.setattr("recoup.silicon.generate.options_of", lambda _: {})
    done = CliRunner().invoke(app, ["silicon", "area", "--study", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    assert SiliconResults.load(tmp_path) == areas(results(), built)
    assert 'id="silicon"' in (tmp_path / "report.html").read_text()
    assert f"\nno area: 4 threads, S+A: no gates today: {EVIL}\n" in done.stderr
    assert "no area: 2 threads" not in done.stderr
    done = CliRunner().invoke(app, ["silicon", "verify", "--study", str(tmp_path)])
    assert "--study FOLDER: is of silicon area and silicon energy alone" in done.stderr
    (tmp_path / "silicon.json").write_text("{}")
    with pytest.raises(RecoupError, match="not the areas and energies of a study"):
        SiliconResults.load(tmp_path)


def test_a_study_that_has_no_area_at_all_is_no_success(tmp_path, monkeypatch):
    def absent(config):
        raise RecoupError("silicon needs amaranth: pip install 'recoup[silicon]'")

    results().save(tmp_path)
    monkeypatch.setattr(recoup.silicon, "build", absent)
    monkeypatch.setattr("recoup.silicon.generate.options_of", lambda _: {})
    done = CliRunner().invoke(app, ["silicon", "area", "--study", str(tmp_path)])
    assert done.exit_code == 2
    for name in ("2 threads, S+A", "4 threads, S+A"):
        assert f"no area: {name}: silicon needs amaranth: pip install 'recoup[silicon]'\n" in done.stderr
    assert done.stderr.endswith(f"recoup: silicon area: no hardware of {tmp_path} has one\n")
    assert "silicon needs amaranth" in (tmp_path / "report.html").read_text()
