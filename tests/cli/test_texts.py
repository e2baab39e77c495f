"""`recoup evaluate` and `recoup run` on language models: from a text to the report, in nats, and what is refused."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

import recoup as rc
from recoup.cli.main import app
from recoup.data.text import contexts
from recoup.evaluation import nats_per_token
from recoup.models import load_chargpt
from recoup.study import Results
from tests.texts import char_model, gpt2, save_tokenizer, tale

NARROW = "LBA.biased(3, 3)"
QUICK = ("--calibration-images", "16", "--seeds", "0,1", "--profile-images", "4", "--out", "out")
OF_IMAGES = re.compile(r"top-?[15]|image|accura(cy|te)|\d\N{NO-BREAK SPACE}%", re.IGNORECASE)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tale.txt").write_text(tale(600))
    return tmp_path


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code == 1:
        raise AssertionError(result.output) from result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def evaluate(*arguments) -> tuple[int, str, str]:
    return run("evaluate", *arguments)


def words(page: str) -> str:
    """What a page says: its texts, and the descriptions of its pictures; not the recipe, whose fields have names."""
    page = re.sub(r"<h3>recipe.yaml</h3>.*?</pre>|<style>.*?</style>", " ", page, flags=re.DOTALL)
    labels = re.findall(r'aria-label="([^"]*)"', page)
    return " ".join(" ".join([re.sub(r"<[^>]*>", " ", page), *labels]).split())


def per_window(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Nats of every window, without recoup's meters."""
    with torch.no_grad():
        losses = [F.cross_entropy(model(x).transpose(1, 2).double(), y, reduction="none") for x, y in batches]
    return torch.cat(losses).mean(1)


def test_a_character_model_from_options_to_the_report(folder):
    weights = char_model(folder, tale(600), steps=120)
    given = ("--model", "chargpt", "--weights", weights, "--data", "text:tale.txt", "--config", NARROW, *QUICK)
    code, out, err = evaluate(*given, "--config", "nbsmt-2t")
    assert code == 0, err
    model, alphabet = load_chargpt(weights)
    test = contexts("tale.txt", alphabet, model.context, first=0.9)
    found = Results.load(folder / "out")
    rows = {(row.config, row.state): row for row in found.nats}
    floating = rows["float", "float statistics"]
    assert floating.nats == pytest.approx(nats_per_token(model, test), rel=1e-6)
    assert floating.perplexity == pytest.approx(math.exp(floating.nats))
    assert floating.count == sum(y.numel() for _, y in test)
    plain = per_window(model, test)
    narrow = per_window(rc.emulate_(model, rc.LBA.biased(3, 3)), test)
    row = rows[repr(rc.LBA.biased(3, 3)), "float statistics"]
    assert row.nats == pytest.approx(float(narrow.mean()), rel=1e-5)
    half = 1.96 * float(plain.std()) / len(plain) ** 0.5
    assert (floating.low, floating.high) == pytest.approx((floating.nats - half, floating.nats + half), rel=1e-4)
    lost = next(d for d in found.differences if (d.config, d.against, d.state) == (row.config, "float", row.state))
    apart = narrow - plain
    assert lost.nats == pytest.approx(float(apart.mean()), rel=1e-4)
    assert lost.half == pytest.approx(1.96 * float(apart.std()) / len(apart) ** 0.5, rel=1e-3)
    assert found.text is not None
    assert (found.text.context, found.text.unit, found.text.test) == (8, "character", len(plain))
    assert found.test_images == len(plain)
    said = " ".join(out.split())
    assert f"it loses {lost.nats:.4f} nats a token (perplexity " in said
    assert "Cycles a window" in said
    _speaks_of_nats_alone(folder, said)


