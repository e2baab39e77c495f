"""Language models and their vocabularies: alphabets, tokenizers in folders, what is known of windows."""

import pytest
import torch
from torch import nn

from recoup.errors import RecoupError
from recoup.models import load
from recoup.models.language import LONGEST, Vocabulary, load_language, vocabulary_of
from tests.texts import char_model, gpt2, tale


def test_a_chargpt_reads_by_the_alphabet_of_its_checkpoint(tmp_path):
    model = load_language("chargpt", char_model(tmp_path, "bcab" * 9, context=4))
    found = vocabulary_of("chargpt", model)
    assert found.encode("cab") == [2, 0, 1]
    assert (found.size, found.unit, found.context, found.longest) == (3, "character", 4, 4)
    with pytest.raises(RecoupError, match="holds 'd', which is not in the alphabet of 3 characters"):
        found.encode("bad")
    with pytest.raises(RecoupError, match="chargpt, whose checkpoint holds its alphabet"):
        vocabulary_of("chargpt", load("chargpt"))
    with pytest.raises(RecoupError, match="its sizes are those of the checkpoint: leave out width"):
        load_language("chargpt", tmp_path / "gpt.pt", {"width": 8})


def test_a_folder_of_hugging_face_in_float32(tmp_path):
    folder = gpt2(tmp_path / "gpt", tale(50), positions=LONGEST + 1)
    half = load(f"hf:{folder}").bfloat16()
    half.save_pretrained(folder)
    model = load_language(f"hf:{folder}")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found = vocabulary_of(f"hf:{folder}", model)
    assert (found.size, found.unit) == (model.get_input_embeddings().num_embeddings, "token")
    assert (found.context, found.longest) == (LONGEST, LONGEST + 1)
    assert found.encode("fox") + found.encode("dog") == found.encode("fox dog")
    assert found.encode("zebra") == [found.unknown]


def test_a_network_of_ones_own():
    network = nn.Linear(1, 1)
    network.alphabet = "ab"
    assert vocabulary_of("mynet:Net", network).encode("ba") == [1, 0]
    assert vocabulary_of("mynet:Net", network).context is None
    assert isinstance(vocabulary_of("mynet:Net", network), Vocabulary)
