"""Inputs become documents, and every bad input is refused in one line that names the place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cpmpi.documents.read import InputDocument, Reading, ReadOptions, read_documents
from cpmpi.documents.tokenization import load_tokenizer, tokenize
from cpmpi.errors import UserError

VOCABULARY = 300
TEXT = "the quick brown fox\r\njumps über the lazy dog\n" * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer that begins texts with <s>, and whose file asks for truncation and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=4096)
    folder = tmp_path_factory.mktemp("checkpoint")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: inputs and messages are relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes | list[object]) -> None:
    """Bytes as they are, text as UTF-8, a list as JSON lines."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def read_tokens(*inputs: str) -> list[InputDocument]:
    """Inputs that need no tokenizer, from a checkpoint that has none."""
    return reading(*inputs).documents


def reading(*inputs: str, checkpoint: Path = Path("no-such-checkpoint"), **options: Any) -> Reading:
    return read_documents(inputs, checkpoint=checkpoint, vocab_size=VOCABULARY, options=ReadOptions(**options))


def refusal(
    *inputs: str, checkpoint: Path = Path("no-such-checkpoint"), vocab_size: int = VOCABULARY, **options: Any
) -> str:
    """The one line of a refusal, without the hint that other documents would be left."""
    message = report(*inputs, checkpoint=checkpoint, vocab_size=vocab_size, **options)
    assert "\n" not in message
    return message.removesuffix("; --skip-bad goes on without it")


def report(
    *inputs: str, checkpoint: Path = Path("no-such-checkpoint"), vocab_size: int = VOCABULARY, **options: Any
) -> str:
    with pytest.raises(UserError) as refused:
        read_documents(inputs, checkpoint=checkpoint, vocab_size=vocab_size, options=ReadOptions(**options))
    return str(refused.value)


def test_text_is_tokenized_whole_and_exactly(folder: Path, checkpoint: Path) -> None:
    write("a.txt", TEXT)
    (document,) = read_documents(["a.txt"], checkpoint=checkpoint, vocab_size=VOCABULARY).documents
    assert (document.id, document.source) == ("a.txt", "a.txt")
    assert document.token_ids.dtype == np.int32
    assert not document.token_ids.flags.writeable
    tokenizer = load_tokenizer(checkpoint)
    # Neither truncated nor padded, though the tokenizer's file says both; line ends as they were.
    assert tokenizer.decode(document.token_ids[1:]) == TEXT
    assert document.token_ids[0] == 0


@pytest.mark.parametrize(("special_tokens", "first"), [(None, 0), (True, 0), (False, None)])
def test_special_tokens_are_an_option(checkpoint: Path, special_tokens: bool | None, first: int | None) -> None:
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenize(tokenizer, "the fox", special_tokens)
    assert ids[0] == first if first is not None else 0 not in ids


def test_a_byte_order_mark_is_not_text(folder: Path, checkpoint: Path) -> None:
    write("with.txt", b"\xef\xbb\xbfthe fox")
    write("without.txt", "the fox")
    a, b = read_documents(["with.txt", "without.txt"], checkpoint=checkpoint, vocab_size=VOCABULARY).documents
    assert a.token_ids.tolist() == b.token_ids.tolist()


def test_jsonl_and_npy(folder: Path, checkpoint: Path) -> None:
    write("d.jsonl", [{"id": "x", "text": "the fox", "year": 1}, {"id": "y", "token_ids": [1, 2, VOCABULARY - 1]}])
    with open("d.jsonl", "a") as stream:
        stream.write("\n  \n" + json.dumps({"id": "z", "token_ids": [0]}))
    np.save("e.npy", np.array([5, 6], dtype=np.uint16))
    documents = read_documents(["e.npy", "d.jsonl"], checkpoint=checkpoint, vocab_size=VOCABULARY).documents
    sources = [(d.id, d.source) for d in documents]
    assert sources == [("e.npy", "e.npy"), ("x", "d.jsonl:1"), ("y", "d.jsonl:2"), ("z", "d.jsonl:5")]
    assert [d.token_ids.tolist() for d in documents if d.id != "x"] == [[5, 6], [1, 2, VOCABULARY - 1], [0]]
    assert {d.token_ids.dtype for d in documents} == {np.dtype(np.int32)}
    assert not any(d.token_ids.flags.writeable for d in documents)


