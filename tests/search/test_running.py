"""A search from its recipe, on the command line: stages, budgets, shards, and what is refused."""

import csv
import json
import re

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from recoup.cli.main import app
from recoup.data import load as load_data
from recoup.errors import RecoupError
from recoup.models import chargpt
from recoup.search.recipe import SearchRecipe
from recoup.search.results import SearchResults
from recoup.search.running import source

RECIPE = {
    "model": "recoup.models:digits_net",
    "data": "digits",
    "space": {"re:features.0|classifier": ["float", "LBA.biased(7, 4)", "LBA.biased(3, 3)"]},
    "cost": "bits",
    "scoring": {"images": 32},
    "calibration": {"images": 32, "seeds": [0, 1]},
    "test": {"limit": 40},
    "probes": 2,
    "points": 3,
    "budget": 30.0,
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(RECIPE | {"out": "found"}))
    return tmp_path / "search.yaml"


def run(*arguments):
    result = CliRunner().invoke(app, ["search", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
def test_every_stage_and_another_budget_from_the_same_measurements(recipe, tmp_path):
    code, out, err = run("plan", recipe)
    assert code == 0, err
    planned = out.splitlines()
    assert planned[0] == "reference"
    assert f"{len(planned)} measurements, each independent of the others" in err
    code, out, err = run("score", recipe, "--shard", "0/2")
    assert code == 0
    assert "this shard's part is done" in err
    assert "run the other shards" in err
    code, out, _ = run("score", recipe)
    assert code == 0
    assert f"{len(planned)} measurements, " in out
    code, out, _ = run("front", recipe, "--json")
    front = SearchResults.model_validate(json.loads(out))
    assert front.floating is None
    assert front.points
    code, out, err = run("run", recipe)
    assert code == 0, err
    assert "digits_net on digits: within 30 points of float" in " ".join(out.split())
    found = SearchResults.load(tmp_path / "found")
    assert found is not None
    assert found.chosen is not None
    files = {path.name for path in (tmp_path / "found").iterdir()}
    assert {"scores.csv", "front.csv", "search.json", "report.html", "policy-00.yaml", "records"} <= files
    rows = list(csv.DictReader((tmp_path / "found" / "front.csv").read_text().splitlines()))
    assert len(rows) == len(found.points)
    records = len(list((tmp_path / "found" / "records").iterdir()))
    code, out, err = run("run", recipe, "--budget", "50")
    assert code == 0, err
    assert len(list((tmp_path / "found" / "records").iterdir())) == records
    assert "within 50 points of float" in " ".join(out.split())
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "features.0" in page


def test_the_same_budget_again_measures_nothing(recipe):
    run("run", recipe)
    _, _, err = run("run", recipe, "--budget", "5")
    assert "measured:" not in err


@pytest.mark.slow
def test_two_array_jobs_as_the_guide_has_them(recipe, monkeypatch):
    """Parts are counted from 0 and strided; score, then verify, then the report without a measurement."""
    labels = run("plan", recipe)[1].splitlines()
    for stage in ("score", "verify"):
        for index in (1, 0):
            slurm = {"ID": index, "COUNT": 2, "MIN": 0, "MAX": 1, "STEP": 1}
            for name, value in slurm.items():
                monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
            code, _, err = run(stage, recipe, "--shard", "auto")
            assert code == 0, err
            made = [line.partition(": ")[2] for line in err.splitlines() if " measured: " in line]
            assert made
            if stage == "score":
                assert made == labels[index::2]
    code, _, err = run("run", recipe)
    assert code == 0, err
    assert "measured:" not in err


def test_a_cell_library_on_the_command_line(recipe, tmp_path):
    pytest.importorskip("amaranth")
    from tests.test_dies import FLAT

    (tmp_path / "flat.lib").write_text(FLAT)
    priced = ("--set", "space={features.0: [NBSMT(threads=1), nbsmt-2t]}", "--set", "cost=[cycles, energy, area]")
    priced += ("--set", "array={rows: 2, columns: 2}", "--set", "out=priced", "--set", "probes=0")
    code, out, err = run("front", recipe, *priced, "--liberty", "flat.lib", "--limit", "area=9 mm2", "--json")
    assert code == 0, err
    found = SearchResults.model_validate(json.loads(out))
    assert found.costs == ("cycles", "energy", "area")
    assert found.liberty == ("flat.lib",)
    assert found.limits == {"area": 9e6}
    assert any(note.startswith("not in area: ") for note in found.notes)
    assert "Energies and areas: flat.lib." in (tmp_path / "priced" / "report.html").read_text()
    assert "energy needs a Liberty file" in run("plan", recipe, *priced)[2]
    assert "'missing.lib' is no file" in run("plan", recipe, *priced, "--liberty", "missing.lib")[2]


def test_keys_of_the_space_hold_dots(recipe):
    code, out, err = run("plan", recipe, "--set", "space.re:features.0|classifier=[float, nbsmt-2t]")
    assert code == 0, err
    assert "features.0 on 2 threads, S+A" in out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"space": {}}, "space"),
        ({"space": {"stem": ["nbsmt-9t"]}}, "must be a preset"),
        ({"metric": "accuracy"}, "metric"),
        ({"budget": -1}, "budget"),
        ({"points": 1}, "points"),
        ({"colour": "red"}, "unknown field"),
        ({"cost": []}, "cost"),
        ({"tuned": {"policy": {"name": "chip", "layers": {}}}}, "weights"),
        ({"tuned": {"policy": {"layers": {}}, "weights": "w.pt"}}, "must have a name"),
    ],
)
def test_bad_recipes_are_refused(change, told):
    with pytest.raises(RecoupError, match=told):
        SearchRecipe.build(RECIPE | change)


