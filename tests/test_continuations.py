"""Lines that say what may follow a stored document: what is read of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpmpi.documents.continuations import read_continuations, would_merge
from cpmpi.documents.tokenization import load_tokenizer
from cpmpi.errors import UserError

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "demo" / "checkpoint"


def read(tmp_path, *lines, text=None):
    file = tmp_path / "c.jsonl"
    file.write_text(text if text is not None else "\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return read_continuations([str(file)], checkpoint=CHECKPOINT, vocab_size=500)


def test_texts_ids_and_choices(tmp_path):
    text, ids, choices = read(
        tmp_path,
        {"document": "d", "id": "a", "text": "def  f"},
        {"document": "d", "id": "b", "token_ids": [3, 1], "upto": 7},
        {"document": "e", "id": "c", "text": "x =", "choices": [" 1", " é", [4]]},
    )
    tokenizer = load_tokenizer(CHECKPOINT)
    assert tokenizer.decode(text.answers[0]) == "def  f"
    assert (text.names, text.n_bytes, text.upto, len(text.stem), text.chosen) == (("a",), (6,), None, 0, False)
    assert (ids.answers[0].tolist(), ids.upto, ids.n_bytes) == ([3, 1], 7, (0,))
    assert (choices.names, choices.n_bytes) == (("c/0", "c/1", "c/2"), (2, 3, 0))
    assert tokenizer.decode(choices.stem) == "x ="
    assert choices.source.endswith("c.jsonl:3")


def test_integer_ids_become_their_digits_as_those_of_documents(tmp_path):
    (line,) = read(tmp_path, {"document": 17, "id": 4, "token_ids": [1]})
    assert (line.document, line.id) == ("17", "4")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"id": "a", "text": "x"}, '"document" must be a string'),
        ({"document": "d", "text": "x"}, '"id" must be a string'),
        ({"document": "d", "id": "a"}, "needs one of"),
        ({"document": "d", "id": "a", "text": ""}, "no tokens to score"),
        ({"document": "d", "id": "a", "token_ids": []}, "no tokens to score"),
        ({"document": "d", "id": "a", "token_ids": [500]}, "token id 500: the vocabulary has 500 tokens"),
        ({"document": "d", "id": "a", "token_ids": [1.5]}, "must be integers, not 1.5"),
        ({"document": "d", "id": "a", "token_ids": [10**20]}, "token id 100000000000000000000: the vocabulary"),
        ({"document": "d", "id": "a", "text": None}, "a list of integers, not null"),
        ({"document": "d", "id": "a", "text": "x \ud800"}, r"holds \\ud800, half of a character"),
        ({"document": "d", "id": "\ud800", "text": "x"}, r"holds \\ud800, half of a character"),
        ({"document": True, "id": "a", "text": "x"}, '"document" must be a string'),
        ({"document": "d", "id": "a", "choices": []}, "not empty"),
        ({"document": "d", "id": "a", "choices": "yes"}, "not empty"),
        ({"document": "d", "id": "a", "text": "x", "token_ids": [1]}, "both"),
        ({"document": "d", "id": "a", "text": "x", "upto": 0}, '"upto" must be'),
        ({"document": "d", "id": "a", "txt": "x"}, "unknown 'txt'; the keys are document, id"),
        ([1], "must be an object"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(line, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as error:
        read(tmp_path, {"document": "d", "id": "z", "token_ids": [1]}, line)
    assert "c.jsonl:2: " in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"c\.jsonl:1: not JSON"):
        read(tmp_path, text="{")
    with pytest.raises(UserError, match="all lines are blank"):
        read(tmp_path, text="\n \n")
    with pytest.raises(UserError, match=r"c\.jsonl:2: the id 'a/0' occurs twice; first at .*c\.jsonl:1"):
        read(tmp_path, {"document": "d", "id": "a/0", "token_ids": [1]}, {"document": "d", "id": "a", "choices": [[1]]})
    with pytest.raises(UserError, match=r"x\.txt: continuations come in \.jsonl"):
        read_continuations(["x.txt"], checkpoint=CHECKPOINT, vocab_size=9)
    with pytest.raises(UserError, match=r"absent\.jsonl: No such file"):
        read_continuations(["absent.jsonl"], checkpoint=CHECKPOINT, vocab_size=9)


def test_tokens_that_would_be_one():
    tokenizer = load_tokenizer(CHECKPOINT)
    one = tokenizer("return self", add_special_tokens=False)["input_ids"]
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("return se", "lf"))
    assert would_merge(tokenizer, a, b) == (len(a) + len(b) != len(one) or a + b != one)
    assert would_merge(tokenizer, a, b)
    a, b = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("return", " self"))
    assert not would_merge(tokenizer, a, b)
