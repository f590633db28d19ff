"""Input as people have it: compressed, in tables, through pipes, chosen by id; links that loop; all that is bad."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cpmpi.documents.input_files import find_input_files
from cpmpi.documents.read import ReadOptions
from cpmpi.errors import UserError
from cpmpi.run.reader import open_run

from .conftest import clean_environment, mpirun_path
from .test_documents import checkpoint, folder, reading, refusal, report, write  # noqa: F401  (fixtures)
from .test_exact import save_llama

LINES = [{"id": f"d{i}", "token_ids": [i, i + 1]} for i in range(4)]


def lines(records=LINES) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def ids(*inputs: str, **options) -> list[str]:
    return [document.id for document in reading(*inputs, **options).documents]


def pipe(content: bytes, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def test_links_that_loop_are_followed_once_and_said(folder):  # noqa: F811
    write("texts/a/b/one.jsonl", lines(LINES[:1]))
    Path("texts/a/up").symlink_to("../..")
    Path("texts/a/b/up").symlink_to("../../a")
    for one in "xyz":
        for other in "xyz":
            Path("cross", one).mkdir(parents=True, exist_ok=True)
            Path("cross", one, f"to-{other}").symlink_to(f"../{other}")
    write("cross/x/two.txt", "text")
    for pattern in ("texts", "texts/**/*.jsonl", "texts/**"):
        found = find_input_files([pattern])
        assert [file.name for file in found.files] == ["a/b/one.jsonl"], pattern
        assert not found.problems
    assert find_input_files(["texts"]).notes == [
        "texts: 2 links that lead round are not followed: texts/a/up, texts/a/b/up"
    ]
    crossed = find_input_files(["cross"])
    assert [file.name for file in crossed.files] == ["x/two.txt"]
    assert crossed.notes[0].startswith("cross: 9 links that lead round are not followed: cross/x/to-x, ")
    Path("texts/gone.txt").symlink_to("nowhere")
    assert refusal("texts") == "texts/gone.txt: No such file or directory"
    Path("texts/gone.txt").unlink()
    Path("texts/same.jsonl").symlink_to("a/b/one.jsonl")
    assert [file.name for file in find_input_files(["texts"]).files] == ["same.jsonl"], "one file, not two documents"


def test_folders_take_compressed_files_and_tables(folder):  # noqa: F811
    for name in ("a.txt.gz", "b.jsonl.zst", "c.parquet", "d.json", "e.bz2", ".f.txt.gz"):
        write(f"in/{name}", b"x")
    assert [file.name for file in find_input_files(["in"]).files] == ["a.txt.gz", "b.jsonl.zst", "c.parquet"]


def test_gzip_is_read_as_what_is_in_it_and_a_cut_one_is_refused(folder, checkpoint):  # noqa: F811
    write("a.txt", "the fox\r\n" * 50)
    write("a.txt.gz", gzip.compress(b"the fox\r\n" * 20) + gzip.compress(b"the fox\r\n" * 30))
    write("d.jsonl.gz", gzip.compress(lines()))
    plain, packed, *rest = reading("a.txt", "a.txt.gz", "d.jsonl.gz", checkpoint=checkpoint).documents
    assert plain.token_ids.tolist() == packed.token_ids.tolist()
    assert [(d.id, d.source) for d in rest[:2]] == [("d0", "d.jsonl.gz:1"), ("d1", "d.jsonl.gz:2")]
    whole = Path("d.jsonl.gz").read_bytes()
    write("d.jsonl.gz", whole[:-9])
    assert refusal("d.jsonl.gz") == f"d.jsonl.gz: cut short: its gzip data has no end (it has {len(whole) - 9} bytes)"
    write("d.jsonl.gz", whole[:-8] + bytes(8))
    assert refusal("d.jsonl.gz").startswith("d.jsonl.gz: not good gzip data: CRC check failed")
    write("d.jsonl.gz", lines())
    assert refusal("d.jsonl.gz").startswith("d.jsonl.gz: not good gzip data: Not a gzipped file")
    write("d.jsonl.gz", gzip.compress(b""))
    assert refusal("d.jsonl.gz") == "d.jsonl.gz: the file is empty"


def test_zstd_is_read_and_a_cut_one_is_refused(folder, monkeypatch):  # noqa: F811
    zstandard = pytest.importorskip("zstandard")
    from cpmpi.documents import content

    first, second = (zstandard.compress(part) for part in (lines()[:30], lines()[30:]))
    write("d.jsonl.zst", first + second)
    monkeypatch.setattr(content, "CHUNK_BYTES", 7)  # frames end inside chunks
    assert ids("d.jsonl.zst") == ["d0", "d1", "d2", "d3"]
    for cut in (len(first) - 1, len(first) + 3, len(first + second) - 1):
        write("d.jsonl.zst", (first + second)[:cut])
        assert refusal("d.jsonl.zst") == f"d.jsonl.zst: cut short: its zstd data has no end (it has {cut} bytes)"
    write("d.jsonl.zst", b"no zstd")
    assert refusal("d.jsonl.zst").startswith("d.jsonl.zst: not good zstd data: ")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert refusal("d.jsonl.zst") == "d.jsonl.zst: .zst files need zstandard: pip install 'cpmpi[data]'"


@pytest.mark.parametrize("packed", [False, True])
def test_standard_input_is_read_as_what_it_is(folder, checkpoint, monkeypatch, packed):  # noqa: F811
    pack = gzip.compress if packed else bytes
    pipe(pack(b"the fox"), monkeypatch)
    read = reading("-", checkpoint=checkpoint)
    assert [(d.id, d.source) for d in read.documents] == [("stdin", "standard input")]
    assert read.notes == ["standard input: 1 document read, 7 characters"]
    pipe(pack(lines([{"token_ids": [1]}, {"id": "b", "token_ids": [2]}])), monkeypatch)
    read = reading("-")
    assert [(d.id, d.source) for d in read.documents] == [("stdin:1", "standard input:1"), ("b", "standard input:2")]
    assert read.notes == ["standard input: 2 documents read, token ids"]
    pipe(pack(json.dumps(LINES, indent=1).encode()), monkeypatch)
    assert ids("-") == ["d0", "d1", "d2", "d3"]
    numbers = io.BytesIO()
    np.save(numbers, np.arange(3))
    pipe(pack(numbers.getvalue()), monkeypatch)
    assert reading("-").documents[0].token_ids.tolist() == [0, 1, 2]
    pipe(pack(b"[1, 2] is no list of documents, and {} no line of any"), monkeypatch)
    assert ids("-", checkpoint=checkpoint) == ["stdin"]
    pipe(pack(b"PAR1..."), monkeypatch)
    assert refusal("-") == "standard input: .parquet comes through no pipe: give the file"
    pipe(pack(b""), monkeypatch)
    assert refusal("-") == "standard input: nothing came"
    pipe(pack(b"x"), monkeypatch)
    assert refusal("-", "-", skip_bad=False).startswith("standard input: given twice, and can be read once")


def test_pipes_are_read_and_devices_refused(folder, checkpoint):  # noqa: F811
    os.mkfifo("docs.jsonl")
    writer = threading.Thread(target=lambda: Path("docs.jsonl").write_bytes(lines()))
    writer.start()
    assert ids("docs.jsonl") == ["d0", "d1", "d2", "d3"]
    writer.join()
    assert find_input_files(["docs.jsonl", "docs.jsonl"]).problems == ["docs.jsonl: given twice, and can be read once"]
    reading_end, writing_end = os.pipe()
    os.write(writing_end, b"the fox")
    os.close(writing_end)
    (document,) = reading(f"/dev/fd/{reading_end}", checkpoint=checkpoint).documents
    assert document.id == f"pipe-{reading_end}"
    os.close(reading_end)
    gone = "no such file or folder; a launcher hands no such pipe to its ranks: use - or a named pipe"
    assert refusal(f"/dev/fd/{reading_end}") == f"/dev/fd/{reading_end}: {gone}"
    assert refusal("/dev/zero") == "/dev/zero: is a device, which cannot be read as a document"
    assert refusal("/proc/self/cmdline").startswith("/proc/self/cmdline: not text: a zero byte"), "its size says 0"


def test_json_is_a_list_of_documents(folder):  # noqa: F811
    write("d.json", json.dumps([{"token_ids": [7]}, *LINES]))
    read = reading("d.json").documents
    assert [(d.id, d.source) for d in read[:2]] == [("d.json:0", "d.json: item 0"), ("d0", "d.json: item 1")]
    write("d.json", '{"id": "x", "token_ids": [1]}')
    assert refusal("d.json") == "d.json: must be a list of documents, not an object; an object per line is .jsonl"
    write("d.json", lines())
    named = "; name it .jsonl if it has an object per line"
    assert refusal("d.json") == f"d.json: not JSON: Extra data at line 2, column 1{named}"
    write("d.json", "[]")
    assert refusal("d.json") == "d.json: no documents: the list is empty"
    write("d.json", '[{"id": "x", "token_ids": [1]}, 3]')
    assert refusal("d.json") == 'd.json: item 1: must be an object with "text" or "token_ids", not an integer'


def test_integer_ids_are_their_digits(folder):  # noqa: F811
    write("d.jsonl", [{"id": 17, "token_ids": [1]}, {"id": 10**30, "token_ids": [2]}, {"token_ids": [3]}])
    assert ids("d.jsonl") == ["17", "1" + "0" * 30, "d.jsonl:3"]
    write("d.jsonl", [{"id": 17, "token_ids": [1]}, {"id": "17", "token_ids": [2]}])
    assert refusal("d.jsonl").startswith("two documents have the id '17': d.jsonl:1 and d.jsonl:2; ")


def test_columns_can_be_named(folder):  # noqa: F811
    write("d.jsonl", [{"id": "a", "uid": "u", "input_ids": [1], "more": [2, 3]}])
    assert [d.token_ids.tolist() for d in reading("d.jsonl").documents] == [[1]]
    (document,) = reading("d.jsonl", column="more", id_column="uid").documents
    assert (document.id, document.token_ids.tolist()) == ("u", [2, 3])
    it_has = 'it has "id", "uid", "input_ids", "more"'
    assert refusal("d.jsonl", column="body") == f'd.jsonl:1: the document has no "body" (--column); {it_has}'
    assert refusal("d.jsonl", id_column="no") == f'd.jsonl:1: the document has no "no" (--id-column); {it_has}'


def test_documents_are_chosen_by_id_and_number(folder):  # noqa: F811
    write("d.jsonl", LINES)
    write("e.jsonl", [{"id": f"e{i}", "token_ids": [1]} for i in range(3)])
    assert ids("d.jsonl", "e.jsonl", select="[02]$") == ["d0", "d2", "e0", "e2"]
    assert ids("d.jsonl", "e.jsonl", select="[02]$", limit=3) == ["d0", "d2", "e0"]
    assert ids("d.jsonl", "no-such-file", limit=4, skip_bad=True) == ["d0", "d1", "d2", "d3"]
    assert refusal("d.jsonl", select="^x\x1b") == "--select ^x\\x1b: found in the id of no document"
    with pytest.raises(UserError, match=r"--select \(: not a regular expression: missing \)"):
        ReadOptions(select="(")
    with pytest.raises(UserError, match="--limit must be at least 1, not 0"):
        ReadOptions(limit=0)


def test_all_bad_inputs_come_in_one_report(folder):  # noqa: F811
    write("good.jsonl", LINES)
    write("empty.txt", b"")
    broken = [b'{"id": "x", "token_ids": [300]}', b"nonsense", b'{"id": "y", "token_ids": [1]}', b"\xff"]
    write("mixed.jsonl", b"\n".join(broken))
    text = report("good.jsonl", "empty.txt", "no.txt", "mixed.jsonl", "good.jsonl")
    head, *listed = text.splitlines()
    assert head == "9 bad inputs; --skip-bad goes on without them:"
    assert [line.split(": ")[0].strip() for line in listed] == [
        "no.txt", "empty.txt", "mixed.jsonl:1", "mixed.jsonl:2", "mixed.jsonl",
        *(f"two documents have the id 'd{i}'" for i in range(4)),
    ]  # fmt: skip
    read = reading("good.jsonl", "empty.txt", "no.txt", "mixed.jsonl", skip_bad=True)
    assert [d.id for d in read.documents] == ["d0", "d1", "d2", "d3", "y"]
    assert [problem.strip() for problem in listed[:5]] == read.problems, "and the ones left out are told"
    write("many.jsonl", b"{\n" * 30)
    _, *listed = report("good.jsonl", "many.jsonl").splitlines()
    assert len(listed) == 21
    assert listed[-1] == "  and 10 more"
    assert report("many.jsonl", skip_bad=True).startswith("30 bad inputs; nothing else is there:")


def test_a_file_that_ends_badly_gives_nothing(folder):  # noqa: F811
    """Its first documents could be wrong too; and an id of theirs is free for others."""
    write("d.jsonl.gz", gzip.compress(lines())[:-3])
    write("good.jsonl", LINES[:1])
    read = reading("d.jsonl.gz", "good.jsonl", skip_bad=True)
    assert [(d.id, d.source) for d in read.documents] == [("d0", "good.jsonl:1")]
    assert len(read.problems) == 1


def test_documents_that_are_too_long_are_all_named(folder):  # noqa: F811
    write(
        "d.jsonl",
        [{"id": "a", "token_ids": [1] * 9}, {"id": "b", "token_ids": [1] * 8}, {"id": "c", "token_ids": [2] * 10}],
    )
    made = (
        "but no-such-checkpoint was made for 8 positions (max_position_embeddings); --allow-longer runs it all the same"
    )
    assert report("d.jsonl", max_positions=8).splitlines()[1:] == [
        f"  d.jsonl:1: document 'a' has 9 tokens, {made}",
        f"  d.jsonl:3: document 'c' has 10 tokens, {made}",
    ]
    assert ids("d.jsonl", max_positions=8, skip_bad=True) == ["b"]


def test_names_from_outside_are_shown_and_not_obeyed(folder):  # noqa: F811
    write("a\n\x1b[31mred.txt", b"")
    assert refusal("a\n\x1b[31mred.txt") == "a\\n\\x1b[31mred.txt: the file is empty"
    write("d.jsonl", [{"id": "x\n\x1b]0;title\x07" + "y" * 200_000, "token_ids": [300]}])
    message = refusal("d.jsonl")
    assert message.isprintable()
    assert "document 'x\\n\\x1b]0;title\\x07yyy" in message
    assert len(message) < 700
    assert refusal("n" * 5000).endswith("nnn: File name too long")
    assert len(refusal("n" * 5000)) < 600
    assert refusal("a\0b").startswith("a\\x00b: ")


def test_an_array_that_claims_more_than_there_is(folder):  # noqa: F811
    """The header's number is not believed: no memory is asked for."""
    np.save("e.npy", np.arange(3))
    data = Path("e.npy").read_bytes()
    write("e.npy", data.replace(b"(3,), }" + b" " * 14, b"(1000000000000,), }  "))
    claim = "its header asks for 8,000,000,000,000 bytes of numbers, 24 are there"
    assert refusal("e.npy") == f"e.npy: not a .npy file of numbers: {claim}"
    write("e.npy", data + b"x")
    assert refusal("e.npy").endswith("its header asks for 24 bytes of numbers, 25 are there")
    write("e.npy", data.replace(b"<i8", b"<i9"))
    assert refusal("e.npy").startswith("e.npy: not a .npy file of numbers: ")
    big_endian = np.arange(3, dtype=">u2")
    np.save("f.npy", big_endian)
    assert reading("f.npy").documents[0].token_ids.tolist() == [0, 1, 2]