def test_bad_calls_are_refused(recipe):
    assert "the first argument must be one of plan, score" in run("find", recipe)[2]
    assert "must be i/n" in run("score", recipe, "--shard", "9")[2]
    assert "no such file" in run("plan", "missing.yaml")[2]
    assert "matches no layer" in run("plan", recipe, "--set", "space.fc9=[float]")[2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("cost=[watts]", "cost 'watts': must be one of"),
        ("limits={cycles: 0.5}", "limit on 'cycles': counted are bits"),
        ("limits={bits: 3 apples}", "a number with a unit of bits"),
        ("limits={bits: 1 bits}", "no policy keeps every limit"),
    ],
)
def test_costs_and_limits_are_refused_before_anything_is_measured(recipe, tmp_path, change, told):
    for stage in ("plan", "score", "run"):
        code, _, err = run(stage, recipe, "--set", change)
        assert code != 0
        assert told in " ".join(err.split())
        assert "measured:" not in err
    assert not (tmp_path / "found").exists()


def test_a_language_model_is_searched_on_windows_of_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = chargpt(characters=3, layers=1, width=8, heads=2, context=6)
    config = {"chars": list("abc"), "layers": 1, "d": 8, "heads": 2, "ctx": 6}
    torch.save({"state_dict": model.state_dict(), "config": config}, "gpt.pt")
    (tmp_path / "text.txt").write_text("abcacb" * 60)
    values = {
        "model": "chargpt",
        "weights": "gpt.pt",
        "data": "text:text.txt",
        "space": {"re:blocks.*(qkv|fc.)": ["float", "LBA.biased(3, 3)"]},
        "scoring": {"images": 12},
        "calibration": {"images": 8, "seeds": [0]},
        "test": {},
        "probes": 2,
        "cost": "bits",
        "points": 2,
        "budget": 9.0,
        "out": "found",
    }
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(values))
    code, out, err = run("run", "text.yaml", "--json")
    assert code == 0, err
    found = SearchResults.model_validate(json.loads(out))
    assert (found.quality, found.count) == ("nats", 5 * 6)
    assert found.chosen == 0
    assert found.data == "text.txt"
    assert found.sample == "window"
    other = ("--set", "model=resnet20", "--set", "weights=null")
    assert "whose checkpoint holds its alphabet" in run("plan", "text.yaml", *other)[2]
    assert "the network takes at most 6" in run("plan", "text.yaml", "--set", "context=7")[2]
    page = (tmp_path / "found" / "report.html").read_text()
    words = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S).split())
    assert "Costs are of one window" in words
    assert "chargpt on text.txt: within 9 nats of float" in words
    assert not re.search(r"top-?1|image|\d %(?! interval)", words.replace("95 %", ""))