def test_token_ids_need_no_tokenizer(folder: Path) -> None:
    np.save("e.npy", np.arange(3))
    (document,) = read_tokens("e.npy")
    assert document.token_ids.tolist() == [0, 1, 2]


def test_a_folder_is_read_sorted_at_any_depth_without_hidden_files(folder: Path, checkpoint: Path) -> None:
    for name in ("b.txt", "a/z.MD", "a/y.txt", ".hidden.txt", ".git/x.txt", "c.pdf"):
        write(f"texts/{name}", "the fox")
    write("elsewhere/far.txt", "the dog")
    Path("texts/link").symlink_to("../elsewhere")
    Path("texts/a/loop").symlink_to("..")
    documents = read_documents(["texts"], checkpoint=checkpoint, vocab_size=VOCABULARY).documents
    assert [d.id for d in documents] == ["a/y.txt", "a/z.MD", "b.txt", "link/far.txt"]
    assert documents[0].source == "texts/a/y.txt"


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("texts/*.txt", ["b.txt", "c.txt"]),
        ("texts/*", ["a/y.txt", "b.txt", "c.txt"]),
        ("texts/**", ["a/y.txt", "b.txt", "c.txt"]),
        ("texts/**/*.txt", ["a/y.txt", "b.txt", "c.txt"]),
        ("*/a/[xy].txt", ["texts/a/y.txt"]),
    ],
)
def test_a_glob_names_files_below_its_fixed_part(folder: Path, checkpoint: Path, pattern: str, ids: list[str]) -> None:
    for name in ("c.txt", "b.txt", "a/y.txt"):
        write(f"texts/{name}", "the fox")
    Path("texts/empty").mkdir()
    documents = read_documents([pattern], checkpoint=checkpoint, vocab_size=VOCABULARY).documents
    assert [d.id for d in documents] == ids


def test_a_file_whose_name_looks_like_a_glob_is_a_file(folder: Path, checkpoint: Path) -> None:
    write("a[1].txt", "the fox")
    (document,) = read_documents(["a[1].txt"], checkpoint=checkpoint, vocab_size=VOCABULARY).documents
    assert document.id == "a[1].txt"


def test_progress_counts_characters(folder: Path, checkpoint: Path) -> None:
    write("d.jsonl", [{"id": "x", "text": "über"}, {"id": "y", "token_ids": [1]}, {"id": "z", "text": "fox"}])
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    read_documents(["d.jsonl"], checkpoint=checkpoint, vocab_size=VOCABULARY, progress=progress)
    assert calls == [(4, 7), (7, 7)]


