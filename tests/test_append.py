"""Long texts after stored documents, scored or appended, equal the whole text computed from scratch by transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.test_exact import VOCABULARY, compare, save_llama, shared_folder, truth

CONTEXT = 301


def ids_of(n: int, seed: int):
    return np.random.default_rng(seed).integers(0, VOCABULARY, n).astype(np.int64)


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def prefilled(folder, comm, name="run", **options):
    """A run of one document with float32 keys, by the ranks of this launch."""
    import cpmpi

    if comm.rank == 0 and not (folder / "model").exists():
        save_llama(folder / "model", 2)
        np.save(folder / "context.npy", ids_of(CONTEXT, 5))
    comm.Barrier()
    cpmpi.prefill(
        model=folder / "model", inputs=folder / "context.npy", output=folder / name, kv_dtype="float32", **options
    ).close()


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 2, 3)])
def test_long_continuations_are_dealt_over_the_ranks(ranks, tmp_path, monkeypatch):
    """By every schedule, with answers after a long question, a long answer, a part of the document, and short ones."""
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM

    import cpmpi
    from cpmpi.engine import trunk

    from .test_extend import scratch

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    prefilled(folder, comm)
    stem, tail = ids_of(70, 1).tolist(), ids_of(90, 2).tolist()
    lines = [
        {"document": "context.npy", "id": "long", "token_ids": tail},
        {"document": "context.npy", "id": "asked", "choices": [ids_of(n, n).tolist() for n in (4, 80, 2)]},
        {"document": "context.npy", "id": "short", "token_ids": ids_of(5, 4).tolist()},
        {"document": "context.npy", "id": "early", "token_ids": tail, "upto": 17},
    ]
    if comm.rank == 0:
        write_lines(folder / "lines.jsonl", *lines)
    judged = []
    monkeypatch.setattr(
        "cpmpi.engine.continuations.judge", lambda *given: judged.append(given[2]) or trunk.judge(*given)
    )

    def all_that_are_long(questions, _):
        joints = [joint for _, joint in trunk.candidates(questions, 60)]
        return joints, trunk.without(questions, joints)

    monkeypatch.setattr("cpmpi.engine.continuations.plan", all_that_are_long)
    monkeypatch.setattr("cpmpi.engine.continuations.read_continuations", with_stem(stem))
    comm.Barrier()
    given = {"run": folder / "run", "inputs": folder / "lines.jsonl", "chunk_tokens": 16, "segments": 3}
    ways = {"tree": {"kv": "mapped"}, "ring": {}, "hybrid": {"check_finite": True}}
    if ranks == 2:
        ways["auto"] = {"tp": 2}
    for kind, options in ways.items():
        cpmpi.extend(**given, attention=kind, **options, output=folder / kind).close()
    assert {joint.whole for joint in judged} == {True, False}
    comm.Barrier()
    if comm.rank:
        return
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    for kind in ways:
        with cpmpi.open_run(folder / kind) as run:
            for line in lines:
                context = ids_of(CONTEXT, 5)[: line.get("upto")]
                for i, answer in enumerate(line.get("choices") or [line["token_ids"]]):
                    d = run.documents[f"{line['id']}/{i}" if "choices" in line else line["id"]]
                    asked = np.array(stem) if "choices" in line else ids_of(0, 0)
                    logprobs, greedy = scratch(model.eval(), context, asked, np.array(answer))
                    assert np.abs(d.logprobs - logprobs).max() <= 1e-4, (kind, d.id)
                    assert (d.greedy == greedy).all(), (kind, d.id)


def with_stem(stem):
    """Lines as they are read, with token ids as the question before choices: a text would need a tokenizer."""
    from dataclasses import replace

    from cpmpi.documents.continuations import read_continuations

    def read(*args, **kwargs):
        lines = read_continuations(*args, **kwargs)
        return [replace(line, stem=np.array(stem, np.int64)) if line.chosen else line for line in lines]

    return read


@pytest.mark.mpi(3)
def test_texts_are_appended_twice_by_other_ranks_each_time(tmp_path, capsys):
    """By 1 rank, then 3: the run is what a prefill of the whole text would be, and goes on to be used."""
    import torch
    from mpi4py import MPI
    from transformers import AutoModelForCausalLM

    import cpmpi
    from cpmpi.run.verify import verify_run

    from .test_bad_input import call
    from .test_extend import scratch

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    prefilled(folder, comm)
    first, second = ids_of(40, 7), ids_of(101, 8)
    if comm.rank == 0:
        write_lines(
            folder / "first.jsonl", {"document": "context.npy", "id": "first", "token_ids": first.tolist()}
        )  # fmt: skip
        write_lines(
            folder / "both.jsonl",
            {"document": "context.npy", "id": "first", "token_ids": first.tolist()},
            {"document": "context.npy", "id": "second", "token_ids": second[:100].tolist()},
            {"document": "context.npy", "id": "third", "token_ids": second[100:].tolist()},
        )
        write_lines(folder / "after.jsonl", {"document": "context.npy", "id": "a", "token_ids": ids_of(6, 9).tolist()})
    comm.Barrier()
    with monkeypatched_world(comm, comm.rank == 0) as alone:
        if alone:
            cpmpi.extend(run=folder / "run", inputs=folder / "first.jsonl", append=True).close()
    comm.Barrier()
    options = {"chunk_tokens": 16, "attention": "tree", "kv": "mapped"}
    with cpmpi.extend(run=folder / "run", inputs=folder / "both.jsonl", append=True, **options) as run:
        assert [part.id for part in run.documents[0].appended] == ["first", "second", "third"]
        assert [len(one.sizes) for one in run.shard_sets.values()] == [3, 1, 3, 3]
        held = [sum(p.size for p in run.documents[0].appended[1].pieces(r)) for r in range(3)]
        assert max(held) - min(held) <= 2
    scores = {"run": folder / "run", "inputs": folder / "after.jsonl"}
    cpmpi.extend(**scores, output=folder / "scores").close()
    again = ["extend", "--append", "--quiet", "--run", f"{folder}/run", "--input", f"{folder}/both.jsonl"]
    before = (folder / "run" / "run.h5").read_bytes()
    status, told = call(again, capsys)
    assert status == 0
    comm.Barrier()
    assert (folder / "run" / "run.h5").read_bytes() == before, "nothing is appended twice"
    if comm.rank:
        return
    assert "0 texts appended, 3 were there already" in told
    assert verify_run(folder / "run").problems == []
    whole = np.concatenate([ids_of(CONTEXT, 5), first, second])
    with cpmpi.open_run(folder / "run") as run:
        compare(run.documents[0], *truth(folder / "model", whole))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    with cpmpi.open_run(folder / "scores") as run:
        logprobs, _ = scratch(model.eval(), whole, ids_of(0, 0), ids_of(6, 9))
        assert np.abs(run.documents[0].logprobs - logprobs).max() <= 1e-4
        assert run.documents[0].continues["context_tokens"] == len(whole)


class monkeypatched_world:
    """Within it ``start`` gives each rank a world of its own; True on the rank that is to work."""

    def __init__(self, comm, works):
        self.comm, self.works, self.patch = comm, works, pytest.MonkeyPatch()

    def __enter__(self):
        from mpi4py import MPI

        from cpmpi.comm.ranks import Ranks

        for room in ("append", "continuations", "generate", "run"):
            self.patch.setattr(f"cpmpi.engine.{room}.start", lambda: Ranks(MPI.COMM_SELF))
        return self.works

    def __exit__(self, *_):
        self.patch.undo()
