from recoup.report.chapters import MOST_LAYERS
from tests.report.pages import shown
from tests.study.examples import results


def test_it_fits_eighty_columns():
    text = shown(results())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for part in ("recalibrated on hardware", "91.03 - 92.14 t", "+1.35", "93%", "4 threads, S+A", "note: emulate_"):
        assert part in text


def test_many_layers_show_the_worst():
    text = shown(results(layers=40))
    assert f"the {MOST_LAYERS // 2} of 40 layers with the largest error" in text
    assert "conv39" in text
    assert "conv5 " not in text


def test_markup_in_names_is_text():
    assert "[bold]x[/] on cifar10" in shown(results(name="[bold]x[/]"))


def test_without_layers():
    assert "Cycles" not in shown(results(layers=0))
