import json

import pytest

from recoup.errors import RecoupError
from recoup.study import Results
from tests.study.examples import norm_results, results


def test_what_is_saved_is_loaded(tmp_path):
    saved = results()
    path = saved.save(tmp_path)
    assert Results.load(tmp_path) == saved
    assert Results.load(path) == saved


def test_results_json_is_plain_and_says_how_to_read_it(tmp_path):
    content = json.loads(results().save(tmp_path).read_text())
    assert content["schema_version"] == 1
    assert content["recipe"]["configs"][0] == "NBSMT(threads=2, policy='S+A', rounding='nearest', pairing='halves')"
    assert content["accuracy"][0] == {
        "config": "float", "state": "float statistics", "seed": None, "top1": 91.73, "top5": 99.6, "count": 10000,
        "seconds": 2.5,
    }  # fmt: skip
    assert content["layers"][0]["weight_shape"] == [16, 16, 3, 3]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema_version": 2}, "schema_version 2, expected 1"),
        ({"schema_version": None}, "schema_version None"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"accuracy": [{"config": "float"}]}, "accuracy.0.state: Field required"),
        ({"seconds": "long"}, "seconds: "),
        ({"recipe": {"model": "x", "data": "y", "configs": ["nonsense"]}}, "recipe.configs.0: .*nonsense"),
    ],
)
def test_results_that_are_not_ours(tmp_path, change, told):
    path = results().save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecoupError, match=told):
        Results.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00", "[" * 100_000])
def test_foreign_and_truncated_files(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(RecoupError, match=r"results.json: not "):
        Results.load(tmp_path)


def test_results_from_before_the_traffic_are_read(tmp_path):
    saved = results()
    path = saved.save(tmp_path)
    content = json.loads(path.read_text())
    assert not {"traffic", "units"} & content.keys()
    path.write_text(json.dumps(content))
    assert Results.load(tmp_path) == saved
    path.write_text(json.dumps(content | {"traffic": [], "units": []}))  # as written before tables were optional
    assert Results.load(tmp_path) == saved


def test_traffic_is_saved(tmp_path):
    saved = norm_results()
    saved.save(tmp_path)
    assert Results.load(tmp_path) == saved
    assert len(saved.rows("traffic")) == 8


def test_no_results(tmp_path):
    with pytest.raises(RecoupError, match=r"results.json: no such file"):
        Results.load(tmp_path)