def test_parquet(folder, checkpoint):  # noqa: F811
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["the fox", "the dog", "über"]
    parquet.write_table(pyarrow.table({"text": texts, "id": [5, 6, 7]}), "t.parquet", row_group_size=2)
    documents = reading("t.parquet", checkpoint=checkpoint).documents
    assert [(d.id, d.source) for d in documents][1:] == [("6", "t.parquet: row 1"), ("7", "t.parquet: row 2")]
    for document, text in zip(documents, texts, strict=True):
        write("one.txt", text)
        (alone,) = reading("one.txt", checkpoint=checkpoint).documents
        assert document.token_ids.tolist() == alone.token_ids.tolist()
    rows = [[1, 2, 3], [4], [5, 299]] * 50  # more than a batch
    for kind in (pyarrow.int32(), pyarrow.uint16(), pyarrow.int64()):
        for lists in (pyarrow.list_, pyarrow.large_list):
            table = pyarrow.table({"input_ids": pyarrow.array(rows, lists(kind))})
            parquet.write_table(table, "i.parquet")
            documents = reading("i.parquet").documents
            assert [d.token_ids.tolist() for d in documents] == rows
            assert documents[149].id == "i.parquet:149"
            assert all(d.token_ids.dtype == np.int32 and not d.token_ids.flags.writeable for d in documents)
    dictionary = pyarrow.array(texts).dictionary_encode()
    parquet.write_table(pyarrow.table({"body": dictionary, "text": [1, 2, 3]}), "b.parquet")
    assert len(ids("b.parquet", column="body", checkpoint=checkpoint)) == 3
    holds = "must hold text or lists of integers (token ids), not int64"
    assert refusal("b.parquet") == f'b.parquet: "text" {holds}'
    assert refusal("b.parquet", column="no") == 'b.parquet: the table has no "no" (--column); it has "body", "text"'


