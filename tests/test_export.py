"""Documents for other tools, read by these tools; nothing in memory as a whole, and nothing half on disk."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from cpmpi import open_run
from cpmpi.documents.token_texts import token_texts
from cpmpi.documents.tokenization import load_tokenizer, tokenize
from cpmpi.errors import UserError
from cpmpi.jobs.cli import cli
from cpmpi.model.cached_keys import check_cached
from cpmpi.model.checkpoint import Blueprint
from cpmpi.model.fingerprint import tokenizer_sha256
from cpmpi.run.document import Document
from cpmpi.run.export import tables, tensors
from cpmpi.run.export.columns import batches, stored_columns
from cpmpi.run.folder import start_index
from cpmpi.run.paths import RunPaths
from tests.families import FAMILIES
from tests.runs import kv_of, make_run, make_spec, outputs_of
from tests.test_continuations import CHECKPOINT
from tests.test_kv_shapes import UNEQUAL
from tests.tiny_models import tiny_config

TEXT = 'def f(x):\n    """é 日本 🎉\u200d🎉 naïve\t"""\n    return x\n\n\n' * 3


def export(*arguments):
    """Exit status, and the one line that the command says."""
    done = CliRunner().invoke(cli, ["export", *map(str, arguments)])
    told = isinstance(done.exception, UserError)
    return done.exit_code, str(done.exception) if told else done.output


@pytest.mark.parametrize(("layout", "dtype"), [("transformers", "bfloat16"), ("safetensors", "float32")])
def test_keys_and_values_are_those_of_the_run_in_their_type(tmp_path, monkeypatch, layout, dtype):
    kv, n = replace(UNEQUAL, dtype=dtype), 2100
    make_run(tmp_path / "run", make_spec((n, 3), world=3, kv=kv))
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 1)
    whole, sizes = Document.kv, []
    monkeypatch.setattr(Document, "kv", lambda d, i, a, b, **k: (sizes.append(b - a), whole(d, i, a, b, **k))[1])
    assert export(tmp_path / "run", "--to", layout, "--output", tmp_path / "kv")[0] == 0
    assert max(sizes) == tensors.BLOCK_TOKENS  # never a layer, not to speak of a document
    assert sorted(p.name for p in (tmp_path / "kv").iterdir()) == ["000000.safetensors", "000001.safetensors"]
    found = load_file(tmp_path / "kv" / "000000.safetensors")
    for layer in range(kv.layers):
        for name, want_TGD in zip(("key", "value"), kv_of(0, layer, n, kv), strict=True):
            want = want_TGD.transpose(0, 1)[None] if layout == "transformers" else want_TGD
            got = found.pop(f"layers.{layer}.{name}")
            assert got.dtype == getattr(torch, dtype)
            assert torch.equal(got, want.to(got.dtype)), (layer, name)
    for name, want in outputs_of(0, n).items():
        np.testing.assert_array_equal(found.pop(name).numpy(), want)
    assert not found
    with safe_open(tmp_path / "kv" / "000001.safetensors", "pt") as file:
        assert (file.metadata()["id"], file.metadata()["model_sha256"]) == ("d1", "a" * 64)


def test_a_table_has_a_row_for_each_token(tmp_path, monkeypatch):
    """Of all documents, bit for bit, as Parquet and as CSV, in batches; without text where there is no tokenizer."""
    make_run(tmp_path / "run", make_spec((50, 1, 7)))
    monkeypatch.setattr(tables, "batches", lambda document, texts: batches(document, texts, rows=16))
    for kind in ("parquet", "csv"):
        status, said = export(tmp_path / "run", "--to", kind, "--output", tmp_path / f"t.{kind}")
        assert status == 0, said
        assert said.startswith("no column `text`: the run's tokenizer is not at")
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    types = {name: str(table.schema.field(name).type) for name in table.schema.names}
    assert types == {"document": "large_string", "position": "int64", "token_id": "int32", "logprob": "float"}
    plain = pyarrow.csv.read_csv(tmp_path / "t.csv")
    assert plain.schema.names == table.schema.names
    of = np.concatenate([[f"d{i}"] * n for i, n in enumerate((50, 1, 7))])
    outputs = [outputs_of(i, n) for i, n in enumerate((50, 1, 7))]
    for read in (table, plain):
        assert read["document"].to_pylist() == of.tolist()
        assert read["position"].to_pylist() == [*range(50), 0, *range(7)]
        np.testing.assert_array_equal(read["token_id"].to_numpy(), np.concatenate([o["token_ids"] for o in outputs]))
        logprobs = read["logprob"].to_numpy().astype(np.float32)
        np.testing.assert_array_equal(logprobs, np.concatenate([o["logprobs"] for o in outputs]))


def test_one_document_and_one_that_has_an_awkward_name(tmp_path):
    name = 'a "b",\nc'
    spec = make_spec((5, 9))
    make_run(tmp_path / "run", replace(spec, documents=(replace(spec.documents[0], id=name), *spec.documents[1:])))
    assert export(tmp_path / "run", "--to", "csv", "--output", tmp_path / "t", "--document", name)[0] == 0
    with open(tmp_path / "t", newline="") as file:
        assert [row["document"] for row in csv.DictReader(file)] == [name] * 5
    words = "--to", "safetensors", "--output", tmp_path / "d1.safetensors"
    assert export(tmp_path / "run", *words, "--document", "d1")[0] == 0
    assert len(load_file(tmp_path / "d1.safetensors")["token_ids"]) == 9


def test_whatever_is_stored_for_each_token_is_a_column(tmp_path):
    """Known by the label of its first axis: several numbers a token are a list, or columns of their own."""

    class Kept:
        id, n_tokens, run = "d", 5, None

        def __init__(self, group):
            self.group = group

        @property
        def token_ids(self):
            return self.group["token_ids"][:]

    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("documents/000000")
        for name, values, label in (
            ("token_ids", np.arange(5, dtype=np.int32), "token"),
            ("logprobs", np.arange(5, dtype=np.float32), "token"),
            ("last_hidden", np.zeros(5, np.float32), "hidden"),
            ("greedy", np.array([0, 1, 0, 1, 1], np.uint8), "token"),
            ("keep/topk_logprobs", np.arange(10, dtype=np.float32).reshape(5, 2) / 3, "token"),
            ("entropy", np.arange(5, dtype=np.float64), "token"),
            ("kv/key", np.zeros((5, 2)), "token"),
        ):
            group[name] = values
            group[name].dims[0].label = label
        document = Kept(group)
        assert [*stored_columns(document)] == ["token_ids", "logprobs", "entropy", "greedy", "keep_topk_logprobs"]
        tables.write_parquet([document], tmp_path / "t.parquet", None)
        tables.write_csv([document], tmp_path / "t.csv", None)
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert str(table.schema.field("keep_topk_logprobs").type) == "fixed_size_list<element: float>[2]"
    assert table["greedy"].to_pylist() == [False, True, False, True, True]
    assert table["entropy"].to_pylist() == [0, 1, 2, 3, 4]
    want = (np.arange(10, dtype=np.float32) / 3).reshape(5, 2)
    np.testing.assert_array_equal(np.array(table["keep_topk_logprobs"].to_pylist(), np.float32), want)
    plain = pyarrow.csv.read_csv(tmp_path / "t.csv")
    assert plain["greedy"].to_pylist() == [False, True, False, True, True]
    np.testing.assert_array_equal(plain["keep_topk_logprobs_1"].to_numpy().astype(np.float32), want[:, 1])


def make_text_run(folder, model):
    """A run whose tokens are those of ``TEXT``, in the name of the demo's tokenizer."""
    ids = tokenize(load_tokenizer(CHECKPOINT), TEXT)
    spec = make_spec(
        (len(ids),), kv=None, tokenizer_sha256=tokenizer_sha256(CHECKPOINT), model=json.dumps({"_name_or_path": model})
    )
    index = start_index(folder, replace(spec, documents=(replace(spec.documents[0], token_ids_sha256=""),)))
    index.write_outputs(0, **(outputs_of(0, len(ids)) | {"token_ids": ids}))
    index.finish()


