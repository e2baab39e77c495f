"""Studies of mixed hardware: a layer map's wings are named, measured and compared as the mix that the network runs."""

import json
import re
from dataclasses import replace

import pytest

from recoup import wings
from recoup.errors import RecoupError
from recoup.grammar import parse_config
from recoup.lba import LBA
from recoup.lightnorm import LightNorm
from recoup.network.wing import FLOAT, STAGES, Repair
from recoup.recalibrate import PAIRED
from recoup.report import render, write_tables
from recoup.report.chapters import parts_of
from recoup.report.summary import summarize
from recoup.study import Results, State, run
from recoup.study.hardware import Hardware, references
from recoup.study.lab import Lab
from recoup.study.machine import cpu_threads
from recoup.study.repairs import meaning
from tests.report.pages import shown, verdicts
from tests.study.examples import FOUR, TWO, small_recipe

NORMS, LAST = {"re:features.(1|4|8|11)": "lightnorm-fp10"}, {"classifier": "LBA.biased(5, 4)"}
CASES = {
    "nbsmt-4t": ({**LAST, **NORMS}, ["4 threads, S+A (3 layers)", "M5E4 (10 bits)", "FP10 1-5-4"]),
    "lba-m7e4": ({"re:features.(3|7|10)": "nbsmt-4t"}, ["M7E4 (12 bits)", "4 threads, S+A (3 layers)"]),
    "lightnorm": ({"re:features.(3|7|10)": "nbsmt-2t"}, ["LightNorm", "2 threads, S+A (3 layers)"]),
}


@pytest.fixture(autouse=True)
def _one_thread():
    with cpu_threads(1):
        yield


@pytest.fixture(scope="module", params=CASES)
def studied(request, tmp_path_factory):
    folder, layers = tmp_path_factory.mktemp("mix"), CASES[request.param][0]
    return folder, run(small_recipe(folder, configs=[request.param], layers=layers), progress=False)


def test_a_mix_is_titled_as_a_mix_and_loses_against_float(studied, tmp_path):
    folder, results = studied
    (hardware,) = results.present
    assert hardware.mixed
    assert hardware.title.startswith("mix of ")
    for part in CASES[_named(results)][1]:
        assert part in hardware.title
    assert {row.config for row in results.accuracy} == {"float", hardware.name}
    summary = summarize(results)
    floating, bare = summary.line("float", State.NONE), summary.line(hardware.name, State.NONE)
    assert floating is not None
    assert bare is not None
    assert bare.loss is not None
    assert bare.loss.mean == pytest.approx(floating.reached.mean - bare.reached.mean)
    (said,) = verdicts(results)
    assert said.startswith(hardware.title + ": ")
    assert f"{floating.reached.mean:.2f} % in float" in said
    page = render(results)
    assert hardware.title in page
    assert "its baseline (float)" in page
    assert re.findall(r'scope="rowgroup"[^>]*>([^<]*)<', page) == ["float", hardware.title]
    assert "at 8 bit" not in said
    assert hardware.title in " ".join(shown(results, width=300).split())
    assert Results.load(folder) == results
    assert write_tables(results, tmp_path)


def test_the_tables_of_every_wing_present_are_measured(studied):
    _, results = studied
    (hardware,) = results.present
    own = {"NBSMT": ("layers", "cycles"), "LBA": ("units",), "LightNorm": ("traffic",)}
    wanted = {table for card in hardware.cards for table in own[card.config.__name__]}
    assert {table for table, rows in results.tables.items() if rows} == wanted
    assert len(parts_of(results)) == len(hardware.cards)
    if "layers" in wanted:
        assert [row.name for row in results.rows("layers")] == ["features.3", "features.7", "features.10"]
        assert "fewer cycles" in verdicts(results)[0]


def test_the_states_of_every_wing_present_are_measured_in_the_order_of_the_stages(studied):
    _, results = studied
    (hardware,) = results.present
    measured = list(dict.fromkeys(row.state for row in results.accuracy if row.config == hardware.name))
    wanted = {name for card in hardware.cards for name in card.default}
    # Its norms are batch norms.
    wanted -= {"recalibrated at 8 bit", "gain per feature", "gain per channel, rows alike"}
    assert measured[0] == State.NONE
    assert set(measured[1:]) == wanted
    places = [STAGES.index(repair.stage) for state in measured[1:] if (repair := hardware.repair(state))]
    assert places == sorted(places)
    assert ("bias correction" in wanted) == (NBSMT_CARD in hardware.cards)


NBSMT_CARD = wings.wing_of(FOUR, "test")


def _named(results: Results) -> str:
    (config,) = results.recipe.configs
    return next(name for name in CASES if parse_config(name) == config)


def test_a_uniform_config_with_layers_in_float_stays_plain(tmp_path):
    recipe = small_recipe(tmp_path, layers={"features.3": None}, states=["paired"], profile_images=0)
    (hardware,) = run(recipe, progress=False).present
    assert hardware == Hardware.plain(FOUR)
    assert (hardware.title, hardware.baseline.name) == ("4 threads, S+A", "8-bit")


def test_two_configs_of_one_wing_keep_their_baseline_and_say_both(tmp_path):
    recipe = small_recipe(tmp_path, layers={"features.3": "nbsmt-2t"}, states=["paired"], profile_images=0)
    results = run(recipe, progress=False)
    (hardware,) = results.present
    assert hardware.title == "mix of 4 threads, S+A (2 layers) and 2 threads, S+A (1 layer)"
    assert "8-bit" in {row.config for row in results.accuracy}


