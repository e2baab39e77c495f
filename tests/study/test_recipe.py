import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recoup.errors import RecoupError
from recoup.nbsmt.config import NBSMT
from recoup.study import Recipe
from recoup.study.repairs import states
from recoup.wings import cards
from tests.study.test_configs import CONFIGS

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
HARDWARE = CONFIGS.filter(lambda config: config.threads > 1)
RECIPES = st.builds(
    Recipe.build,
    st.fixed_dictionaries(
        # hardware in a layer map asks for that of the other layers
        {"model": TEXT, "data": TEXT, "configs": st.lists(HARDWARE, min_size=1, max_size=4, unique=True)},
        optional={
            "weights": st.none() | TEXT,
            "model_options": st.dictionaries(
                st.sampled_from(["num_classes", "norm", "x"]),
                st.none()
                | st.booleans()
                | st.integers(-(2**53), 2**53)
                | TEXT
                | st.floats(allow_nan=False, allow_infinity=False),
            ),
            "calibration": st.fixed_dictionaries(
                {},
                optional={
                    "images": st.integers(1, 10**6),
                    "augment": st.none() | st.booleans(),
                    "seeds": st.lists(st.integers(0, 2**40), min_size=1, max_size=4, unique=True),
                },
            ),
            "layers": st.dictionaries(TEXT, st.none() | CONFIGS, max_size=3),
            "states": st.lists(st.sampled_from(states(cards().values())), min_size=1, unique=True),
            "array": st.fixed_dictionaries({"rows": st.integers(1, 512), "columns": st.integers(1, 512)}),
            "out": TEXT,
        },
    ),
)
MINIMAL = "model: resnet20\ndata: digits\n"


@settings(deadline=None)
@given(RECIPES)
def test_yaml_round_trip(recipe):
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_defaults():
    recipe = Recipe.from_yaml(MINIMAL)
    assert recipe.configs == (NBSMT(threads=2), NBSMT(threads=4))
    assert recipe.calibration.seeds == (0, 1, 2)
    assert "paired" in recipe.states
    with pytest.raises(ValidationError):
        recipe.model = "other"  # type: ignore[misc]


def test_layers_and_configs_are_objects():
    recipe = Recipe.from_yaml(MINIMAL + "layers: {fc: null, 're:layer1.*': nbsmt-2t}\nconfigs: [nbsmt-4t]\n")
    assert recipe.layers == {"fc": None, "re:layer1.*": NBSMT(threads=2)}
    assert yaml.safe_load(recipe.to_yaml())["configs"] == [repr(NBSMT(threads=4))]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: digits\n", "r.yaml: model: missing"),
        (MINIMAL + "sedes: 3\n", r"r.yaml, line 3: sedes: unknown field; legal are model, .*calibration"),
        (MINIMAL + "weigths: x\n", r"line 3: weigths: unknown field; did you mean weights\?"),
        (MINIMAL + "calibration:\n  image: 3\n", r"line 4: calibration.image: unknown field; did you mean images\?"),
        (MINIMAL + "calibration:\n  images: many\n", "line 4: calibration.images: .*integer.*'many'"),
        (MINIMAL + "calibration: {images: 0}\n", "line 3: calibration.images: .*greater than or equal to 1; got 0"),
        (MINIMAL + "calibration: {images: 3.5}\n", "calibration.images"),
        (MINIMAL + "calibration: {images: true}\n", "calibration.images"),
        (MINIMAL + "calibration: {seeds: [1, 1]}\n", r"calibration: seeds \[1, 1\] must differ"),
        (MINIMAL + "calibration: {seeds: []}\n", "calibration.seeds"),
        (MINIMAL + "configs:\n  - nbsmt-2t\n  - NBSMT(threads=3)\n", "line 5: configs.1: .*threads must be 1, 2 or 4"),
        (MINIMAL + "configs: [NBSMT(threads=4, policy='S')]\n", "line 3: configs.0: .*double quotes"),
        (MINIMAL + "configs: [nbsmt-2t, NBSMT(threads=2)]\n", "configs: the same one is given twice"),
        (MINIMAL + "configs: [NBSMT(threads=1)]\n", "one thread is the 8-bit baseline"),
        (MINIMAL + "states: [pared]\n", "states.0: state 'pared': must be one of .*'paired'"),
        (MINIMAL + "layers: {fc: 4}\n", "layers.fc: .*a preset"),
        (MINIMAL + "layers: [fc]\n", "layers: "),
        (MINIMAL + "layers: {fc: lba-m7e4}\n", "configs: missing: the layer map has hardware"),
        (MINIMAL + "device: tpu\n", "device: .*'tpu'"),
        (MINIMAL + "model_options: {weights: x}\n", "model_options: 'weights' is not for the factory"),
        (MINIMAL + "data: mnist\n", "line 3: 'data' is given twice"),
        (MINIMAL + "calibration: {images: 3\n", "r.yaml, line 4: not YAML, or cut off"),
        (MINIMAL + "weights: 'res\n", "not YAML, or cut off"),
        ("", "r.yaml: empty, not a recipe"),
        ("just words", "a str, not a recipe"),
        ("[1, 2]", "a list, not a recipe"),
        ("a: &x [1]\nb: *y\n", "line 2: not YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "line 1: not YAML"),
        ("\x00\x01", "r.yaml: not YAML"),
        ("a: " + "[" * 30 + "]" * 30, "nested too deep"),
        ("a: " + "[" * 5000, "r.yaml"),
        ("a: 2026-99-99", "r.yaml"),
    ],
)
def test_bad_recipes_name_file_line_and_field(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    with pytest.raises(RecoupError, match=told) as error:
        Recipe.load("r.yaml")
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecoupError, match="no such file"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RecoupError, match="cannot be read"):
        Recipe.load(tmp_path)
    binary = tmp_path / "weights.pt"
    binary.write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(RecoupError, match="not a text file"):
        Recipe.load(binary)
    binary.write_bytes(b"a" * (1 << 21))
    with pytest.raises(RecoupError, match="larger than 1 MiB"):
        Recipe.load(binary)


