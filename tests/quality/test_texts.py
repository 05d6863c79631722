"""Windows of tokens, as models are given them."""

from __future__ import annotations

import numpy as np
import pytest
import text_models
from tokenizers.processors import TemplateProcessing

from nf4cli.errors import UsageError
from nf4cli.quality.texts import sequences

pytest.importorskip("transformers")


def with_template(template: str) -> object:
    """The tiny tokenizer with special tokens around each text."""
    made = text_models.tokenizer()
    ids = [(name, made.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return made


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [("$A", [], []), ("<s> $A", [1], []), ("<s> $A </s>", [1], [2]), ("$A </s>", [], [2])],
)
def test_a_window_has_the_special_tokens_of_a_text(template, before, behind):
    tokenizer, document = with_template(template), text_models.text(300)
    inside = 16 - len(before) - len(behind)
    plain = [*tokenizer(document, add_special_tokens=False)["input_ids"], 2]
    found = sequences([document], tokenizer, 16, 10**6)
    assert found.shape == (len(plain) // inside, 16)
    assert found.dtype == np.int64
    for number, window in enumerate(found.tolist()):
        own = plain[number * inside : (number + 1) * inside]
        assert window == [*before, *own, *behind]


def test_documents_are_closed_inside_windows():
    tokenizer = with_template("<s> $A")
    words = ["quick brown", "lazy dog"]
    ids = [tokenizer(w, add_special_tokens=False)["input_ids"] for w in words]
    length = 1 + sum(map(len, ids)) + 2
    assert sequences(words, tokenizer, length, 1).tolist() == [[1, *ids[0], 2, *ids[1], 2]]


def test_text_that_fills_no_window_is_refused():
    with pytest.raises(UsageError, match="fewer than one window"):
        sequences(["quick brown"], with_template("<s> $A </s>"), 400, 4)
