"""The newest state of a run: kept whole, read back, and no damaged or foreign one taken for it."""

import json
import os
import pickle

import pytest
import torch

from recoup.errors import RecoupError
from recoup.storage.statefile import Difference, StateFile, differences, readable, torch_bytes, torch_state

IDENTITY = {"lr": 0.1, "data": ("digits", 8), "layers": {"fc": "a", "conv": "b"}}


def encoded(state, identity):
    return json.dumps({"state": state, "of": identity})


def decoded(path):
    content = json.loads(path.read_text("utf-8"))
    return content["state"], content["of"]


def damaged(path, error):
    return f"{path.name} is damaged by {type(error).__name__}"


def foreign(path, different):
    return f"{path.name} differs in {different}"


def state_file(folder, identity=IDENTITY):
    return StateFile(folder / "state", identity, encoded, decoded, damaged, foreign)


def test_the_newest_state_is_read_back(tmp_path):
    assert state_file(tmp_path).read() is None
    for state in ({"step": 1}, {"step": 2, "much": "x" * 5000}, {"step": 3}):
        state_file(tmp_path).write(state)
        assert state_file(tmp_path).read() == state
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch, step):
    state_file(tmp_path).write(1)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if step == "fsync" else (type(tmp_path), "replace")), fail)
        with pytest.raises(KeyboardInterrupt):
            state_file(tmp_path).write(2)
    assert state_file(tmp_path).read() == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"lr": 0.2}, [Difference("lr", 0.1, 0.2)]),
        ({"data": ["digits", 9]}, [Difference("data", ["digits", 8], ["digits", 9])]),
        ({"layers": {"fc": "a", "conv": "c"}}, [Difference("layers.conv", "b", "c")]),
        ({"layers": {"fc": "a"}, "new": 1}, [Difference("layers.conv", "b", None), Difference("new", None, 1)]),
        ({"layers": None}, [Difference("layers", {"fc": "a", "conv": "b"}, None)]),
    ],
)
def test_another_run_is_refused_with_its_differences(tmp_path, change, expected):
    state_file(tmp_path).write(1)
    with pytest.raises(RecoupError) as caught:
        state_file(tmp_path, {**IDENTITY, **change}).read()
    assert str(caught.value) == f"state differs in {expected}"
    assert state_file(tmp_path).read() == 1


def test_an_entry_that_is_gone_is_a_difference(tmp_path):
    state_file(tmp_path).write(1)
    with pytest.raises(RecoupError, match=r"name='lr', before=0\.1, now=None"):
        state_file(tmp_path, {name: value for name, value in IDENTITY.items() if name != "lr"}).read()


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", "JSONDecodeError"), (b'{"state": 1', "JSONDecodeError"), (b"{}", "KeyError"), (b"[]", "TypeError"),
     (b"\xff", "UnicodeDecodeError"), (b"[" * 100_000, "RecursionError")],
)  # fmt: skip
def test_damaged_files_are_told(tmp_path, content, error):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(RecoupError, match=f"^state is damaged by {error}$") as caught:
        state_file(tmp_path).read()
    assert type(caught.value.__cause__).__name__ == error


def test_a_folder_in_its_place_is_damage(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(RecoupError, match="damaged by IsADirectoryError"):
        state_file(tmp_path).read()


def test_a_readers_own_sentence_and_a_mistake_of_ours_pass():
    def say(error):
        raise error

    for error in (RecoupError("mine"), KeyboardInterrupt(), AssertionError("a mistake")):
        with pytest.raises(type(error)) as caught:
            readable(lambda error=error: say(error), str)
        assert caught.value is error


def test_equal_identities_have_no_differences():
    assert differences({"a": {"b": 1}}, {"a": {"b": 1}}) == []
    assert differences({}, {}) == []


def test_torch_states_come_back_and_run_no_code(tmp_path):
    state = {"step": 3, "momentum": [torch.tensor([-0.0, 1.5], dtype=torch.bfloat16), None], "name": "x"}
    path = tmp_path / "state.pt"
    path.write_bytes(torch_bytes(state))
    again = torch_state(path)
    assert again["momentum"][0].dtype is torch.bfloat16
    assert again["momentum"][0].signbit().tolist() == [True, False]
    assert {**again, "momentum": again["momentum"][1:]} == {**state, "momentum": [None]}
    path.write_bytes(torch_bytes({"code": os.getcwd}))
    with pytest.raises(pickle.UnpicklingError):
        torch_state(path)