def _speaks_of_nats_alone(folder: Path, terminal: str) -> None:
    """In the terminal, on the page, and in the tables."""
    page = (folder / "out" / "report.html").read_text("utf-8")
    for text in (terminal, words(page)):
        assert "A window is " in text
        assert "less is better" in text.lower()
        assert not OF_IMAGES.search(text.replace("95\N{NO-BREAK SPACE}%", "")), OF_IMAGES.search(text)
    kept = json.loads((folder / "out" / "results.json").read_text())
    assert "accuracy" not in kept
    assert {"nats", "differences", "text"} < kept.keys()
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"nats.csv", "differences.csv"} < names
    assert "accuracy.csv" not in names
    header = next(csv.reader((folder / "out" / "nats.csv").read_text().splitlines()))
    assert header == ["config", "state", "seed", "nats", "perplexity", "low", "high", "count", "seconds"]


def test_a_network_of_hugging_face_with_its_tokenizer(folder):
    gpt2(folder / "gpt", tale(600))
    given = ("--model", "hf:gpt", "--data", "text:tale.txt", "--config", NARROW, "--config", "nbsmt-2t", *QUICK)
    code, out, err = evaluate(*given, "--context", "6")
    assert code == 0, err
    found = Results.load(folder / "out")
    assert found.text is not None
    assert (found.text.unit, found.text.context, found.text.unknown) == ("token", 6, 0.0)
    assert found.data_name == "tale.txt"
    assert abs(found.nats[0].nats - math.log(found.text.vocabulary)) < 0.2  # random weights: a guess
    said = " ".join(out.split())
    assert "it does not know this text, so no nats say anything about hardware" in said
    assert "A window is 6 tokens" in said
    cycles = [row for row in found.rows("cycles") if row.emulated]
    assert len(cycles) == 7  # four of each block, but for the first
    _speaks_of_nats_alone(folder, said)
    assert "context: 6" in (folder / "out" / "recipe.yaml").read_text()
    code, _, err = run("run", folder / "out" / "recipe.yaml")
    assert (code, "measured:" in err) == (0, False)


def test_chips_are_ranked_by_nats(folder):
    weights = char_model(folder, tale(600), steps=120)
    for name, config in (("mild", "LBA.biased(7, 4)"), ("harsh", NARROW)):
        policy = rc.Policy({r"re:blocks\..*\.(qkv|fc1)": rc.grammar.parse_config(config)}, name)
        policy.save(folder / f"{name}.yaml")
    given = (
        "--model",
        "chargpt",
        "--weights",
        weights,
        "--data",
        "text:tale.txt",
        *QUICK,
        "--state",
        "float statistics",
    )
    code, out, err = evaluate(*given, "--policy", "harsh.yaml", "--policy", "mild.yaml")
    assert code == 0, err
    said = " ".join(out.split())
    ranking = said[said.index("Chips by nats") :]
    assert ranking.index("mild") < ranking.index("harsh")
    assert ranking.count("(mild") == 1
    assert "…" not in out
    found = Results.load(folder / "out")
    assert {row.config for row in found.costs} == {"float", "mild", "harsh"}
    for name in ("mild", "harsh"):
        lost = next(d for d in found.differences if (d.config, d.against) == (name, "float"))
        assert f"{lost.nats:+.4f} ({lost.low:+.4f} to {lost.high:+.4f})" in (folder / "out" / "report.html").read_text()
    _speaks_of_nats_alone(folder, said)
    page = (folder / "out" / "report.html").read_text("utf-8")
    code, _, err = run("report", folder / "out")  # from results.json alone
    assert code == 0, err
    assert (folder / "out" / "report.html").read_text("utf-8") == page


def test_a_recipe_of_a_text_is_taken_up_again_and_knows_another_text(folder):
    weights = char_model(folder, tale(600))
    values = {
        "model": "chargpt",
        "weights": str(weights),
        "data": "text:tale.txt",
        "configs": [NARROW],
        "states": ["float statistics"],
        "calibration": {"images": 4, "seeds": [0]},
        "test": {"limit": 5, "seed": 1},
        "profile_images": 0,
        "out": "out",
    }
    (folder / "text.yaml").write_text(yaml.safe_dump(values))
    code, _, err = run("run", "text.yaml")
    assert code == 0, err
    assert Results.load(folder / "out").test_images == 5
    assert "measured:" not in run("run", "text.yaml")[2]
    (folder / "tale.txt").write_text(tale(600, seed=1))
    code, _, err = run("run", "text.yaml")
    assert code == 2
    assert "measurements of another study (tokens was" in err