def test_the_tokens_of_a_table_have_their_text(tmp_path):
    """Together they are the document, each at its place; characters of several tokens belong to the last of them."""
    make_text_run(tmp_path / "run", f"{CHECKPOINT}/config.json")
    make_text_run(tmp_path / "lost", "/nowhere/config.json")
    for run, more in (("run", ()), ("lost", ("--model", CHECKPOINT))):
        output = tmp_path / f"{run}.parquet"
        assert export(tmp_path / run, "--to", "parquet", "--output", output, *more)[0] == 0
        table = pyarrow.parquet.read_table(output)
        assert [str(table.schema.field(name).type) for name in ("text", "char_start")] == ["large_string", "int64"]
        texts, starts = table["text"].to_pylist(), table["char_start"].to_pylist()
        assert "".join(texts) == TEXT
        assert starts == [sum(map(len, texts[:i])) for i in range(len(texts))]
        assert "" in texts
        assert "日" in texts
    (tmp_path / "other").mkdir()
    shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    words = "--to", "csv", "--output", tmp_path / "t.csv", "--model", tmp_path / "other"
    assert "its tokenizer has the digest" in export(tmp_path / "run", *words)[1]


def test_texts_of_any_tokens_are_the_text():
    tokenizer = load_tokenizer(CHECKPOINT)
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, 1024, 300)
        found = list(token_texts(tokenizer, ids))
        assert len(found) == 300
        assert "".join(found).replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")
    assert list(token_texts(tokenizer, [])) == []