def test_inputs_that_are_not_there(folder: Path) -> None:
    Path("empty").mkdir()
    Path("dangling.txt").symlink_to("nowhere")
    assert refusal() == "no input: give text files, folders, globs, .jsonl, .npy or .parquet files, or - for a pipe"
    assert refusal("a.txt") == "a.txt: no such file or folder"
    assert refusal("dangling.txt") == "dangling.txt: no such file or folder"
    assert refusal("x*.txt") == "x*.txt: no file matches"
    assert refusal("emp*") == "emp*: no file matches"
    assert refusal("empty") == "empty: the folder has no .txt, .md, .jsonl, .npy or .parquet file and no saved data set"
    assert refusal("n" * 300) == f"{'n' * 300}: File name too long"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: the file is empty"),
        (b"\xef\xbb\xbf", "a.txt: no text but a byte order mark"),
        (b"text\0", "a.txt: not text: a zero byte at byte 4"),
        (b"na\xefve", "a.txt: not UTF-8 text: 0xef at byte 2 (invalid continuation byte); convert it with iconv"),
    ],
)
def test_files_that_are_no_text(folder: Path, content: bytes, message: str) -> None:
    write("a.txt", content)
    assert refusal("a.txt") == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": x}', "not JSON: Expecting value at column 8"),
        (b'{"id": "x"', "not JSON: Expecting ',' delimiter at column 11"),
        (b"[1]", 'must be an object with "text" or "token_ids", not a list'),
        (b"{}", 'the document has none of "text", "token_ids", "input_ids" (or --column); it has none'),
        (b'{"id": 7.5, "text": "t"}', '"id" must be an integer or a string that is not empty, not a fraction'),
        (b'{"id": true, "text": "t"}', '"id" must be an integer or a string that is not empty, not a boolean'),
        (b'{"id": "", "text": "t"}', '"id" must be an integer or a string that is not empty, not an empty string'),
        (b'{"id": "\\ud800", "text": "t"}', "\"id\" is not UTF-8: '\\ud800' at character 0"),
        (
            b'{"id": "x", "txt": "t"}',
            'the document has none of "text", "token_ids", "input_ids" (or --column); it has "id", "txt"',
        ),
        (
            b'{"id": "x", "text": "t", "token_ids": [1]}',
            'the document has "text" and "token_ids": choose with --column',
        ),
        (b'{"id": "x", "text": null}', "\"text\" of document 'x' must be a string or a list of integers, not null"),
        (b'{"id": "x", "text": ""}', "\"text\" of document 'x' is empty"),
        (b'{"id": "x", "text": "ab\\udc00"}', "\"text\" of document 'x' has half a surrogate pair at character 2"),
        (
            b'{"id": "x", "token_ids": {}}',
            "\"token_ids\" of document 'x' must be a string or a list of integers, not an object",
        ),
        (
            b'{"id": "x", "token_ids": [1, 2.0]}',
            "\"token_ids\" of document 'x' must be a list of integers; item 1 is a fraction",
        ),
        (
            b'{"id": "x", "token_ids": [true]}',
            "\"token_ids\" of document 'x' must be a list of integers; item 0 is a boolean",
        ),
        (b'{"id": "x", "token_ids": []}', "document 'x' has no tokens"),
        (
            b'{"id": "x", "token_ids": [1, 300]}',
            "document 'x' has token id 300 at index 1: the vocabulary has 300 tokens, 0 to 299",
        ),
        (
            b'{"id": "x", "token_ids": [-1]}',
            "document 'x' has token id -1 at index 0: the vocabulary has 300 tokens, 0 to 299",
        ),
        (
            b'{"id": "x", "token_ids": [1, 1000000000000000000000000]}',
            "document 'x' has token id 1000000000000000000000000 at index 1: "
            "the vocabulary has 300 tokens, 0 to 299",
        ),
    ],
)  # fmt: skip
def test_lines_that_are_no_documents(folder: Path, line: bytes, message: str) -> None:
    write("d.jsonl", b'{"id": "good", "token_ids": [1]}\n\n' + line + b"\n")
    assert refusal("d.jsonl") == f"d.jsonl:3: {message}"


def test_a_jsonl_file_with_bad_bytes_or_nothing(folder: Path) -> None:
    write("d.jsonl", b'{"id": "good", "token_ids": [1]}\n{"id": "\xff"}\n')
    assert refusal("d.jsonl") == "d.jsonl: not UTF-8 text: 0xff at byte 41 (invalid start byte); convert it with iconv"
    write("d.jsonl", b"\n \n")
    assert refusal("d.jsonl") == "d.jsonl: no documents: all lines are blank"
    write("d.jsonl", b'{"id": "x", "token_ids": [' + b"9" * 5000 + b"]}")
    assert refusal("d.jsonl").startswith("d.jsonl:1: not JSON that can be read: Exceeds the limit (4300 digits)")


