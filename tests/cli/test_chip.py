"""Networks with their hardware in one file on the command line: written, read whole, read as the float network."""

import json
import shlex
from pathlib import Path

import pytest
import torch

import recoup as rc
from recoup.models import digits_net
from tests.cli.test_main import SMALL, recoup

DATA = shlex.split("--model digits_net --data digits --limit 40 --batch-size 20")
TRAIN = shlex.split("--model digits_net --data digits --limit 64 --test-limit 40 --batch-size 32 --epochs 1 --json")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(digits_net().state_dict(), "float.pt")


def test_from_a_study_to_a_chip_and_back():
    one = shlex.split("--model digits_net --data digits --calibration-images 32 --limit 40 --batch-size 20 --seeds 3")
    call = ("evaluate", *one, "--profile-images", 0, "--weights", "float.pt", "--config", "lba-m7e4")
    assert recoup(*call, "--out", "made", "--save-chip", "made/chip").stderr.count("made/chip holds") == 1
    said = recoup(*call, "--state", "gain per channel", "--save-chip", "chip.safetensors")
    assert "chip.safetensors holds LBA(), gain per channel" in said.stderr
    row = next(r for r in rc.study.Results.load("recoup-results").accuracy if r.state == "gain per channel")
    told = json.loads(recoup("evaluate", *DATA, "--chip", "chip.safetensors", "--json").stdout)
    assert told["chip"] == {"top1": row.top1, "top5": row.top5, "count": 40}
    assert told["layers"]["classifier"]["repairs"] == ["gain (correct_gain_, 32 images)"]
    shown = recoup("evaluate", *DATA, "--chip", "chip.safetensors").stdout
    assert f"{row.top1:.2f} % top-1" in shown
    assert told["lost"]["low"] < told["lost"]["points"] == told["float"]["top1"] - row.top1 < told["lost"]["high"]
    assert f"lost   {told['lost']['points']:+.2f} points (" in shown
    wrong, right = told["lost"]["wrong_now"], told["lost"]["right_now"]
    assert f"on the same images: {wrong} are wrong now, {right} right now" in shown
    flips = [r for r in rc.study.Results.load("recoup-results").flips if (r.state, r.against) == (row.state, "float")]
    assert [(r.lost, r.won) for r in flips] == [(wrong, right)]
    assert (told["lost"]["low"], told["lost"]["high"]) == pytest.approx((flips[0].low, flips[0].high))
    assert recoup("describe", "--chip", "chip.safetensors").stdout == recoup("describe", "chip.safetensors").stdout
    Path("chip.st").write_bytes(Path("chip.safetensors").read_bytes())  # whatever its name
    plain = rc.models.load("digits_net", "chip.safetensors").state_dict()
    assert rc.models.load("digits_net", "chip.st").state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in torch.load("float.pt").items())


def test_training_begins_with_a_chip_and_ends_with_one():
    model = rc.models.load("digits_net", "float.pt").eval()
    rc.lba.correct_gain_(rc.emulate_(model, rc.LBA.biased(5, 4)), [torch.rand(8, 1, 8, 8)])
    rc.save(model, "chip")
    done = recoup("train", *TRAIN, "--chip", "chip", "--one-stage", "--save-chip", "trained", "--out", "t")
    assert "emulated, before" in json.loads(done.stdout)["accuracy"]
    trained = rc.load("trained", "digits_net")
    assert rc.Policy.of(trained) == rc.Policy.of(model)
    assert trained.classifier.gain is not None
    assert torch.equal(
        trained.classifier.weight, rc.models.load("digits_net", "t/weights.safetensors").classifier.weight
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("evaluate DATA --chip c --config lba-m7e4", "leave out --config"),
        ("evaluate DATA --chip c --weights w --layers a=float", "leave out --weights, --layers"),
        ("evaluate DATA --chip c --seeds 7 --device cuda --out o", "leave out --seeds, --device, --out"),
        ("evaluate DATA --save-chip no/c", "--save-chip 'no/c': there is no folder 'no'"),
        ("evaluate DATA --save-recipe no/r.yaml", "--save-recipe 'no/r.yaml': there is no folder 'no'"),
        ("train TRAIN --save-chip no/c", "--save-chip 'no/c': there is no folder 'no'"),
        ("evaluate DATA --layers a=float --layers a=lba-m7e4", "--layers: 'a' is given twice"),
        ("evaluate DATA --wing os", "--wing 'os': registers no hardware"),
        ("train TRAIN --chip c --config lba-m7e4", "leave out --config"),
        ("evaluate SMALL --save-chip c --config lba-m7e4", "a file holds one network, and there are 2 configs"),
        ("evaluate DATA --chip none", "none: no such file"),
        ("evaluate DATA --chip float.pt", "float.pt is a torch checkpoint, not written by recoup.save"),
        ("describe", "name one file"),
        ("evaluate --model hf:none --data digits --chip hf:none", "none is no folder"),
        ("evaluate --model hf:. --data digits", "model 'hf:.'"),
    ],
)
def test_refusals(options, told):
    groups = {"DATA": DATA, "TRAIN": TRAIN, "SMALL": SMALL}
    words = [word for text in shlex.split(options) for word in groups.get(text, [text])]
    assert told in recoup(*words, code=2).stderr


def test_folders_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained("vit")
    x = torch.rand(3, 1, 8, 8)
    rc.emulate_(model, rc.LBA.m7e4())
    rc.lba.choose_exponents_(model, [x])
    rc.lba.correct_gain_(model, [x])
    expected = model(x).logits
    rc.save(model, "vit")
    assert Path("vit/recoup.safetensors").exists()
    assert torch.equal(rc.load("hf:vit").eval()(x).logits, expected)
    loaded = rc.load("vit", transformers.ViTForImageClassification(config)).eval()
    assert str(rc.describe(loaded)) == str(rc.describe(model))
    rest = shlex.split("--data digits --limit 20 --json")
    told = json.loads(recoup("evaluate", "--model", "hf:vit", "--chip", "hf:vit", *rest).stdout)
    assert told["float"]["count"] == 20
    assert any("attention" in name for name in told["layers"])


@pytest.mark.parametrize("kind", ["unknown", "vit"])
def test_code_in_a_folder_of_hugging_face_is_neither_run_nor_asked_about(monkeypatch, kind):
    pytest.importorskip("transformers")
    for module in ("builtins.input", "transformers.dynamic_module_utils.input"):
        monkeypatch.setattr(module, lambda *_: pytest.fail("asked"), raising=False)
    Path("evil").mkdir()
    Path("evil/evil.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Config: pass\n")
    words = {"model_type": kind, "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.Config"}}
    Path("evil/config.json").write_text(json.dumps(words))
    with pytest.raises(rc.RecoupError, match="hf:evil"):
        rc.models.load("hf:evil")
    assert not Path("ran").exists()