def test_rows_that_are_no_documents(folder):  # noqa: F811
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "input_ids": pyarrow.array([[1, 2], None, [1, None], [], [300], [1, 2]], pyarrow.list_(pyarrow.int32())),
        "attention_mask": [[1, 1], [1], [1, 1], [], [1], [1, 0]],
        "id": ["a", "b", "c", "d", "e", None],
    }
    parquet.write_table(pyarrow.table(columns), "t.parquet")
    assert [line.strip() for line in report("t.parquet").splitlines()[1:]] == [
        "t.parquet: row 1: document 'b' has no \"input_ids\": it is null",
        "t.parquet: row 2: document 'c' has 1 null among its \"input_ids\"",
        "t.parquet: row 3: document 'd' has no tokens",
        "t.parquet: row 4: document 'e' has token id 300 at index 0: the vocabulary has 300 tokens, 0 to 299",
        't.parquet: row 5: "id" must be an integer or a string that is not empty, not null',
    ]
    parquet.write_table(pyarrow.table({**columns, "id": list("abcdef")}), "t.parquet")
    padded = "t.parquet: row 5: document 'f' has padding: \"attention_mask\" is 0 at index 1; save it without"
    assert report("t.parquet").splitlines()[-1].strip() == padded
    data = Path("t.parquet").read_bytes()
    for cut in (len(data) - 1, 100, 3):
        write("t.parquet", data[:cut])
        assert refusal("t.parquet").startswith("t.parquet: not a whole .parquet file: "), cut
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "t.parquet")
    assert refusal("t.parquet") == "t.parquet: no documents: the table has no rows"