def test_names_that_cannot_be_stored(folder: Path) -> None:
    write("d.jsonl", b'{"id": "a\\u0000b", "token_ids": [1]}')
    assert refusal("d.jsonl") == 'd.jsonl:1: "id" has a zero byte'
    name = os.fsdecode(b"r\xe9sum\xe9.npy")
    np.save(name, np.array([1, 2]))
    assert refusal(name) == "r\\udce9sum\\udce9.npy: the document's name is not UTF-8: '\\udce9' at character 1"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.int64), "must be a 1-D array of integers; this one has shape (2, 3) and dtype int64"),
        (np.zeros(3, np.float32), "must be a 1-D array of integers; this one has shape (3,) and dtype float32"),
        (np.zeros(3, np.bool_), "must be a 1-D array of integers; this one has shape (3,) and dtype bool"),
        (np.array(3), "must be a 1-D array of integers; this one has shape () and dtype int64"),
    ],
)
def test_arrays_of_the_wrong_kind(folder: Path, array: np.ndarray, message: str) -> None:
    np.save("e.npy", array)
    assert refusal("e.npy") == f"e.npy: token ids {message}"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(0, np.int32), "has no tokens"),
        (np.array([1, -2, -3]), "has token id -2 at index 1: the vocabulary has 300 tokens, 0 to 299"),
        (np.array([2**40]), "has token id 1099511627776 at index 0: the vocabulary has 300 tokens, 0 to 299"),
        (np.array([300], np.uint64), "has token id 300 at index 0: the vocabulary has 300 tokens, 0 to 299"),
    ],
)
def test_arrays_with_bad_ids(folder: Path, array: np.ndarray, message: str) -> None:
    np.save("e.npy", array)
    assert refusal("e.npy") == f"e.npy: document 'e.npy' {message}"


def test_arrays_that_are_not_plain_numbers(folder: Path) -> None:
    np.save("pickled.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    assert refusal("pickled.npy") == (
        "pickled.npy: token ids must be a 1-D array of integers; this one has shape (2,) and dtype object"
    )
    write("text.npy", "hello, this is text")
    assert refusal("text.npy").startswith("text.npy: not a .npy file of numbers: the magic string is not correct")
    np.save("cut.npy", np.arange(100))
    write("cut.npy", Path("cut.npy").read_bytes()[:200])
    assert refusal("cut.npy").startswith("cut.npy: not a .npy file of numbers: ")


def test_two_documents_with_one_id(folder: Path) -> None:
    np.save("a.npy", np.arange(3))
    Path("sub").mkdir()
    np.save("sub/a.npy", np.arange(3))
    advice = "rename one, or give both ids of their own in a .jsonl file"
    assert refusal("a.npy", "sub") == f"two documents have the id 'a.npy': a.npy and sub/a.npy; {advice}"
    assert refusal("a.npy", "a.npy") == f"two documents have the id 'a.npy': a.npy and a.npy; {advice}"
    write("d.jsonl", [{"id": "x", "token_ids": [1]}, {"id": "x", "token_ids": [2]}])
    assert refusal("d.jsonl") == f"two documents have the id 'x': d.jsonl:1 and d.jsonl:2; {advice}"


def test_text_without_a_tokenizer(folder: Path) -> None:
    write("a.txt", "text")
    Path("bare").mkdir()
    assert refusal("a.txt", checkpoint=Path("bare")) == (
        "bare: no tokenizer there (tokenizer.json, tokenizer.model or vocab.json), which text needs; "
        "token_ids in .jsonl and .npy files need none"
    )
    write("bare/tokenizer.json", "{broken")
    assert refusal("a.txt", checkpoint=Path("bare")).startswith("bare: the tokenizer does not load: ")


def test_a_tokenizer_with_more_tokens_than_the_model(folder: Path, checkpoint: Path) -> None:
    write("a.txt", "xyz")
    ids = tokenize(load_tokenizer(checkpoint), "xyz")
    assert refusal("a.txt", checkpoint=checkpoint, vocab_size=20) == (
        f"a.txt: document 'a.txt' has token id {ids[1]} at index 1: the vocabulary has 20 tokens, 0 to 19"
    )


def test_every_input_is_checked_before_the_tokenizer_is_loaded(folder: Path) -> None:
    write("a.txt", "text")
    write("b.jsonl", [{"id": "x"}])
    assert refusal("a.txt", "b.jsonl").startswith("b.jsonl:1: ")
