import json
import sys

import pytest
import torch
from torch import nn

from recoup.emulate import emulate_
from recoup.errors import RecoupError
from recoup.lba import LBA
from recoup.lba.repair import ROWS_GAIN
from recoup.lightnorm import LightNorm
from recoup.network.emulated import emulated_layers
from recoup.network.norms import Statistics
from recoup.recalibrate import recalibrate_
from recoup.report import render
from recoup.study import Recipe, Results, State, run
from recoup.study.lab import Lab
from recoup.study.machine import cpu_threads
from recoup.study.repairs import FLOAT
from recoup.study.repairs import states as states_of
from recoup.study.runner import plan
from recoup.study.store import Store
from recoup.wings import wing_of
from tests.study.examples import BASELINE, FOUR, TWO, small_recipe


def numbers(results: Results) -> dict:
    """Results without what depends on when and how fast they were made."""
    content = results.to_dict()
    for row in [content, *content["accuracy"]]:
        row.pop("seconds")
    for name in ("date", "recipe"):
        content.pop(name)
    return content


@pytest.fixture(autouse=True)
def _one_thread():
    with cpu_threads(1):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, run(small_recipe(folder), progress=False)


def test_every_state_is_measured(finished):
    folder, results = finished
    states = [(row.config, row.state, row.seed) for row in results.accuracy]
    wanted = [(FLOAT, State.NONE, None)]
    for seed in (3, 5):
        wanted += [(BASELINE, State.NONE, seed), (BASELINE, "recalibrated at 8 bit", seed)]
        wanted += [(repr(FOUR), state, seed) for state in results.recipe.states if state.applies(FOUR)]
    assert states == wanted
    assert {row.name for row in results.rows("layers")} == {"features.3", "features.7", "features.10"}
    assert [row.name for row in results.rows("cycles") if not row.emulated] == ["features.0", "classifier"]
    assert all(row.cycles < row.single for row in results.rows("cycles") if row.emulated)
    assert {row.layer for row in results.shifts} == {"features.1", "features.4", "features.8", "features.11"}
    assert [note.partition(" Calibration leaves out the first and the last")[0] for note in results.notes] == [
        "In float under NBSMT: features.0, classifier."
    ]
    assert results.test_images == 40
    assert Results.load(folder) == results


def test_finished_work_is_not_done_again(finished, monkeypatch):
    folder, results = finished
    monkeypatch.setattr(Lab, "accuracy", None)
    monkeypatch.setattr(Lab, "profiled", None)
    assert numbers(run(small_recipe(folder), progress=False)) == numbers(results)


@pytest.mark.parametrize("after", [0, 1, 4, 8])
@pytest.mark.parametrize("stored", [True, False])
def test_interrupted_and_taken_up_again(tmp_path, monkeypatch, finished, after, stored):
    put = Store.put

    def interrupted(self, key, value, cpu):
        if stored or len(self) < after:
            put(self, key, value, cpu)
        if len(self) >= after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", interrupted)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            run(small_recipe(tmp_path), progress=False)
    assert "measurements are kept" in interrupt.value.__notes__[0]
    assert not (tmp_path / "results.json").exists()
    if after:
        assert len(json.loads((tmp_path / "measurements.json").read_text())["measurements"]) == after
    assert numbers(run(small_recipe(tmp_path), progress=False)) == numbers(finished[1])


def test_an_interrupt_within_a_measurement(tmp_path, monkeypatch, finished):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recoup.recalibrate.recalibrate_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small_recipe(tmp_path), progress=False)
    assert numbers(run(small_recipe(tmp_path), progress=False)) == numbers(finished[1])