def save_dataset(where: str, parts: list[dict], **state) -> None:
    """What `datasets.Dataset.save_to_disk` writes."""
    import pyarrow

    files = []
    for i, part in enumerate(parts):
        table = pyarrow.table(part)
        files.append({"filename": f"data-{i:05d}-of-{len(parts):05d}.arrow"})
        with pyarrow.ipc.new_stream(Path(where, files[-1]["filename"]), table.schema) as stream:
            stream.write_table(table)
    write(f"{where}/state.json", json.dumps({"_data_files": files, **state}))
    write(f"{where}/dataset_info.json", "{}")


def test_a_saved_data_set(folder):  # noqa: F811
    pytest.importorskip("pyarrow")
    for split in ("train", "test"):
        Path("corpus", split).mkdir(parents=True)
        save_dataset(f"corpus/{split}", [{"input_ids": [[1, 2], [3]]}, {"input_ids": [[4]]}])
    write("corpus/dataset_dict.json", '{"splits": ["train", "test"]}')
    assert [(d.id, d.token_ids.tolist()) for d in reading("corpus/train").documents] == [
        ("train:0", [1, 2]), ("train:1", [3]), ("train:2", [4])
    ]  # fmt: skip
    both = reading("corpus").documents
    assert [d.id for d in both] == [f"{split}:{i}" for split in ("test", "train") for i in range(3)]
    assert both[3].source == "corpus/train: row 0"
    last = Path("corpus/train/data-00001-of-00002.arrow")
    data = last.read_bytes()
    last.write_bytes(data[:-8])  # where a reader of streams sees the end of the table
    assert refusal("corpus/train").startswith(f"{last}: cut short: ")
    last.unlink()
    assert refusal("corpus/train") == f"{last}: no such file, which state.json names"
    save_dataset("corpus/test", [{"text": ["x"]}], _indices_data_files=[{"filename": "indices.arrow"}])
    assert refusal("corpus/test").endswith("the data set is a choice of rows; save it after flatten_indices()")
    write("corpus/test/state.json", "{}")
    assert refusal("corpus/test") == "corpus/test: state.json is not that of a saved data set"