def test_damage_is_named_and_leaves_nothing_half(tmp_path):
    make_run(tmp_path / "run", make_spec((50, 7)))
    shard = RunPaths(tmp_path / "run").shard(1)
    with h5py.File(shard) as file:
        offset = file["documents/000001/key"].id.get_offset()
    with open(shard, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 1
        file.seek(offset)
        file.write(bytes([byte]))
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / "000000.safetensors").write_text("an older one")
    (tmp_path / "one.safetensors").write_text("an older one")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for words in (("kv", "--overwrite"), ("new",), ("one.safetensors", "--overwrite", "--document", "d1")):
        output, *more = words
        status, said = export(tmp_path / "run", "--to", "safetensors", "--output", tmp_path / output, *more)
        assert status == 1
        assert "rank-00001.h5: document 'd1': layer 0: key of tokens" in said
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "new").exists()
    assert export(tmp_path / "run", "--to", "csv", "--output", tmp_path / "t")[0] == 0  # needs no shard
    words = "--to", "safetensors", "--output", tmp_path / "kv", "--overwrite", "--document", "d0"
    assert export(tmp_path / "run", *words)[0] == 0
    assert len(load_file(tmp_path / "kv" / "000000.safetensors")["token_ids"]) == 50


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    make_run(tmp_path / "run", make_spec((5, 9)))
    make_run(tmp_path / "begun", make_spec((5, 9)), stop_after=1)
    make_run(tmp_path / "bare", make_spec((5,), kv=None), stop_after=0)
    index = start_index(tmp_path / "bare", make_spec((5,), kv=None))
    index.write_outputs(0, **outputs_of(0, 5))
    index.finish()
    (tmp_path / "there").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("x")
    new = ("--output", tmp_path / "new")
    cases = [
        ("absent", ("csv", *new), "absent: no run here"),
        ("run", ("csv", *new, "--document", "d2"), "--document: no document 'd2' in .*; the closest: 'd"),
        ("begun", ("csv", *new), "document 'd1' is not finished; 1 of 2 documents are finished: choose among them"),
        ("begun", ("csv", *new, "--document", "d1"), "document 'd1' of .* is not finished; prefill it first"),
        ("bare", ("safetensors", *new), "the run keeps no KV .*; parquet and csv have what is stored"),
        ("run", ("csv", "--output", tmp_path / "there"), "there: exists already; choose another one, or --overwrite"),
        ("run", ("csv", "--output", tmp_path / "folder", "--overwrite"), "folder: is a folder; a table is one file"),
        ("run", ("safetensors", "--output", tmp_path / "folder", "--overwrite"), "holds mine.txt, which no export"),
        ("run", ("csv", "--output", tmp_path / "run" / "t.csv"), "is in the run folder"),
        ("run", ("csv", "--output", tmp_path / "no" / "t.csv"), "no folder .*/no"),
        ("run", ("csv", *new, "--model", tmp_path / "no"), "--model .*/no: no such checkpoint folder"),
        ("run", ("safetensors", "--output", tmp_path / "a.safetensors"), "is one file, but there are 2 documents"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for run, words, reason in cases:
        status, said = export(tmp_path / run, "--to", *words)
        assert status == 1, words
        assert re.search(reason, said), (words, said)
        assert sorted(tmp_path.rglob("*")) == before, words
    status, said = export(tmp_path / "run", "--to", "llama.cpp", *new)
    assert status == 2
    assert "'transformers', 'safetensors', 'parquet', 'csv'" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    assert "(5 bytes) free" in export(tmp_path / "run", "--to", "safetensors", *new)[1]


def test_models_whose_caches_hold_something_else_are_refused(tmp_path):
    """transformers caches the latent of latent attention, and a run stores what attention gets."""
    own = {family.name: family for family in FAMILIES}
    for name, refused in (("gpt-oss", False), ("DeepSeek V3", True), ("Differential Llama", True)):
        tiny_config(own[name].model_type, **own[name].own).save_pretrained(tmp_path / name)
        skeleton = Blueprint(tmp_path / name).skeleton(torch.float32)
        if not refused:
            check_cached(skeleton)
            continue
        with pytest.raises(UserError, match="transformers caches other keys and values than its attention gets"):
            check_cached(skeleton)


def test_nothing_is_written_where_the_run_cannot_be_opened(tmp_path):
    make_run(tmp_path / "run", make_spec((5,)))
    RunPaths(tmp_path / "run").shard(1).unlink()
    status, said = export(tmp_path / "run", "--to", "safetensors", "--output", tmp_path / "kv")
    assert (status, said) == (1, f"{RunPaths(tmp_path / 'run').shard(1)}: no such file")
    assert not (tmp_path / "kv").exists()
    with open_run(tmp_path / "run") as run:
        assert len(run.documents) == 1


@pytest.mark.mpi(1)
def test_the_documented_lines_go_on_in_transformers(tmp_path):
    """The lines as they stand in docs/export.md: tokens are those of the whole text from scratch; and the way back."""
    import safetensors.torch
    import transformers

    import cpmpi
    from tests.conftest import ROOT

    lines, saving = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "export.md").read_text(), re.M | re.S)
    assert lines.count("\n") == 4
    (tmp_path / "book.txt").write_text(TEXT)
    cpmpi.prefill(model=CHECKPOINT, inputs=tmp_path / "book.txt", output=tmp_path / "run", kv_dtype="float32").close()
    words = "--to", "transformers", "--document", "book.txt", "--output", tmp_path / "book.safetensors"
    assert export(tmp_path / "run", *words)[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(CHECKPOINT)
    prompt_ids = torch.from_numpy(tokenize(tokenizer, "\ndef g(y):").astype(np.int64))
    model.generation_config.max_new_tokens = 20
    whole = torch.cat([torch.from_numpy(tokenize(tokenizer, TEXT).astype(np.int64)), prompt_ids])[None]
    names = {
        "safetensors": safetensors, "transformers": transformers, "torch": torch, "model": model,
        "prompt_ids": prompt_ids,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(lines, names)
    assert torch.equal(names["answer"], model.generate(whole))
    names |= {"token_ids": whole[0, : -len(prompt_ids)]}
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.chdir(tmp_path)
        exec(saving, names)
    with cpmpi.import_kv(model=CHECKPOINT, files=tmp_path / "book.safetensors", output=tmp_path / "again") as run:
        key_TGD, _ = run.documents["book"].kv(1)
    np.testing.assert_allclose(key_TGD, names["t"]["layers.1.key"][0].transpose(0, 1), atol=1e-3)
    names["t"]["layers.0.value"][:] = 0  # it is what was stored that answers
    cache = transformers.DynamicCache(
        [(names["t"][f"layers.{i}.key"], names["t"][f"layers.{i}.value"]) for i in range(3)]
    )
    assert not torch.equal(model.generate(whole, past_key_values=cache), model.generate(whole))
