"""Studies whose accuracies say nothing: no weights, no better than chance, outputs that are not the data's classes."""

import pytest
import torch
from torch import nn

from recoup.models import digits_net
from recoup.report.summary import summarize
from recoup.study import run
from recoup.study.machine import cpu_threads
from tests.report.pages import shown, verdicts
from tests.study.examples import results, small_recipe


@pytest.fixture(autouse=True)
def _one_thread():
    with cpu_threads(1):
        yield


def many_outputs():
    return digits_net(num_classes=1000)


def constant():
    """Says 1 always: one class of ten is right."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    nn.init.zeros_(model[5].weight)  # type: ignore[arg-type]
    model[5].bias.data = torch.eye(10)[1]  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("digits_net", ["No weights were given, so this network is untrained"]),
        ("recoup.models:digits_net", ["No weights were given, so this network is untrained"]),
        (
            f"{__name__}:many_outputs",
            ["The network has 1,000 outputs and the data have 10 classes", "guessing among 10"],
        ),
        (f"{__name__}:constant", ["guessing among 10 classes gives 10.00 %: it does not know these images"]),
    ],
)
def test_the_verdict_says_so_and_nothing_else(tmp_path, model, said):
    states = ["float statistics", "bias correction"]
    made = run(small_recipe(tmp_path, model=model, states=states, profile_images=0), progress=False)
    summary = summarize(made)
    told = " ".join(summary.doubts).replace("\N{NO-BREAK SPACE}", " ")
    for part in said:
        assert part in told
        assert part in " ".join(shown(made).split()).replace("\N{NO-BREAK SPACE}", " ")
    for verdict in verdicts(made):
        assert "nothing to repair" not in verdict
        assert verdict.endswith("from a network that guesses nothing follows.")


def test_it_is_said_before_anything_is_measured(tmp_path, capsys):
    run(small_recipe(tmp_path, states=["float statistics"], profile_images=0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("note: No weights were given")
    assert "1 of " in lines[1]


def test_a_network_that_knows_its_images_is_not_doubted():
    assert summarize(results()).doubts == ()
    known = results().model_copy(update={"classes": 10, "outputs": 10})
    assert summarize(known).doubts == ()
    assert not summarize(known).guessing
    more = known.model_copy(update={"outputs": 1000})
    assert len(summarize(more).doubts) == 1
    assert verdicts(more) == verdicts(known)
