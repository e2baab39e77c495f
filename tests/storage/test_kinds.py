"""What a file of torch's is, told without running anything of it."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import recoup as rc
from recoup.models.weights import load_weights_
from recoup.storage.kinds import CHECKPOINT, COMPILED, EXPORTED, SCRIPT, WHOLE, kind_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, torch.compile's too

WRITERS = {
    SCRIPT: lambda model, path: torch.jit.save(torch.jit.trace(model, torch.zeros(1, 2)), path),
    EXPORTED: lambda model, path: torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), path),
    COMPILED: lambda model, path: torch.save(torch.compile(model), path),
    WHOLE: torch.save,
    CHECKPOINT: lambda model, path: torch.save(model.state_dict(), path),
}


@pytest.fixture(params=WRITERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    path = tmp_path / "file.pt2"
    WRITERS[kind](nn.Linear(2, 2), path)
    return path


def test_each_is_told(kind: str, path: Path) -> None:
    assert kind_of(path) == kind


def test_a_chip_that_is_none_is_called_what_it_is(kind: str, path: Path) -> None:
    with pytest.raises(rc.RecoupError) as refused:
        rc.load(path, nn.Linear(2, 2))
    assert f"{path} is {kind}, not written by recoup.save(model, ...)" in str(refused.value)


def test_weights_in_code_are_refused_with_the_way_to_them(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for kind, read in ((SCRIPT, "torch.jit.load"), (EXPORTED, "torch.export.load")):
        path = tmp_path / f"{read}.pt2"
        WRITERS[kind](model, path)
        with pytest.raises(rc.RecoupError, match=f"is {kind}, which is code; torch.save.{read}") as refused:
            load_weights_(nn.Linear(2, 2), path)
        remedy = str(refused.value).partition("; ")[2].partition(" writes")[0]
        torch.save(eval(remedy.removeprefix("torch.save(").partition(", ...")[0]), tmp_path / "weights.pt")  # noqa: S307
        assert torch.equal(load_weights_(nn.Linear(2, 2), tmp_path / "weights.pt").weight, model.weight)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"epoch": 3, "state_dict": {"w": torch.ones(1)}}, CHECKPOINT),
        ([torch.ones(1)], CHECKPOINT),
        (torch.ones(1), CHECKPOINT),
        (3, CHECKPOINT),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_checkpoints(tmp_path: Path, content: object, kind: str, protocol: int) -> None:
    torch.save(content, tmp_path / "w.pt", pickle_protocol=protocol)
    assert kind_of(tmp_path / "w.pt") == kind
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt", pickle_protocol=protocol)
    assert kind_of(tmp_path / "w.pt") == WHOLE


def test_what_is_not_known(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text").write_text("PK")
    (tmp_path / "empty").touch()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a/b", "c")
    for name in ("old.pt", "text", "empty", "other.zip", "none", "."):
        assert kind_of(tmp_path / name) is None


def damaged_in_a_name(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"data.pkl", b"\xff\xff\xff\xff.pkl"))


def damaged_when_packed(packing: int):
    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as plain:
            parts = {name: plain.read(name) for name in plain.namelist()}
        with zipfile.ZipFile(path, "w", packing) as packed:
            for name, content in parts.items():
                packed.writestr(name, content)
            info = packed.infolist()[0]
        content = bytearray(path.read_bytes())
        start = info.header_offset + 30 + len(info.filename)
        content[start + 12 : start + info.compress_size] = b"\xff" * (info.compress_size - 12)
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage", [damaged_in_a_name, damaged_when_packed(zipfile.ZIP_DEFLATED), damaged_when_packed(zipfile.ZIP_LZMA)]
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage) -> None:
    path = tmp_path / "weights.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    damage(path)
    assert kind_of(path) is None
    with pytest.raises(rc.RecoupError, match=r"weights\.pt cannot be read as a torch checkpoint; truncated or another"):
        load_weights_(nn.Linear(2, 2), path)
    with pytest.raises(rc.RecoupError, match=r"weights\.pt"):
        rc.load(path, nn.Linear(2, 2))
