import pytest

from recoup.report import render
from recoup.report.chapters.nbsmt import CHAPTER, all_cycles, cycles_of
from recoup.report.words import won_back
from tests.report.pages import shown, verdicts
from tests.study.examples import FOUR, norm_results, results


def test_cycles_add_up():
    cycles = cycles_of(results(layers=4), FOUR)
    assert cycles is not None
    assert (cycles.single, cycles.cycles) == (5 * 9216, 2 * 9216 + 3 * 9216 // 4)
    assert (cycles.emulated_single, cycles.emulated) == (4 * 9216, 9216 + 3 * 9216 // 4)
    assert cycles.throttled == 1
    assert cycles.speedup == pytest.approx(5 / (2 + 3 / 4))
    assert cycles.emulated_speedup == pytest.approx(4 / (1 + 3 / 4))
    assert cycles_of(results(layers=0), FOUR) is None
    assert all_cycles(results(layers=0)) == []


def test_the_first_row_of_cycles_is_one_thread():
    single, two, four = all_cycles(results(layers=4))
    assert (single.cycles, single.speedup, single.emulated_speedup, single.throttled) == (5 * 9216, 1, 1, 0)
    assert single.cycles == two.single == four.single


def test_layers_that_were_not_profiled_leave_the_cycles():
    made = results()
    made = made.model_copy(update={"tables": {"cycles": made.tables["cycles"]}})
    html = render(made)
    assert "Array cycles" in html
    assert "Layer by layer" not in html
    assert "Layers without repair" not in shown(made)
    assert "in 2.2x fewer cycles" in verdicts(made)[1]


def test_the_baseline_of_others_is_named_where_there_are_others():
    assert CHAPTER.terms(results())["won back"] == won_back("8 bit")
    assert CHAPTER.terms(norm_results())["won back"] == won_back("NB-SMT: 8 bit; others: float")