def test_options_are_scored_on_what_the_test_leaves_of_its_split(recipe):
    made = SearchRecipe.load(recipe, [])
    loaded = source(made)
    scored, tested = (torch.cat([x for x, _ in batches]) for batches in (loaded.scoring(), loaded.test()))
    ((whole, _),) = load_data("digits", "test").batches(596)
    assert (len(scored), len(tested)) == (32, 40)
    assert all(any(torch.equal(x, y) for y in whole) for x in scored)
    assert not any(torch.equal(x, y) for x in scored for y in tested)
    assert not loaded.notes


def test_where_the_test_leaves_too_few_training_images_score_and_the_results_say_so(recipe, tmp_path):
    loaded = source(SearchRecipe.load(recipe, ["scoring.images=600"]))
    assert "scored on images of 'train'" in loaded.notes[0]
    with pytest.raises(RecoupError, match="40 of its images leave 556, where 600 are asked for"):
        source(SearchRecipe.load(recipe, ["scoring.images=600", "scoring.split=test"])).scoring()
    code, _, err = run("front", recipe, "--set", "scoring.split=train", "--set", "out=trained")
    assert code == 0, err
    found = SearchResults.load(tmp_path / "trained")
    assert found is not None
    assert any("trained on" in note for note in found.notes)


@pytest.mark.parametrize("purpose", ["scoring", "calibration"])
def test_nothing_is_scored_or_calibrated_on_that_is_tested_on(recipe, tmp_path, purpose):
    """Of a split that the data call otherwise too."""
    (images,) = load_data("digits", "train", limit=60, seed=0).batches(60)
    for number, (x, y) in enumerate(zip(*images, strict=True)):
        place = tmp_path / "folder" / ("train" if number < 20 else "val") / str(int(y) % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((x[0] - x.min()).mul(255 / (x.max() - x.min())).byte().numpy()).save(place / f"{number}.png")
    changes = ["data=imagefolder:folder,resize=8,crop=8", "test.limit=20", "test.seed=1", f"{purpose}.images=12"]
    made = SearchRecipe.load(recipe, [*changes, f"{purpose}.split=val"])
    loaded = source(made)
    drawn = loaded.scoring() if purpose == "scoring" else loaded.calibration(0)
    used, tested = (torch.cat([x for x, _ in batches]) for batches in (drawn, loaded.test()))
    assert (len(used), len(tested)) == (12, 20)
    assert not any(torch.equal(x, y) for x in used for y in tested)
    whole = source(SearchRecipe.load(recipe, [*changes[:1], f"{purpose}.images=12", f"{purpose}.split=val", "test={}"]))
    with pytest.raises(RecoupError, match=f"{purpose}.split: 'val' is tested on"):
        list(whole.scoring() if purpose == "scoring" else whole.calibration(0))


def test_a_walk_of_the_recipe_is_measured_written_and_taken_up(recipe, tmp_path):
    code, _, err = run("run", recipe, "--set", "refine=3", "--budget", "0", "--limit", "bits=0.995")
    assert code == 0, err
    found = SearchResults.load(tmp_path / "found")
    assert found is not None
    walked = [point for point in found.points if point.kind == "refined"]
    assert walked
    assert all(point.damage is not None for point in walked)
    records = len(list((tmp_path / "found" / "records").iterdir()))
    assert found.measurements == records
    code, _, err = run("run", recipe, "--set", "refine=3", "--budget", "0", "--limit", "bits=0.995")
    assert code == 0, err
    assert len(list((tmp_path / "found" / "records").iterdir())) == records
    code, _, err = run(
        "verify", recipe, "--set", "refine=3", "--budget", "0", "--limit", "bits=0.995", "--shard", "0/1"
    )
    assert code == 0, err
    again = SearchResults.load(tmp_path / "found")
    assert again is not None
    assert any("a shard does not walk" in note for note in again.notes)