def test_tables_without_pyarrow(folder, monkeypatch):  # noqa: F811
    write("t.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal("t.parquet") == "t.parquet: tables need pyarrow: pip install 'cpmpi[data]'"


def test_what_is_packed_otherwise_is_no_text(folder):  # noqa: F811
    write("a.bz2", bz2.compress(b"text"))
    assert refusal("a.bz2").startswith("a.bz2: not ")


def test_a_job_with_bad_inputs_goes_on_without_them_and_says_which(tmp_path):
    """On two ranks and through a pipe, quietly: what is left out is told all the same."""
    save_llama(tmp_path / "model", 2, layers=1)
    write(f"{tmp_path}/in/empty.txt", b"")
    write(f"{tmp_path}/in/e.jsonl.gz", gzip.compress(lines([{"id": 7, "input_ids": [1, 2, 3]}, {"id": "b"}])))
    line = [mpirun_path(), "--oversubscribe", "--bind-to", "none", "-n", "2"]
    line += [sys.executable, "-m", "cpmpi", "score", "--model", "model", "--output", "run", "--quiet"]
    os.mkfifo(tmp_path / "pipe")

    def launch(*more: str) -> tuple[int, str]:
        done = subprocess.run(
            [*line, "--input", *more], cwd=tmp_path, env=clean_environment(), input=lines(LINES),
            capture_output=True, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout.decode() + done.stderr.decode()

    status, refused = launch("-", "in")
    assert status == 1
    told = re.search(
        r"^error: 3 bad inputs; --skip-bad goes on without them:\n  standard .*\n  .*\n  .*\n", refused, re.M
    )
    assert told, refused
    assert (
        "  standard input: Open MPI's launcher does not pass it on as it is: use a file, or mkfifo's pipe\n" in refused
    )
    assert not (tmp_path / "run").exists()
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(lines()))
    writer.start()
    status, printed = launch("pipe", "in", "--skip-bad", "--select", "^(d[12]|7)$", "--limit", "4")
    writer.join()
    assert status == 0, printed
    left_out = [text for text in printed.splitlines() if text.startswith("left out: ")]
    assert [text.partition(": ")[2].partition(": ")[0] for text in left_out] == ["in/e.jsonl.gz:2", "in/empty.txt"]
    with open_run(tmp_path / "run") as run:
        assert [(d.id, d.source) for d in run.documents] == [
            ("d1", "pipe:2"), ("d2", "pipe:3"), ("7", "in/e.jsonl.gz:1")
        ]  # fmt: skip
