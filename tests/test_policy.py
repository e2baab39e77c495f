"""Policies: ordered maps that are compared, kept in YAML and taken by emulate_."""

import json
import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import recoup as rc
from recoup.grammar import presets
from tests.networks import small_net

CONFIGS = st.none() | st.sampled_from([rc.LBA.m7e4(), rc.LBA.biased(4, 4), rc.LightNorm(), rc.NBSMT(threads=2)])
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


@given(st.dictionaries(NAMES, CONFIGS, max_size=5), st.text(max_size=8).filter(str.isprintable))
def test_round_trips(layers, name):
    policy = rc.Policy(layers, name)
    for again in (rc.Policy.from_yaml(policy.to_yaml()), pickle.loads(pickle.dumps(policy))):
        assert again == policy
        assert hash(again) == hash(policy)
        assert again.digest == policy.digest
        assert list(again.items()) == list(layers.items())


def test_order_and_name_count_and_only_the_map_decides_the_digest():
    one, other = rc.LBA.m7e4(), rc.LBA.biased(4, 4)
    assert rc.Policy({"a": one, "b": other}) != rc.Policy({"b": other, "a": one})
    assert rc.Policy({"a": one}, "x") != rc.Policy({"a": one})
    assert rc.Policy({"a": one}, "x").digest == rc.Policy({"a": one}).digest


def test_emulated_by_a_policy_and_read_back(tmp_path):
    policy = rc.Policy({"block1.conv1": None, "re:block.*conv.*": "LBA.biased(4, 4)"}, name="chip A")
    policy.save(tmp_path / "chip.yaml")
    model = rc.emulate_(small_net(), rc.Policy.load(tmp_path / "chip.yaml"))
    explicit = rc.Policy.of(model)
    assert "block1.conv1" not in explicit
    assert set(explicit.values()) == {rc.LBA.biased(4, 4)}
    with pytest.raises(rc.RecoupError, match="names its layers itself"):
        rc.emulate_(small_net(), policy, layers={})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: {a: [", "not YAML"),
        ("a: 1", "a policy has 'layers'"),
        ("layers: {fc: lba}", "must be a preset"),
        ("layers: {fc: &x lba-m7e4, fd: *x}", "no YAML aliases"),
        ("layers: {<<: {fc: null}}", "no YAML aliases"),
        ("layers: {fc: lba-m7e4, fc: null}", "'fc' is given twice"),
        ("layers: {}\nname: a\nlayers: {fc: null}", "'layers' is given twice"),
        ("name: 0\nlayers: {}", "name must be text"),
        ("name: 2026-99-99\nlayers: {}", "not YAML"),
        ("layers: {a: {b: {c: {d: 1}}}}", "a policy has 'layers'"),
        ("layers: [a]", "must be a map"),
        ("layers: {1: null}", "keys are names or"),
        ("\x00", "not YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, said):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(rc.RecoupError, match=rf"p\.yaml: .*{said}"):
        rc.Policy.load(tmp_path / "p.yaml")


def test_it_is_frozen():
    policy = rc.Policy({"a": None})
    with pytest.raises(AttributeError, match="frozen"):
        policy.name = "b"
    with pytest.raises(TypeError):
        policy["a"] = None  # type: ignore[index]


def test_a_key_that_is_no_pattern_is_refused_where_it_is_written():
    with pytest.raises(rc.RecoupError, match=r"Policy: 're:\(' is no regular expression"):
        rc.Policy({"re:(": None})


GOOD = [
    *(
        "layers: {}",
        "name: null\nlayers: {a: null}",
        "name: chip\nlayers:\n  re:a\\.b: nbsmt-2t",
        "layers: {a: ' lba-m7e4 '}",
    ),
    *(
        "layers: {a: 'LBA ( ) # all'}",
        'layers: {a: "LBA(\\n chunk=8)"}',
        "layers: {a: lba-hopper}",
        "layers: {'': null}",
    ),
    *(f"layers: {{a: {name}}}" for name in presets()),
    *(f"layers: {{a: {json.dumps(repr(config))}}}" for config in presets().values()),
]
BAD = [
    *(
        "layers: null",
        "layers: []",
        "{}",
        "[]",
        "a: 1",
        "layers: {}\nother: 1",
        "name: 0\nlayers: {}",
        "name: []\nlayers: {}",
    ),
    *("layers: {a: lba}", "layers: {a: 1}", "layers: {a: no}", "layers: {a: {}}", "layers: {a: []}", "layers: {a: ''}"),
    *("layers: {a: 'Float.lba(3, 4, bias=3)'}", "layers: {a: 'LBA('}", "layers: {a: 'LBA() or 1'}", "layers: {a: LBA}"),
    *("layers: {a: nbsmt-2t lba-m7e4}", "layers: {a: 'print(1)'}", "layers: {<<: {a: null}}"),
]


@pytest.mark.filterwarnings("ignore::recoup.RecoupWarning", "ignore:Please use rfc3986:DeprecationWarning")
@pytest.mark.parametrize(("text", "right"), [(text, True) for text in GOOD] + [(text, False) for text in BAD])
def test_the_schema_takes_what_is_loaded_and_refuses_what_is_refused(text, right):
    jschon = pytest.importorskip("jschon")  # which amaranth brings
    jschon.create_catalog("2020-12")
    values = yaml.load(text, Loader=yaml.BaseLoader if "<<" in text else yaml.SafeLoader)  # noqa: S506 -- texts, no merges
    assert jschon.JSONSchema(rc.Policy.json_schema()).evaluate(jschon.JSON(values)).valid is right
    if right:
        rc.Policy.from_yaml(text)
    else:
        with pytest.raises(rc.RecoupError):
            rc.Policy.from_yaml(text)