def test_a_character_model_s_chip_brings_its_alphabet_and_sizes(folder):
    """Evaluated where the checkpoint is not at hand; its float network is a checkpoint like any other."""
    weights = char_model(folder, tale(600), steps=30)
    rc.Policy({"re:blocks.*(qkv|fc1)": NARROW}, "narrow").save(folder / "policy-00.yaml")
    given = ("--model", "chargpt", "--data", "text:tale.txt")
    study = (*given, "--policy", "policy-00.yaml", "--weights")
    code, _, err = evaluate(*study, weights, *QUICK, "--save-chip", "chip.st")
    assert code == 0, err
    state = err.rpartition("chip.st holds narrow, ")[2]
    weights.unlink()
    code, out, err = evaluate(*given, "--chip", "chip.st", "--json")
    assert code == 0, err
    told, found = json.loads(out), Results.load(folder / "out")
    row = next(row for row in found.nats if (row.config, row.seed, row.state) == ("narrow", 0, state))
    assert told["chip"]["nats"] == row.nats
    lost = next(d for d in found.differences if (d.config, d.state, d.seed, d.against) == ("narrow", state, 0, "float"))
    assert told["lost"] == {"nats": lost.nats, "low": lost.low, "high": lost.high}
    shown = evaluate(*given, "--chip", "chip.st")[1]
    assert f"lost   {lost.nats:+.4f} nats ({lost.low:+.4f} to {lost.high:+.4f}), on the same windows" in shown
    assert told["float"]["nats"] == found.nats[0].nats
    code, _, err = evaluate(*study, "chip.st", *QUICK[:-1], "again")
    assert code == 0, err
    assert [r.nats for r in Results.load(folder / "again").nats] == [r.nats for r in found.nats]
    model = rc.load("chip.st", "chargpt")
    assert (model.alphabet, model.sizes["heads"]) == ("".join(sorted(set(tale(600)))), 2)
    model.alphabet = model.alphabet[::-1]
    rc.save(model, "other.st")
    with pytest.raises(rc.RecoupError, match="is of a network of the alphabet"):
        rc.load("other.st", load_chargpt("chip.st")[0])
    plain = rc.models.load("chargpt")
    rc.save(plain, "plain.st")
    with pytest.raises(rc.RecoupError, match="no file of a chargpt that holds its alphabet"):
        load_chargpt("plain.st")
    code, _, err = evaluate(*given, "--chip", "plain.st")
    assert (code, "has no vocabulary that is known" in err) == (2, True)


def test_a_chip_on_a_text(folder):
    gpt2(folder / "gpt", tale(600))
    given = ("--model", "hf:gpt", "--data", "text:tale.txt")
    code, _, err = evaluate(*given, "--config", "lba-m7e4", *QUICK, "--save-chip", "chip.safetensors")
    assert code == 0, err
    code, out, err = evaluate(*given, "--chip", "chip.safetensors", "--json")
    assert code == 0, err
    told, found = json.loads(out), Results.load(folder / "out")
    assert told["float"]["nats"] == pytest.approx(found.nats[0].nats)
    assert told["float"].keys() == {"nats", "perplexity", "low", "high", "count"}
    code, out, _ = evaluate(*given, "--chip", "chip.safetensors")
    assert "nats a token (" in out
    assert "top-1" not in out


class Own(nn.Module):
    """A network of one's own that says how it reads: bytes, by the tokenizer that it has."""

    class Tokenizer:
        """Bytes."""

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.context = Own.Tokenizer(), 8
        self.embedding, self.head = nn.Embedding(256, 8), nn.Linear(8, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.embedding(tokens))


