import math

import pytest

from recoup.pipeline import Mitigation
from recoup.report import render, write_html
from recoup.report.chapters.pipeline import method_lines, setting_text, verdict
from recoup.report.figures import VARIABLES
from recoup.study.measures.pipeline import PipelineResults, PipelineRow, Setting
from tests.report.pages import EVIL, Page, plain_page, shown
from tests.study.examples import results

FINAL = {"SGDM": (0.08, 96.0), "PB": (0.32, 94.5), "SC": (0.08, 96.2), "LWP": (0.1, 95.8), "LWPv+SC": (0.06, 96.1)}


def chapter(lost: dict[str, tuple[int, ...]] | None = None, final=None) -> PipelineResults:
    """Made-up curves of one epoch, three seeds; ``lost``: seeds of a method that diverged."""
    rows = [
        PipelineRow(
            label=label,
            mitigation=repr(Mitigation()),
            seed=seed,
            losses=(2.0, 1.0, None, None) if seed in (lost or {}).get(label, ()) else (loss * (1 + seed),) * 4,
            accuracies=(50.0, 80.0, accuracy, accuracy + 0.1 * (seed - 1)),
        )
        for label, (loss, accuracy) in (final or FINAL).items()
        for seed in range(3)
    ]
    return PipelineResults(
        setting=Setting(epochs=1),
        data_name="digits",
        test_images=596,
        delays=tuple(range(30, -1, -2)),
        images=(300, 600, 900, 1201),
        rows=tuple(rows),
    )


def test_lines_are_means_over_seeds_and_factors_are_paired():
    lines = {line.label: line for line in method_lines(chapter())}
    sgdm, late = lines["SGDM"], lines["PB"]
    assert (sgdm.loss, sgdm.loss_std, sgdm.against) == (pytest.approx(0.16), pytest.approx(0.08), None)
    assert late.against == pytest.approx(4)  # in every seed
    assert late.accuracy == pytest.approx(94.5)
    assert late.accuracy_std == pytest.approx(0.1)
    assert (late.seeds, late.diverged) == (3, 0)


def test_diverged_runs_have_no_part_in_means():
    late, gone = (
        {line.label: line for line in method_lines(chapter({"PB": seeds}))}["PB"] for seeds in ((2,), (0, 1, 2))
    )
    assert (late.diverged, late.loss, late.against) == (1, pytest.approx(0.48), pytest.approx(4))
    assert (gone.diverged, gone.against, gone.loss_std) == (3, None, None)
    assert math.isnan(gone.loss)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (chapter(), "16 stages, batch 1: training loss 0.160 without delay becomes 0.640 with it; SC 0.160, LWP 0.200"),
        (chapter({"PB": (0, 1, 2)}), "delayed gradients make training diverge; SC 0.160"),
        (chapter({"SC": (0, 1, 2)}), "SC diverges, LWP 0.200"),
        (chapter(final={"SGDM": (0.3, 90.0), "PB": (0.3, 90.0)}), "0.600 with it; nothing to repair"),
        (chapter(final={"SGDM": (0.1, 90.0), "PB": (0.3, 90.0)}), "no mitigation was measured"),
        (chapter(final={"SC": (0.1, 90.0)}), "batch 1: SC loss 0.200, accuracy 90.00"),
        (chapter({"SGDM": (0, 1, 2)}), "SGDM diverged; PB loss"),
    ],
)
def test_verdicts(made, told):
    assert told in verdict(made).replace("\N{NO-BREAK SPACE}", " ")


def test_the_setting_in_words():
    text = setting_text(chapter())
    for part in ("16 stages on digits, batch 1, 1 epochs", "6.57e-05", "0.99671", "30 updates late, of the last 0"):
        assert part in text


@pytest.mark.slow
def test_the_report_has_the_chapter_only_where_there_is_one(tmp_path):
    plain, with_chapter = plain_page(), render(results(), chapter({"LWP": (1,)}))
    assert "Pipelined Backpropagation" not in plain
    page = Page(with_chapter)
    assert page.open == []
    assert with_chapter.count("<svg") == plain.count("<svg") + 1
    labels = [str(attributes["aria-label"]) for tag, attributes in page.seen if tag == "svg"]
    assert any("PB: loss 0.640, accuracy 94.50" in label for label in labels)
    assert not any(colour in with_chapter for colour in VARIABLES)
    for text in ("0.640 ± 0.320", ">4.00<", "1 of 3", "<dt>LWPv+SC</dt>", "without delay becomes 0.640"):
        assert text in with_chapter
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert write_html(results(), tmp_path, chapter()).read_text() == render(results(), chapter())


def test_labels_are_escaped():
    html = render(results(), chapter(final={EVIL: (0.3, 90.0), "$x": (0.2, 91.0)}))
    page = Page(html)
    assert {tag for tag, _ in page.seen} & {"script", "img"} == set()


def test_the_terminal_table_fits():
    text = shown(results(), chapter({"PB": (0, 1, 2)}))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "Pipelined Backpropagation: mean and standard deviation of 3 seeds" in text
    assert "PB diverged diverged 3 of 3" in " ".join(text.split())
    assert "LWPv+SC 0.120 ± 0.060 0.75 96.10 ± 0.10 0 of 3" in " ".join(text.split())
