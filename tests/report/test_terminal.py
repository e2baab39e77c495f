from hypothesis import given
from hypothesis import strategies as st

from recoup.report.chapters import MOST_LAYERS
from recoup.report.terminal import broken
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


def test_long_names_are_told_apart_at_eighty_columns():
    text = shown(results(layers=4, name="feature_extractor.encoder.0.pointwise_convolution"))
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    table = text[text.index("Layers without repair") :].partition("Cycles")[0]
    first, *names = (line[:20].rstrip() for line in table.splitlines()[4:])
    whole = "".join([first, *names]).replace(" ", "")
    assert all(f"feature_extractor.encoder.0.pointwise_convolution{i}" in whole for i in range(4))


@given(st.text("ab.", max_size=60), st.integers(1, 70))
def test_a_broken_name_is_whole_and_fits(name, width):
    lines = broken(name, width)
    assert "".join(line.strip() for line in lines) == name
    assert all(0 < len(line) <= max(width, 3) for line in lines)
    assert len(lines) == 1 or len(name) > width or not name


def test_a_name_breaks_after_its_dots():
    assert broken("layer1.0.conv1", 14) == ["layer1.0.conv1"]
    assert broken("layer1.0.conv1", 11) == ["layer1.0.", "  conv1"]
    assert broken("layer1.0.convolution", 11) == ["layer1.0.", "  convoluti", "  on"]


def test_markup_in_names_is_text():
    assert "[bold]x[/] on cifar10" in shown(results(name="[bold]x[/]"))


def test_without_layers():
    assert "Cycles" not in shown(results(layers=0))