def test_a_network_of_ones_own_says_how_it_reads(folder):
    given = ("--model", "tests.cli.test_texts:Own", "--data", "text:tale.txt", "--config", NARROW, *QUICK)
    code, _, err = evaluate(*given)
    assert code == 0, err
    found = Results.load(folder / "out")
    assert found.text is not None
    assert (found.outputs, found.text.context, found.text.unit) == (256, 8, "token")


def chargpt(folder: Path, *more: str) -> tuple[str, ...]:
    weights = folder / "gpt.pt"
    if not weights.exists():
        char_model(folder, tale(600))
    return ("--model", "chargpt", "--weights", str(weights), "--config", NARROW, *QUICK, *more)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"the quick \xff fox " * 40, "tale.txt: no text in UTF-8: byte 10 is 0xff"),
        (b"the quick", "less than a window of 8 and its successor"),
        (tale(600).encode() + "\N{SNOWMAN} ".encode() * 60, "holds '\N{SNOWMAN}', which is not in the alphabet"),
        (None, "no text (No such file or directory)"),
    ],
)
def test_texts_that_are_refused(folder, content, told):
    given = chargpt(folder)
    if content is None:
        (folder / "tale.txt").unlink()
    else:
        (folder / "tale.txt").write_bytes(content)
    code, _, err = evaluate(*given, "--data", "text:tale.txt")
    assert (code, told in err) == (2, True), err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--data", "text:"), "what follows the colon is missing; it is text:FILE"),
        (
            ("--data", "text:tale.txt", "--context", "9"),
            "windows of 9 characters (context, --context), but the network",
        ),
        (("--data", "text:tale.txt", "--test-split", "val"), "no split 'val'"),
        (("--data", "text:tale.txt", "--limit", "1"), "one window leaves no interval"),
        (("--data", "text:tale.txt", "--limit", "9999"), "test windows (test.limit"),
        (("--data", "text:tale.txt", "--augment"), "a text has no augmentation"),
        (("--data", "text:tale.txt", "--calibration-images", "9999"), "calibration windows (calibration.images"),
        (("--data", "text:tale.txt", "--model-option", "width=8"), "its sizes are those of the checkpoint"),
        (
            ("--data", "digits", "--model", "digits_net", "--context", "8"),
            "context 8: is the tokens of a text's window",
        ),
        (("--data", "text:tale.txt", "--model", "digits_net"), "a text needs chargpt, whose checkpoint holds"),
    ],
)
def test_what_does_not_fit_is_refused(folder, change, told):
    own = () if "digits_net" not in change else ("--weights", str(folder / "gpt.pt"))
    given = [part for part in chargpt(folder) if part not in own]
    code, _, err = evaluate(*given, *change)
    assert (code, told in err) == (2, True), err


def test_networks_that_are_no_causal_language_models_are_refused(folder):
    import transformers

    size = gpt2(folder / "gpt", tale(600)) and save_tokenizer(folder / "bert", tale(600))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=size, max_position_embeddings=16, **small)
    transformers.BertForMaskedLM(config).save_pretrained(folder / "bert")
    given = ("--data", "text:tale.txt", "--config", NARROW, *QUICK)
    assert "sees the tokens that it is to predict" in evaluate("--model", "hf:bert", *given)[2]
    transformers.BertModel(config).save_pretrained(folder / "bert")
    assert "a language model returns logits [windows, tokens, vocabulary]" in evaluate("--model", "hf:bert", *given)[2]
    save_tokenizer(folder / "gpt", tale(600) + "one two three four five")
    (folder / "tale.txt").write_text(tale(600) + "one two three four five " * 20)
    assert "is the tokenizer that of another network?" in evaluate("--model", "hf:gpt", *given)[2]
    for path in (folder / "gpt").glob("tokenizer*"):
        path.unlink()
    assert "its folder has no tokenizer" in evaluate("--model", "hf:gpt", *given)[2]


def test_a_text_is_no_data_for_training(folder):
    chargpt(folder)
    code, _, err = run("train", "--model", "chargpt", "--data", "text:tale.txt", "--out", "trained")
    assert code == 2
    assert "`recoup evaluate`, recipes and searches take it" in err
