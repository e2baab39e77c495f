"""Texts as windows: what is cut where, which windows are drawn, how large batches may be, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recoup.data import load
from recoup.data.text import MOST_LOGITS, contexts, read_text, windows
from recoup.errors import RecoupError
from recoup.models.language import Vocabulary, vocabulary_of

LETTERS = Vocabulary.of_characters("abc ", 4)
WORDS = Vocabulary(lambda text: [len(word) for word in text.split()], 100, "token")


@pytest.fixture
def tale(tmp_path):
    path = tmp_path / "tale.txt"
    path.write_text("abc cab bca " * 10)
    return path


def test_splits_are_those_of_contexts(tale):
    for split, part in (("train", {"last": 0.9}), ("test", {"first": 0.9})):
        found = windows(tale, LETTERS, 4, split)
        ((x, y),) = contexts(tale, "abc ", 4, batch=99, **part)
        assert torch.equal(found.x_NT, x)
        assert torch.equal(found.y_NT, y)
    assert repr(found) == "Windows(tale.txt, test: 2 of 4 characters)"


@given(words=st.lists(st.integers(3, 5), min_size=60, max_size=90), context=st.integers(1, 3))
def test_no_word_is_cut_in_two_and_none_is_in_both_parts(words, context, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    text = " ".join("x" * length for length in words)
    path.write_text(text)
    begun = text[: text.index(" ", len(text) * 9 // 10)].count(" ") + 1  # words that begin in the first nine tenths
    for split, own in (("train", words[:begun]), ("test", words[begun:])):
        found = windows(path, WORDS, context, split)
        assert len(found) == (len(own) - 1) // context
        assert [*found.x_NT.flatten().tolist(), int(found.y_NT[-1, -1])] == own[: len(found) * context + 1]


def test_following_tokens_are_the_labels(tale):
    found = windows(tale, LETTERS, 5, "train")
    assert torch.equal(found.x_NT.flatten()[1:], found.y_NT.flatten()[:-1])
    assert found.context == 5


def test_windows_are_drawn_as_images_are(tale):
    found = windows(tale, LETTERS, 4, "train")
    drawn = found.subset(5, seed=3)
    assert torch.equal(found.subset(3, seed=3).x_NT, drawn.x_NT[:3])
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(3))[:5]
    assert torch.equal(drawn.y_NT, found.y_NT[order])
    assert torch.equal(found.first(2).x_NT, found.x_NT[:2])
    for call in (found.subset, found.first):
        with pytest.raises(RecoupError, match="of 99 windows: it must be an integer from 1 to 26"):
            call(99)


def test_batches_are_as_large_as_logits_allow(tale):
    found = windows(tale, LETTERS, 4, "train")
    assert [len(x) for x, _ in found.batches(10)] == [10, 10, 6]
    wide = Vocabulary(LETTERS.encode, MOST_LOGITS // 8, "token")
    assert [len(x) for x, _ in windows(tale, wide, 4, "test").batches(10)] == [2]
    wider = Vocabulary(LETTERS.encode, MOST_LOGITS, "token")
    assert [len(x) for x, _ in windows(tale, wider, 4, "test").batches(10)] == [1, 1]
    with pytest.raises(RecoupError, match="a text has no augmentation"):
        found.batches(2, augment=True)


@pytest.mark.parametrize(
    ("vocabulary", "context", "split", "told"),
    [
        (LETTERS, 0, "test", "windows of 0 characters: must be a whole number of 1 or more"),
        (LETTERS, 12, "test", "12 characters are less than a window of 12 and its successor"),
        (LETTERS, 4, "half", "no split 'half'; there is train, test"),
        (Vocabulary.of_characters("ab"), 4, "test", "tale.txt: holds ' ', which is not in the alphabet of 2"),
        (Vocabulary(LETTERS.encode, 3, "token"), 4, "test", "holds token 3, and the network's vocabulary has 3"),
        (Vocabulary(lambda text: [-1] * len(text), None, "token"), 4, "test", "holds token -1"),
    ],
)
def test_texts_that_do_not_fit_are_refused(tale, vocabulary, context, split, told):
    with pytest.raises(RecoupError, match=told.replace("(", r"\(")):
        windows(tale, vocabulary, context, split)


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "bytes").write_bytes(b"abc\xc3\x28")
    with pytest.raises(RecoupError, match="no text in UTF-8: byte 3 is 0xc3"):
        read_text(tmp_path / "bytes")
    with pytest.raises(RecoupError, match="no text \\(Is a directory\\)"):
        read_text(tmp_path)
    with pytest.raises(RecoupError, match="a text is read with a language model's vocabulary"):
        load("text:tale.txt")


def test_networks_without_a_vocabulary_are_refused():
    with pytest.raises(RecoupError, match="'mynet:Net' has no vocabulary that is known"):
        vocabulary_of("mynet:Net", torch.nn.Linear(1, 1))
