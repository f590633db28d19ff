"""What is wrong with stored documents and what shall follow them: one line each, in `extend` and in `generate` alike.

`export` and `import` have such tests of their own.
"""

from __future__ import annotations

import json
import re
import shutil

import h5py
import numpy as np
import pytest

from cpmpi.run.hdf5 import changed_file, set_attribute
from cpmpi.run.paths import RunPaths
from tests.test_bad_input import call
from tests.test_continuations import CHECKPOINT

TEXT = "class Decimal:\n    def value(self):\n        return sel"


def flip(path, offset) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 1
        file.seek(offset)
        file.write(bytes([byte]))


def make_runs(folder, capsys) -> None:
    """A run of two documents, and what became of copies of it and of its checkpoint."""
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text(TEXT * 2)
    words = ["--quiet", "--model", str(CHECKPOINT), "--input", f"{folder}/a.txt", f"{folder}/b.txt", "--output"]
    assert call(["prefill", *words, f"{folder}/run"], capsys)[0] == 0
    assert call(["score", *words, f"{folder}/bare"], capsys)[0] == 0
    for name in ("begun", "damaged", "lost"):
        shutil.copytree(folder / "run", folder / name)
    with changed_file(RunPaths(folder / "begun").index) as file:
        set_attribute(file, "complete", False)
        set_attribute(file["documents/000001"], "complete", False)
    shard = RunPaths(folder / "damaged").shard(0)
    with h5py.File(shard) as file:
        key = file["documents/000001/key"]
        offset = key.id.get_offset() + 2 * np.prod(key.shape[1:]) * 2 + 5  # in layer 2
    flip(shard, int(offset))
    RunPaths(folder / "lost").shard(0).unlink()
    shutil.copytree(CHECKPOINT, folder / "changed")
    weights = next((folder / "changed").glob("*.safetensors"))
    flip(weights, weights.stat().st_size - 1)


@pytest.mark.slow
@pytest.mark.mpi(1)
def test_extend_and_generate_refuse_alike(tmp_path, capsys):
    make_runs(tmp_path, capsys)
    line = {"document": "b.txt", "id": "a", "text": "f.value\n"}
    lines = {
        "good": json.dumps(line),
        "unknown": json.dumps({**line, "document": "b.text"}),
        "empty": json.dumps({**line, "text": ""}),
        "long": json.dumps({**line, "text": None, "token_ids": [1] * 131_073}).replace('"text": null, ', ""),
        "broken": json.dumps(line) + '\n{"document": "b.txt", "id"\n',
    }
    for name, text in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    extend = ["extend", "--quiet", "--output", f"{tmp_path}/out"]
    generate = ["generate", "--quiet", "--max-new-tokens", "2"]
    shard = r"rank-00000\.h5: document 'b\.txt': layer 2: key of tokens 0 to \d+ does not have its checksum"
    cases = [
        # the run, the checkpoint, the lines, options of generate, what both say; None: that command is not asked
        ("run", CHECKPOINT, "unknown", ["--document", "b.text"], r"no document 'b\.text' in .*; the closest: 'b\.txt'"),
        ("begun", CHECKPOINT, "good", ["--document", "b.txt"], r"document 'b\.txt' of .*begun is not finished"),
        ("bare", CHECKPOINT, "good", [], r"bare: keeps no keys and values \(it was made by `cpmpi score`\)"),
        ("run", tmp_path / "changed", "good", [], "changed: its model has the digest .* was made with another one"),
        ("damaged", CHECKPOINT, "good", ["--document", "b.txt"], shard),
        ("damaged", CHECKPOINT, "good", ["--document", "b.txt", "--kv", "mapped"], shard),
        ("lost", CHECKPOINT, "good", ["--document", "b.txt"], r"shards/rank-00000\.h5: no such file"),
        ("run", CHECKPOINT, "long", ["--document", "b.txt", "--max-new-tokens", "131072"], "than the 131072 positions"),
        ("run", CHECKPOINT, "empty", ["--document", "b.txt", "--prompt", ""], "empty"),
        ("run", CHECKPOINT, "broken", None, r"broken\.jsonl:2: not JSON"),
        ("run", CHECKPOINT, None, [], r"holds 2 documents \('a\.txt', 'b\.txt', \.\.\.\): choose one with --document"),
    ]
    for run, model, given, options, reason in cases:
        words = ["--run", f"{tmp_path}/{run}", "--model", str(model)]
        commands = []
        if given is not None:
            kv = ["--kv", "mapped"] if options and "mapped" in options else []
            commands.append([*extend, *words, *kv, "--input", f"{tmp_path}/{given}.jsonl"])
        if options is not None:
            prompt = [] if "--prompt" in options else ["--prompt", "f.value"]
            commands.append([*generate, *words, *prompt, *options])
        for command in commands:
            status, told = call(command, capsys)
            assert status == 1, (command, told)
            assert re.match(f"error: .*{reason}", told), (command, told)
            assert told.count("\n") == 1, told
            shutil.rmtree(tmp_path / "out", ignore_errors=True)  # a folder for logs, where the work had begun
            assert sorted(tmp_path.rglob("*")) == before, command
    good = ["--run", f"{tmp_path}/run", "--model", str(CHECKPOINT)]
    said = call(["extend", *good, "--output", f"{tmp_path}/out", "--input", f"{tmp_path}/good.jsonl"], capsys)
    assert said[0] == 0
    assert re.search(r"note: the tokenizer would have joined the first token of 1 text .*give token_ids", said[1])
    said = call(["generate", *good, "--document", "b.txt", "--prompt", "f.value", "--max-new-tokens", "1"], capsys)
    assert said[0] == 0
    assert re.search(r"note: the tokenizer would have joined the first token of 1 prompt .*begin the prompt", said[1])
    said = call(["generate", *good, "--document", "b.txt", "--prompt", "\n", "--max-new-tokens", "1"], capsys)
    assert "note: the tokenizer" not in said[1]