def test_a_further_seed_keeps_the_others(finished, tmp_path, monkeypatch):
    one = small_recipe(tmp_path, calibration={"images": 32, "batch_size": 16, "seeds": [3]})
    run(one, progress=False)
    measured = []
    accuracy = Lab.accuracy
    monkeypatch.setattr(Lab, "accuracy", lambda *args: measured.append(args[-1]) or accuracy(*args))
    assert numbers(run(small_recipe(tmp_path), progress=False)) == numbers(finished[1])
    assert set(measured) == {5}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"calibration": {"images": 32, "batch_size": 16, "seeds": [5]}}, "leaves out seeds 3"),
        ({"states": ["paired"]}, "leaves out states float statistics, recalibrated at 8 bit"),
        ({"configs": ["nbsmt-2t"]}, r"leaves out configs NBSMT\(threads=4"),
    ],
)
def test_a_fuller_report_is_never_replaced_silently(finished, monkeypatch, change, told):
    folder, _ = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Lab, "accuracy", None)
    with pytest.raises(RecoupError, match=told):
        run(small_recipe(folder, **change), progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_another_study_in_the_folder(finished, tmp_path):
    run(small_recipe(tmp_path, states=["paired"], profile_images=0), progress=False)
    other = small_recipe(tmp_path, test={"limit": 20}, states=["paired"], profile_images=0)
    with pytest.raises(RecoupError, match=r"test\.limit was 40, is 20"):
        run(other, progress=False)
    results = run(other, overwrite=True, progress=False)
    assert results.test_images == 20
    assert results.rows("layers") == []
    assert [row.state for row in results.accuracy if row.config == repr(FOUR)] == ["paired", "paired"]


def quick(folder, **changes):
    return small_recipe(folder, states=["paired"], profile_images=0, **changes)


def test_results_that_are_not_this_studys_are_kept(tmp_path):
    (tmp_path / "results.json").write_text("precious")
    with pytest.raises(RecoupError, match=r"results\.json is from another study"):
        run(quick(tmp_path), progress=False)
    assert (tmp_path / "results.json").read_text() == "precious"
    (tmp_path / "report.html").write_text("stale")
    run(quick(tmp_path), overwrite=True, progress=False)
    assert not (tmp_path / "report.html").exists()


def test_the_users_own_recipe_is_kept(tmp_path):
    own = "# mine\n" + quick(tmp_path).to_yaml()
    (tmp_path / "recipe.yaml").write_text(own)
    run(quick(tmp_path), progress=False)
    assert (tmp_path / "recipe.yaml").read_text() == own
    with pytest.raises(RecoupError, match="leaves out configs"):
        run(quick(tmp_path, configs=["nbsmt-2t"]), progress=False)
    run(quick(tmp_path, configs=["nbsmt-2t"]), overwrite=True, progress=False)
    assert Recipe.load(tmp_path / "recipe.yaml").configs == (TWO,)


def test_every_measurement_starts_from_the_float_checkpoint(tmp_path):
    recipe = small_recipe(tmp_path, states=states_of([wing_of(FOUR, "test")]))
    with_history, fresh = Lab(recipe), {}
    states = recipe.states
    for state in states:
        fresh[state] = Lab(recipe).accuracy(FOUR, state, 3)
    for state in [*states, *reversed(states)]:
        assert with_history.accuracy(FOUR, state, 3) == fresh[state]


def test_the_models_statistics_and_layers_come_back(tmp_path):
    lab = Lab(small_recipe(tmp_path))
    before, digest = Statistics.of(lab.model), lab.digest
    lab.accuracy(FOUR, "paired + bias", 3)
    lab.accuracy(None, State.NONE, 0)
    after = Statistics.of(lab.model)
    assert all(torch.equal(b, after.buffers[n][k]) for n, bs in before.buffers.items() for k, b in bs.items())
    assert emulated_layers(lab.model) == {}
    del lab.digest
    assert lab.digest == digest


def test_layer_maps_hold_for_baseline_and_config(tmp_path):
    recipe = small_recipe(tmp_path, layers={"features.3": "nbsmt-2t", "features.7": None})
    results = run(recipe, progress=False)
    assert {row.name: row.threads for row in results.rows("layers")} == {"features.3": 2, "features.10": 4}


def plain_net():
    """A network without BatchNorm, whose second convolution is grouped."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def test_a_network_without_norms_and_with_groups(tmp_path):
    results = run(small_recipe(tmp_path, model=f"{__name__}:plain_net"), progress=False)
    assert {row.state for row in results.accuracy} == {"float statistics", "bias correction"}
    assert "no BatchNorm" in results.notes[0]
    assert any("grouped" in note for note in results.notes)
    assert results.shifts == ()
    again = run(small_recipe(tmp_path, model=f"{__name__}:plain_net"), progress=False)
    assert again.notes == results.notes


def test_states_that_do_not_exist_without_norms(tmp_path):
    with pytest.raises(RecoupError, match="no BatchNorm, so only 'float statistics', 'bias correction' and"):
        plan(small_recipe(tmp_path, states=["paired"]), has_norms=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "resnet21"}, "no factory .resnet21."),
        ({"data": "nonsense"}, "legal are"),
        ({"weights": "no-such-file.pt"}, "no such file"),
        ({"layers": {"nothing": None}}, "matches no layer"),
        ({"calibration": {"images": 100_000}}, "100000|100,000"),
        ({"device": "cuda:77"}, "CUDA"),
        ({"model_options": {"classes": 3}}, "classes"),
        ({"model_options": {"num_classes": 3}}, "labels lie in 0..9, but the model has 3 classes"),
    ],
)
def test_bad_input(tmp_path, change, told):
    with pytest.raises(RecoupError, match=told):
        run(small_recipe(tmp_path, **change), progress=False)
    assert not (tmp_path / "results.json").exists()


def broken_factory():
    raise KeyError("no file of mine")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": f"{__name__}:broken_factory"}, "its factory failed: KeyError: 'no file of mine'"),
        ({"model": "resnet20"}, r"'resnet20' does not take the images of 'digits', \[1, 8, 8\] each: RuntimeError: "),
        ({"layers": {"nothing": None}}, "'nothing' matches no layer"),
        ({"calibration": {"images": 100_000}}, "100000|100,000"),
        ({"model_options": {"num_classes": 3}}, "labels lie in 0..9, but the model has 3 classes"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_the_first_measurement(tmp_path, monkeypatch, change, told):
    monkeypatch.setattr(Lab, "accuracy", None)
    with pytest.raises(RecoupError, match=told) as error:
        run(small_recipe(tmp_path / "new", **change), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()  # a refused run claims no folder


def test_threads_and_generator_are_left_alone(tmp_path):
    before = torch.get_num_threads(), torch.random.get_rng_state()
    run(small_recipe(tmp_path, states=["paired"], profile_images=0), progress=False)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert __name__ in sys.modules


def test_narrow_accumulators_beside_shared_multipliers(tmp_path):
    unit = LBA.biased(4, 3)
    results = run(small_recipe(tmp_path, configs=["nbsmt-4t", "LBA.biased(4, 3)"]), progress=False)
    rows = {(row.state, row.seed): row.top1 for row in results.accuracy if row.config == repr(unit)}
    assert set(rows) == {
        (state, 3 if state == State.NONE else seed)  # nothing is calibrated before the first repair
        for state in results.recipe.states
        if state.applies(unit) and state != ROWS_GAIN.name  # of networks without batch norms
        for seed in (3, 5)
    }
    assert {row.name for row in results.rows("units")} == {
        "features.0",
        "features.3",
        "features.7",
        "features.10",
        "classifier",
    }
    assert all(row.config == repr(unit) and row.bits == 8 and 0 < row.slope < 1.01 for row in results.rows("units"))
    assert Results.load(tmp_path) == results
    page = render(results)
    assert "M4E3 (8 bits), chunk 16" in page
    assert "gain per channel" in page


def test_norm_units_beside_shared_multipliers(tmp_path):
    norm = LightNorm()
    results = run(small_recipe(tmp_path, configs=["nbsmt-4t", "lightnorm"]), progress=False)
    measured = [(row.state, row.seed) for row in results.accuracy if row.config == repr(norm)]
    repaired = [(state, seed) for seed in (3, 5) for state in ("recalibrated on hardware", "paired")]
    assert measured == [(State.NONE, 3), *repaired]  # without repair no calibration image has a part in it
    assert [(row.name, row.channels, row.elements) for row in results.rows("traffic")] == [
        ("features.1", 16, 1024), ("features.4", 32, 2048), ("features.8", 32, 512), ("features.11", 64, 1024),
    ]  # fmt: skip
    assert all(
        row.config == repr(norm) and row.blocks * 288 == row.conventional * 61.5 for row in results.rows("traffic")
    )
    assert {row.layer for row in results.shifts if row.config == repr(norm)} == {
        row.name for row in results.rows("traffic")
    }
    assert {row.config for row in results.rows("cycles")} == {repr(FOUR)}
    assert Results.load(tmp_path) == results
    page = render(results)
    assert "LightNorm, FP10 1-5-4, blocks of 4" in page
    assert "4.7x less batch norm traffic" in page


def test_paired_statistics_of_a_norm_unit_are_the_librarys(tmp_path):
    lab = Lab(small_recipe(tmp_path, configs=["lightnorm"]))
    lab._prepare(LightNorm(block=16), "paired", 3)
    mine = Statistics.of(lab.model)
    lab._reset()
    emulate_(lab.model, LightNorm(block=16))
    recalibrate_(lab.model, lab.drawing.images(3).batches(16, augment=True, seed=3), "paired")
    after = Statistics.of(lab.model)
    assert all(torch.equal(b, after.buffers[n][k]) for n, bs in mine.buffers.items() for k, b in bs.items())


@pytest.mark.parametrize("config", ["nbsmt-4t", "lba-m7e4", "lightnorm-fp10"])
def test_a_layer_map_that_mixes_hardware(tmp_path, config):
    layers = {"features.1": "lightnorm-range", "features.3": "nbsmt-2t", "features.4": None}
    recipe = small_recipe(tmp_path, configs=[config], layers=layers, states=["paired"], profile_images=0)
    results = run(recipe, progress=False)
    kind = type(results.recipe.configs[0])
    lab = Lab(recipe)
    lab._prepare(results.recipe.configs[0], "paired", 3)
    configs = {name: layer.config for name, layer in emulated_layers(lab.model).items()}
    assert configs["features.1"] == LightNorm.range()
    assert configs["features.3"] == TWO
    assert "features.4" not in configs
    assert kind in {type(value) for value in configs.values()}
    assert [row.emulated for row in results.rows("traffic")] == [True, False, kind is LightNorm, kind is LightNorm]


def test_norm_units_without_norms_are_left_out(tmp_path):
    model = f"{__name__}:plain_net"
    recipe = small_recipe(tmp_path, model=model, configs=["nbsmt-4t", "lightnorm"], profile_images=0)
    results = run(recipe, progress=False)
    assert {row.config for row in results.accuracy} == {FLOAT, BASELINE, repr(FOUR)}
    assert any("these are left out: LightNorm()" in note for note in results.notes)
    assert len([text for text in render(results).split("<li>") if "threads, S+A:" in text]) == 1
    with pytest.raises(RecoupError, match="no norm that they take, so nothing is left"):
        plan(small_recipe(tmp_path, configs=["lightnorm"]), has_norms=False, has_work=lambda _: False)


def test_states_that_no_norm_unit_has(tmp_path):
    with pytest.raises(RecoupError, match=r"none of them exists for LightNorm\(\)"):
        plan(small_recipe(tmp_path, configs=["lightnorm"], states=["bias correction"]), has_norms=True)


ONE_SEED = {"images": 32, "batch_size": 16, "seeds": [3]}


def layer_norms_net():
    """A network whose only norms are layer norms."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))


def test_norm_units_under_layer_norms_alone(tmp_path):
    model = f"{__name__}:layer_norms_net"
    recipe = small_recipe(tmp_path, model=model, configs=["lightnorm"], calibration=ONE_SEED)
    results = run(recipe, progress=False)
    rows = [(row.config, row.state) for row in results.accuracy]
    assert rows == [
        (FLOAT, "float statistics"),
        ("LightNorm()", "float statistics"),
        ("LightNorm()", "gain per feature"),
    ]
    assert [note for note in results.notes if "left out" in note] == []
    page = render(results)
    assert "Norm traffic" in page
    assert "batch norm traffic" not in page.lower()
    assert "x less norm traffic in training" in page


def test_repairs_that_the_network_has_nothing_for_are_no_states(tmp_path):
    asked = ["float statistics", "gain per feature", "paired"]
    recipe = small_recipe(tmp_path, configs=["lightnorm"], states=asked, calibration=ONE_SEED)
    results = run(recipe, progress=False)
    assert [row.state for row in results.accuracy if row.config == "LightNorm()"] == ["float statistics", "paired"]
    assert "None of the hardware has these states, so they are left out: gain per feature." in results.notes
    assert [repair.name for repair in Lab(recipe).hardware(recipe.configs[0]).repairs] == [
        "recalibrated on hardware",
        "paired",
    ]
