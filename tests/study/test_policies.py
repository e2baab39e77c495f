"""Several chips in one study: one float baseline, calibration shared, ranked, and nothing measured twice."""

import json

import pytest
import yaml
from typer.testing import CliRunner

import recoup as rc
from recoup.cli.main import app
from recoup.errors import RecoupError
from recoup.report import render, write_tables
from recoup.report.ranking import ranked
from recoup.report.summary import summarize
from recoup.study import Recipe, Results, run
from recoup.study.lab import Lab
from recoup.study.runner import plan
from tests.report.pages import shown
from tests.study.examples import small_recipe, with_accuracy

A = rc.Policy({"re:features.(3|7)": "nbsmt-4t", "classifier": "LBA.biased(5, 4)"}, name="chip A")
B = rc.Policy({"re:features.(3|7|10)": "nbsmt-2t", "re:.*": None}, name="chip B")


def studied(folder, **changes):
    values = {"policy": [A, B], "configs": []} | changes
    return run(small_recipe(folder, **values), progress=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return studied(tmp_path_factory.mktemp("chips"))


def test_chips_are_measured_beside_one_float_network(found):
    assert {row.config for row in found.accuracy} == {"float", "chip A", "chip B"}
    assert sum(row.config == "float" for row in found.accuracy) == 1
    one, other = found.present
    assert one.title == "chip A (2 layers on 4 threads, S+A; 1 layer on M5E4 (10 bits), chunk 16)"
    assert other.title == "chip B (3 layers on 2 threads, S+A)"
    assert one.mixed
    assert other.mixed
    assert {row.config for row in found.rows("cycles")} == {"chip A", "chip B"}
    assert {row.config for row in found.rows("units")} == {"chip A"}


def test_a_number_is_that_of_the_verbs(found):
    """The bare hardware's accuracy, by hand."""
    lab = Lab(found.recipe)
    model, seed = rc.models.load("digits_net"), found.recipe.calibration.seeds[0]
    model.load_state_dict(lab.model.state_dict())
    drawn = lab.drawing.images(seed)
    images = drawn.batches(16, augment=lab.drawing.augmented(drawn), seed=seed)
    rc.calibrate_(model.eval(), images, {"re:features.(3|7|10)": True, "re:.*": None})
    rc.emulate_(model, A)
    rows = (row for row in found.accuracy if (row.config, row.state) == ("chip A", "float statistics"))
    bare = next(row for row in rows if row.seed == seed)
    assert rc.evaluate(model, lab.test.batches(20)).top1 == bare.top1


def test_costs_are_those_of_rc_cost(found):
    model = rc.models.load("digits_net")
    for row, policy in zip(found.costs, (None, A, B), strict=True):
        told = rc.cost(model, policy or {}, (1, 8, 8))
        assert (row.cycles, row.traffic, row.bits, row.macs) == (told.cycles, told.traffic, told.bits, told.macs)


def test_a_cell_library_adds_energy_and_area(tmp_path):
    """Recipe and command line: no measurement is made again, and what has neither is said."""
    pytest.importorskip("amaranth")
    from tests.test_dies import FLAT

    (tmp_path / "flat.lib").write_text(FLAT)
    library = {"liberty": str(tmp_path / "flat.lib"), "array": {"rows": 4, "columns": 4}}
    once = {
        "policy": [B],
        "calibration": {"images": 32, "batch_size": 16, "seeds": [3]},
        "states": ["float statistics"],
    }
    recipe = small_recipe(tmp_path / "study", configs=[], **once, **library)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert "liberty" not in small_recipe(tmp_path, configs=[], policy=[B]).to_yaml()
    found = run(recipe, progress=False)
    told = rc.cost(rc.models.load("digits_net"), B, (1, 8, 8), rc.nbsmt.Array(4, 4), liberty=tmp_path / "flat.lib")
    floating, own = found.costs
    assert (floating.energy, floating.area) == (None, None)
    assert (own.energy, own.area) == (told.energy, told.area)
    assert [n for n in found.notes if n.startswith("Costs of chip B: not in energy: features.0, ")]
    assert [n for n in found.notes if n.startswith("Costs of chip B: no hardware runs features.0, classifier and ")]
    assert Results.load(found.save(tmp_path)) == found
    write_tables(found, tmp_path)
    assert (tmp_path / "costs.csv").read_text().splitlines()[0] == "config,cycles,traffic,bits,macs,energy,area"
    assert f"{told.area / 1e6:.4g}" in " ".join(shown(found, width=200).split())
    assert "mm2" in render(found)
    with pytest.raises(RecoupError, match="liberty: is for the energy and area of policies"):
        small_recipe(tmp_path, liberty="flat.lib")
    with pytest.raises(RecoupError, match="is no file"):
        run(small_recipe(tmp_path / "other", configs=[], **once, liberty="missing.lib"), progress=False)


def test_another_chip_measures_itself_alone_and_calibration_is_shared(tmp_path, monkeypatch):
    calibrated, measured = [], []
    calibrate, accuracy = rc.calibrate_, Lab.accuracy
    monkeypatch.setattr("recoup.study.lab.calibrate_", lambda *a, **k: calibrated.append(a) or calibrate(*a, **k))
    monkeypatch.setattr(Lab, "accuracy", lambda self, *a: measured.append(a) or accuracy(self, *a))
    once = {"calibration": {"images": 32, "batch_size": 16, "seeds": [3]}, "states": ["float statistics", "paired"]}
    first = studied(tmp_path, policy=[A], **once)
    assert len(calibrated) == 1
    before = len(measured)
    same = rc.Policy({"features.3": "nbsmt-4t", "features.7": "nbsmt-4t", "classifier": "LBA.biased(5, 4)"}, "A again")
    second = studied(tmp_path, policy=[A, B, same], **once)
    assert len(calibrated) == 2
    assert [name.name for name, *_ in measured[before:]] == ["chip B", "chip B"]
    rows = {name: [r.top1 for r in second.accuracy if r.config == name] for name in ("chip A", "A again")}
    assert rows["chip A"] == rows["A again"]
    assert [row for row in second.accuracy if row.config in ("float", "chip A")] == list(first.accuracy)


def test_configs_and_chips_in_one_study(tmp_path):
    alone = run(small_recipe(tmp_path / "alone"), progress=False)
    both = studied(tmp_path / "both", configs=["nbsmt-4t"], policy=[A])
    uniform = [(r.config, r.state, r.seed, r.top1) for r in alone.accuracy]
    assert [found for r in both.accuracy if (found := (r.config, r.state, r.seed, r.top1))[0] != "chip A"] == uniform
    assert [row.config for row in both.costs] == ["float", repr(rc.NBSMT(4)), "chip A"]


def test_the_ranking_is_shown_everywhere(found, tmp_path):
    chips = ranked(found, summarize(found))
    assert [c.line.reached.mean for c in chips] == sorted((c.line.reached.mean for c in chips), reverse=True)
    page, text = render(found), " ".join(shown(found, width=200).split())
    assert "Chips by accuracy" in page
    assert "Chips by accuracy" in text
    assert 'aria-label="Accuracy of 2 chips on ' in page
    assert Results.load(found.save(tmp_path)) == found
    assert tmp_path / "costs.csv" in write_tables(found, tmp_path)
    for chip in chips:
        own = next(row for row in found.costs if row.config == chip.line.config)
        assert chip.cycles == own.cycles / found.costs[0].cycles


def test_a_beaten_chip_is_said(found):
    worse = [row.model_copy(update={"cycles": 10**9}) if row.config == "chip B" else row for row in found.costs]
    rows = [row.model_copy(update={"top1": 50.0}) for row in found.accuracy]
    chips = ranked(made := with_accuracy(found, rows, costs=tuple(worse)), summarize(made))
    assert [(chip.line.config, chip.mark, chip.same) for chip in chips] == [
        ("chip A", "", False),
        ("chip B", "(chip A is better)", True),
    ]
    assert "chip B (chip A is better)" in render(made)


@pytest.mark.parametrize(
    ("bare", "repaired", "quoted", "said"),
    [
        (94.0, 97.0, 94.0, "there is nothing to repair"),
        (92.0, 91.0, 92.0, "within noise"),
        (50.0, 91.0, 91.0, "brings back"),
        (50.0, 5.0, 5.0, "does not help"),
    ],
)
def test_the_ranking_quotes_the_line_of_the_verdict(found, bare, repaired, quoted, said):
    def top1(row):
        return 94.0 if row.config == "float" else bare if row.state == "float statistics" else repaired

    rows = tuple(row.model_copy(update={"top1": top1(row)}) for row in found.accuracy)
    made = with_accuracy(found, rows, untrained=False)
    summary = summarize(made)
    assert [said in text for text in summary.verdicts] == [True, True], summary.verdicts
    assert [chip.line.reached.mean for chip in ranked(made, summary)] == [quoted, quoted]


def test_another_map_of_the_same_name_does_not_replace_a_chip(tmp_path):
    once = {"calibration": {"images": 32, "batch_size": 16, "seeds": [3]}, "states": ["float statistics"]}
    before = studied(tmp_path, policy=[A], **once)
    other = rc.Policy(dict(B), name=A.name)
    with pytest.raises(RecoupError, match=rf"leaves out policies chip A \(layer map {A.digest[:8]}\)"):
        studied(tmp_path, policy=[other], **once)
    assert Results.load(tmp_path) == before


def test_progress_shows_a_policys_name_and_the_store_its_digest(tmp_path):
    (tasks, _), lab = planned(tmp_path)
    own = [task for task in tasks if task.config == A.name]
    assert own
    assert all(task.label.startswith("chip A | ") for task in own)
    assert all(task.key.startswith(f"policy {lab.hardware(A).digest} | ") for task in own)


def test_policies_alone_have_no_default_state_of_a_baseline(tmp_path):
    (_, notes), lab = planned(tmp_path)
    assert notes == []
    assert "paired" in lab.recipe.states
    beside = small_recipe(tmp_path, policy=[A], states=[])
    assert set(beside.states) - set(lab.recipe.states) == {"recalibrated at 8 bit"}


def planned(folder):
    lab = Lab(small_recipe(folder, policy=[A, B], configs=[], states=[]))
    return plan(lab.recipe, lab.has_norms, lab.hardware), lab


def test_a_recipe_holds_what_the_files_say(tmp_path):
    A.save(tmp_path / "a.yaml")
    (tmp_path / "nameless.yaml").write_text(yaml.safe_dump({"layers": {"classifier": "lba-m7e4"}}))
    recipe = small_recipe(tmp_path, configs=[], policy=[str(tmp_path / "a.yaml"), str(tmp_path / "nameless.yaml")])
    assert recipe.policy == (A, rc.Policy({"classifier": "lba-m7e4"}, "nameless"))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    one = Recipe.build({"model": "digits_net", "data": "digits", "policy": str(tmp_path / "a.yaml")})
    assert one.policy == (A,)
    assert one.configs == ()
    assert "policy" not in one.identity()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policy": [A, A]}, "the name 'chip A' is taken"),
        ({"policy": [rc.Policy({"classifier": "lba-m7e4"}, "8-bit")]}, "the name '8-bit' is taken"),
        ({"policy": [rc.Policy({"classifier": "lba-m7e4"})]}, "must have a name"),
        ({"policy": ["missing.yaml"]}, "cannot be read"),
        ({"policy": [{"name": "x", "layer": {}}]}, "a policy has 'layers'"),
        ({"policy": [], "configs": []}, "must name one or more, or policy must"),
        ({"policy": [A], "configs": [], "layers": {"classifier": None}}, "a policy names its layers itself"),
    ],
)
def test_bad_policies_are_refused(tmp_path, changes, told):
    with pytest.raises(RecoupError, match=told):
        small_recipe(tmp_path, **{"configs": [], **changes})


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"fc9": "lba-m7e4"}, "policy 'bad': .*'fc9' matches no layer"),
        ({"features.0": "lightnorm"}, "policy 'bad': .*cannot take layer 'features.0'"),
        (
            {"re:.*[.](1|4)": "nbsmt-2t"},
            "; NBSMT is no hardware for features.1, features.4: a BatchNorm2d is for Light",
        ),
        ({"re:features.*": None}, "policy 'bad': takes no layer of model 'digits_net'"),
    ],
)
def test_a_policy_that_does_not_fit_is_named_before_a_measurement(tmp_path, layers, told):
    with pytest.raises(RecoupError, match=told):
        studied(tmp_path, policy=[A, rc.Policy(layers, "bad")])
    assert not (tmp_path / "measurements.json").exists()


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    A.save("a.yaml")
    B.save("b.yaml")
    network = ["evaluate", "--model", "digits_net", "--data", "digits"]
    small = ["--calibration-images", "32", "--seeds", "3", "--limit", "40", "--profile-images", "0", "--out", "found"]
    chips = ["--policy", "a.yaml", "--policy", "b.yaml"]
    told = CliRunner().invoke(app, [*network, *small, *chips, "--json"])
    assert told.exit_code == 0, told.stderr
    assert [row["config"] for row in json.loads(told.stdout)["costs"]] == ["float", "chip A", "chip B"]
    again = CliRunner().invoke(app, ["run", "found/recipe.yaml"])
    assert again.exit_code == 0, again.stderr
    assert "Chips by accuracy" in again.stdout
    saved = [*small[:-1], "saved", "--policy", "a.yaml", "--save-chip", "a.safetensors"]
    made = CliRunner().invoke(app, [*network, *saved])
    assert made.exit_code == 0, made.stderr
    assert "a.safetensors holds chip A" in made.stderr
    refused = CliRunner().invoke(app, [*network, *chips, "--save-chip", "x"])
    assert "there are 2 configs: chip A, chip B" in refused.stderr
    beside = CliRunner().invoke(app, [*network, "--chip", "x", *chips])
    assert "leave out --policy" in beside.stderr