def test_a_config_that_the_map_leaves_no_layer_is_not_what_is_measured(tmp_path):
    layers = {"re:(features.(0|3|7|10)|classifier)": "LBA.biased(5, 4)"}
    recipe = small_recipe(tmp_path, configs=["lba-m7e4"], layers=layers, states=["gain per channel"], profile_images=0)
    (hardware,) = run(recipe, progress=False).present
    assert hardware.configs == [LBA.biased(5, 4)]
    assert hardware.title.startswith("M5E4 (10 bits)")


def test_one_thread_is_no_baseline_of_a_mix(tmp_path):
    with pytest.raises(RecoupError, match="one thread is the 8-bit baseline"):
        small_recipe(tmp_path, configs=["NBSMT(threads=1)"])
    recipe = small_recipe(tmp_path, configs=["NBSMT(threads=1)"], layers=LAST, states=["paired"], profile_images=0)
    assert run(recipe, progress=False).present[0].mixed


def test_results_of_an_older_recoup_do_not_pass_for_a_plain_config(studied, tmp_path):
    folder, _ = studied
    content = json.loads((folder / "results.json").read_text())
    content.pop("hardware")
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(RecoupError, match="did not keep what its layer map makes a mix of"):
        Results.load(tmp_path)


def test_what_a_mix_repairs_by_default_is_quoted_first():
    mix = Hardware.found(LBA.m7e4(), {"a": LBA.m7e4(), "b": FOUR})
    assert mix.quoted[0] == "gain + paired"
    assert "recalibrated at 8 bit" not in mix.quoted
    assert Hardware.found(FOUR, {"a": FOUR, "b": LightNorm()}).quoted[0] == "paired"
    assert Hardware.plain(FOUR).quoted == list(NBSMT_CARD.quoted)


def test_repairs_that_wings_call_alike_are_all_applied():
    done = []
    ways = [Repair("trim", "gain", "", "", lambda *_, way=way: done.append(way)) for way in ("one", "other")]
    cards = [wings.wing_of(LBA.m7e4(), "test"), wings.wing_of(LightNorm(), "test")]
    try:
        for card, way in zip(cards, ways, strict=True):
            wings.register(replace(card, repairs=(way, PAIRED), default=(), quoted=(), plan=(), plan_without_norms=()))
        mix = Hardware.found(LBA.m7e4(), {"a": LBA.m7e4(), "b": LightNorm()})
        assert [repair.name for repair in mix.repairs] == ["trim", "paired"]
        trim, paired = mix.repair("trim"), mix.repair("paired")
        assert trim is not None
        trim.apply(None, [])  # type: ignore[arg-type]
        assert done == ["one", "other"]
        assert paired is PAIRED
    finally:
        for card in (NBSMT_CARD, *cards):  # in the order in which they were
            wings.register(card)


def test_a_state_that_no_wing_of_a_mix_has(tmp_path):
    recipe = small_recipe(tmp_path, layers=LAST, states=["recalibrated at 8 bit"])
    with pytest.raises(RecoupError, match=r"none of them exists for .*, here a mix of 4 threads"):
        run(recipe, progress=False)


def test_a_state_that_some_hardware_lacks_is_said(tmp_path):
    recipe = small_recipe(tmp_path, states=["paired", "gain per channel"], profile_images=0)
    results = run(recipe, progress=False)
    assert any("None of the hardware has these states" in note and "gain per channel" in note for note in results.notes)


def test_a_state_that_wings_do_differently_is_explained_for_each():
    def named(words):
        return Repair("one name", "bias", words, "does it", lambda model, _: model)

    every, both = list(wings.cards().values()), [wings.wing_of(config, "test") for config in (TWO, LBA())]
    try:
        for words, said in (
            (("Moves means. Here.", "Scales weights."), "NBSMT: Moves means. Here. LBA: Scales weights."),
            (("Moves means.", "Moves means."), "Moves means."),
            (("Moves means.", "Moves means. And more."), "Moves means. And more."),
        ):
            for card, own in zip(both, words, strict=True):
                wings.register(replace(card, repairs=(*card.repairs, named(own))))
            assert meaning("one name", [TWO, LBA()]) == said
            assert meaning("one name", [TWO]) == words[0]
    finally:
        for card in every:  # in the order in which they were
            wings.register(card)


def test_lab_refuses_what_takes_no_layer_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "accuracy", None)
    recipe = small_recipe(tmp_path / "new", layers={"classifier": "lightnorm"})
    with pytest.raises(RecoupError, match="classifier"):
        run(recipe, progress=False)
    assert not (tmp_path / "new").exists()


def test_references_of_plain_configs_are_their_cards():
    assert references([Hardware.plain(FOUR), Hardware.plain(TWO)]) == dict.fromkeys(
        map(repr, (FOUR, TWO)), NBSMT_CARD.baseline
    )
    assert references([Hardware.plain(LBA.m7e4())]) == {repr(LBA.m7e4()): FLOAT}


def test_calibrated_tensor_cores_leave_other_hardware_its_scales(tmp_path):
    """All of their layers are calibrated, the first and the last too, which other hardware leaves in float."""
    scaled = "TensorCore(scale='calibrated')"
    both = run(
        small_recipe(tmp_path / "both", configs=[scaled, "nbsmt-4t"], states=["float statistics"]), progress=False
    )
    alone = run(small_recipe(tmp_path / "alone", configs=["nbsmt-4t"], states=["float statistics"]), progress=False)

    def rows(results, config):
        return [(row.seed, row.top1) for row in results.accuracy if row.config == config]

    assert rows(both, repr(FOUR)) == rows(alone, repr(FOUR))
    assert [seed for seed, _ in rows(both, scaled)] == [3, 5]