@settings(deadline=None)
@given(RECIPES, st.data())
def test_a_truncated_recipe_is_refused_or_a_recipe(recipe, data):
    text = recipe.to_yaml()
    cut = data.draw(st.integers(0, len(text)))
    with contextlib.suppress(RecoupError):
        assert isinstance(Recipe.from_yaml(text[:cut], "r.yaml"), Recipe)


def test_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    changes = [
        "calibration.images=64",
        "weights=w.pt",
        "configs=[nbsmt-4t]",
        "layers.layer1.0.conv1=null",
        "test.limit=9",
    ]
    recipe = Recipe.load(path, changes)
    assert recipe.calibration.images == 64
    assert recipe.weights == "w.pt"
    assert recipe.configs == (NBSMT(threads=4),)
    assert recipe.layers == {"layer1.0.conv1": None}
    assert recipe.test.limit == 9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("images", "must be key=value"),
        ("=3", "must be key=value"),
        ("calibration.image=3", "calibration.image: unknown field"),
        ("calibration.images=[", "not a YAML value"),
        ("model.name=x", "no such field"),
        ("calibration.images=-1", "calibration.images: "),
    ],
)
def test_bad_overrides(tmp_path, change, told):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(RecoupError, match=told):
        Recipe.load(path, [change])


def test_identity_is_what_decides_a_number():
    recipe = Recipe.from_yaml(MINIMAL)
    same = ["calibration.seeds=[9]", "configs=[nbsmt-2t]", "out=x", "cpu_threads=1", "states=[paired]"]
    other = ["calibration.images=9", "data=mnist:x", "layers.fc=null", "test.limit=1", "calibration.augment=true"]

    def changed(change: str) -> Recipe:
        key, _, value = change.partition("=")
        parts = key.split(".")
        values = recipe.model_dump(mode="json")
        (values[parts[0]] if parts[1:] else values)[parts[-1]] = yaml.safe_load(value)
        return Recipe.build(values)

    assert all(changed(change).identity() == recipe.identity() for change in same)
    assert all(changed(change).identity() != recipe.identity() for change in other)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True))


@pytest.mark.parametrize("text", [BOMB, "model: &m [*m]", "model: &m digits_net\nout: *m"])
def test_aliases_are_refused_before_they_unfold(text):
    with pytest.raises(RecoupError, match="aliases are not read"):
        Recipe.from_yaml(text)


@pytest.mark.parametrize("field", ["model", "data", "out", "weights"])
def test_a_nul_in_a_text_is_refused(field):
    with pytest.raises(RecoupError, match=f"{field}: .*holds a NUL"):
        Recipe.build({"model": "digits_net", "data": "digits", field: "a\0b"})


@pytest.mark.parametrize("value", ["[" * 3000, "&m [*m]", "&a [x, *a]"])
def test_hostile_values_of_set_are_refused(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: digits_net\ndata: digits\n")
    with pytest.raises(RecoupError, match=r"nested too deep|aliases are not read"):
        Recipe.load(path, [f"out={value}"])
