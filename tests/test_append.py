"""Long texts after stored documents, scored or appended, equal the whole text computed from scratch by transformers."""

from __future__ import annotations

import errno
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


@pytest.mark.parametrize("ranks", [
    pytest.param(2, marks=pytest.mark.mpi(2)),
    *(pytest.param(n, marks=(pytest.mark.mpi(n), pytest.mark.slow)) for n in (1, 3)),
])  # fmt: skip
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
    assert call(again, capsys)[0] == 0
    comm.Barrier()
    assert (folder / "run" / "run.h5").read_bytes() == before, "nothing is appended twice"
    if comm.rank:
        return
    assert verify_run(folder / "run").problems == []
    whole = np.concatenate([ids_of(CONTEXT, 5), first, second])
    with cpmpi.open_run(folder / "run") as run:
        compare(run.documents[0], *truth(folder / "model", whole))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    with cpmpi.open_run(folder / "scores") as run:
        logprobs, _ = scratch(model.eval(), whole, ids_of(0, 0), ids_of(6, 9))
        assert np.abs(run.documents[0].logprobs - logprobs).max() <= 1e-4
        assert run.documents[0].continues["context_tokens"] == len(whole)
    check_exports(folder, model, whole, logprobs)


def check_exports(folder, model, whole, logprobs):
    """An appended document in the hands of other tools: transformers goes on from its end, and no token is missing."""
    import pyarrow.parquet
    import torch
    from safetensors.torch import load_file
    from transformers import DynamicCache

    import cpmpi

    from .test_export import export

    for kind in ("transformers", "safetensors", "parquet"):
        name = f"{kind}.{'parquet' if kind == 'parquet' else 'safetensors'}"
        status, said = export(folder / "run", "--to", kind, "--output", folder / name)
        assert status == 0, said
    t = load_file(folder / "transformers.safetensors")
    after = torch.from_numpy(ids_of(6, 9))
    cache = DynamicCache([(t[f"layers.{i}.key"], t[f"layers.{i}.value"]) for i in range(2)])
    with torch.inference_mode():
        logits_TV = model(input_ids=after[None], past_key_values=cache).logits[0]
    found = torch.log_softmax(logits_TV, -1)[:-1].gather(1, after[1:, None])[:, 0]
    assert np.abs(found.numpy() - logprobs[1:]).max() <= 1e-4
    plain, table = load_file(folder / "safetensors.safetensors"), pyarrow.parquet.read_table(folder / "parquet.parquet")
    assert table["position"].to_pylist() == [*range(len(whole))]
    with cpmpi.open_run(folder / "run") as run:
        document = run.documents[0]
        for ids in (t["token_ids"].numpy(), plain["token_ids"].numpy(), table["token_id"].to_numpy()):
            np.testing.assert_array_equal(ids, whole)
        for values in (t["logprobs"].numpy(), plain["logprobs"].numpy(), table["logprob"].to_numpy()):
            np.testing.assert_array_equal(values, document.logprobs)
        np.testing.assert_array_equal(t["last_hidden"].numpy(), document.last_hidden)
        for layer in range(2):
            for name, rows_TGD in zip(("key", "value"), document.kv(layer, raw=True), strict=True):
                np.testing.assert_array_equal(plain[f"layers.{layer}.{name}"].numpy(), rows_TGD)
                np.testing.assert_array_equal(t[f"layers.{layer}.{name}"][0].transpose(0, 1).numpy(), rows_TGD)


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


@pytest.mark.mpi(1)
def test_a_job_that_is_killed_while_it_appends_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    """In the middle of the layers, after all of them, at the switch, and between two groups."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.run.verify import verify_run

    from .power_cut import cut_at

    folder = shared_folder(tmp_path)
    prefilled(folder, MPI.COMM_WORLD)
    first, second = ids_of(40, 7), ids_of(20, 8)
    texts = [("first", first), ("second", second)]
    write_lines(
        folder / "lines.jsonl",
        *[{"document": "context.npy", "id": name, "token_ids": ids.tolist()} for name, ids in texts],
    )
    given = {"run": folder / "run", "inputs": folder / "lines.jsonl", "append": True}
    whole = np.concatenate([ids_of(CONTEXT, 5), first, second])
    places = [
        ("cpmpi.engine.append", "create_shard", 1, 0), ("cpmpi.run.writer.ShardWriter", "put", 2, 0),
        ("cpmpi.run.writer.ShardWriter", "finish", 1, 0), ("cpmpi.run.growth", "create_index", 1, 0),
        ("os", "replace", 2, 0), ("cpmpi.run.writer.ShardWriter", "put", 3, 40), ("os", "replace", 2, 40),
    ]  # fmt: skip
    for module, name, call, there in places:
        with cut_at(monkeypatch, f"{module}.{name}", call):
            cpmpi.extend(**given)
        assert verify_run(folder / "run").problems == [], (module, name)
        with cpmpi.open_run(folder / "run") as run:
            assert run.documents[0].n_tokens == CONTEXT + there, (module, name)
    cpmpi.extend(**given).close()
    assert verify_run(folder / "run").problems == []
    assert len(list((folder / "run" / "shards").iterdir())) == 3, "what was left behind is gone"
    with cpmpi.open_run(folder / "run") as run:
        compare(run.documents[0], *truth(folder / "model", whole))


def test_the_first_tokens_of_a_document_have_the_keys_of_all_of_it():
    from types import SimpleNamespace

    from cpmpi.engine.contexts import Context
    from cpmpi.engine.continuations import Asked, texts_of

    def line(stem, *answers):
        return SimpleNamespace(stem=[0] * stem, answers=[[0] * n for n in answers])

    run = SimpleNamespace(documents=[SimpleNamespace(n_tokens=75)])
    early, whole, none = (Context(document=0, n_tokens=max(0, n - 1), upto=n) for n in (29, 75, 0))
    asked = [Asked(context=one, lines=places) for one, places in ((early, (0, 1)), (whole, (1,)), (none, (0,)))]
    found = texts_of(run, asked, [line(2, 3), line(0, 40, 9)])
    assert found == ((75, 29 + 5, 29 + 40), (75, 75 + 9, 75 + 40), (0, 5, 5))


@pytest.mark.mpi(2)
def test_scores_are_kept_as_they_come_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    """A signal to one rank stops all after the line in work, with status 75; what is scored is not scored again."""
    import os
    import signal

    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine import continuations, prepare
    from cpmpi.engine.extend import Extension
    from cpmpi.run.verify import verify_run

    from .test_bad_input import call

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    prefilled(folder, comm)
    lines = [
        {"document": "context.npy", "id": "asked", "choices": [ids_of(n, n).tolist() for n in (4, 9, 2)]},
        {"document": "context.npy", "id": "one", "token_ids": ids_of(12, 4).tolist()},
        {"document": "context.npy", "id": "early", "token_ids": ids_of(5, 4).tolist(), "upto": 17},
    ]
    if comm.rank == 0:
        write_lines(folder / "lines.jsonl", *lines)
        write_lines(folder / "two.jsonl", *lines[:2], {**lines[2], "upto": 18})
    comm.Barrier()
    batches, score = continuations.batches, Extension.score
    monkeypatch.setattr(continuations, "batches", lambda lines, holders: batches(lines, holders, 1))
    choose = prepare.choose_schedule
    monkeypatch.setattr(prepare, "choose_schedule", lambda *a: choose(*a[:2], a[2].replace("auto", "tree"), a[3]))
    scored, kinds = [], set()

    def count(extension, questions):
        scored.append(sum(bool(len(a)) for q in questions for a in q.answers))
        kinds.add(extension.engine.schedule.kind)
        if interrupted and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return score(extension, questions)

    monkeypatch.setattr(Extension, "score", count)
    words = ["extend", "--quiet", "--run", f"{folder}/run", "--input", f"{folder}/lines.jsonl", "--output"]
    interrupted = False
    assert call([*words, f"{folder}/undisturbed", "--attention", "ring"], capsys)[0] == 0
    assert scored == [3, 1, 1]
    scored.clear()
    interrupted = True
    status, told = call([*words, f"{folder}/scores", "--attention", "ring"], capsys)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which a job on its way out leaves ignored
    assert status == (75 if comm.rank == 0 else 0)
    assert scored == [3]
    if comm.rank == 0:
        assert "stopped by SIGUSR1: 3 of 5 continuations are finished; the same command goes on" in told
        with cpmpi.open_run(folder / "scores") as run:
            assert [d.complete for d in run.documents] == [True] * 3 + [False] * 2
    comm.Barrier()
    scored.clear()
    interrupted = False
    assert call([*words, f"{folder}/scores"], capsys)[0] == 0
    assert scored == [1, 1]
    again = [word.replace("lines", "two") for word in words]
    scored.clear()
    assert call([*again, f"{folder}/scores"], capsys)[0] == 0
    assert scored == [1], "the same tokens after another context are another continuation"
    assert kinds == {"ring"}, "auto goes on with the schedule that the scores were begun with"
    other = ["score", "--quiet", "--model", f"{folder}/model", "--input", f"{folder}/context.npy", "--output"]
    status, told = call([*other, f"{folder}/scores"], capsys)
    assert status == 1
    if comm.rank == 0:
        assert "holds a run of continuations, this one is of documents" in told
        assert verify_run(folder / "scores").problems == []
        with cpmpi.open_run(folder / "scores") as run, cpmpi.open_run(folder / "undisturbed") as other:
            for a, b in zip(run.documents[:4], other.documents[:4], strict=True):
                np.testing.assert_array_equal(a.logprobs, b.logprobs)
            assert run.documents[4].continues["context_tokens"] == 18
            assert [d.id for d in run.set_aside] == ["early"]
        assert verify_run(folder / "undisturbed").problems == []
        assert json.loads((folder / "undisturbed" / "schedule.json").read_text())["kind"] == "ring"
        assert (folder / "undisturbed" / "scores.csv").read_text().count("\n") == 6
    comm.Barrier()
    assert call([*words, f"{folder}/undisturbed", "--overwrite"], capsys)[0] == 0
    assert kinds == {"ring", "tree"}, "what begins anew chooses anew"


@pytest.mark.mpi(2)
def test_an_answer_is_saved_and_the_document_goes_on_from_it(tmp_path):
    """The demo's checkpoint: what was generated is a part of the document, as if it had been prefilled."""
    from mpi4py import MPI
    from transformers import AutoTokenizer

    import cpmpi
    from cpmpi.run.verify import verify_run

    from .test_continuations import CHECKPOINT

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    text = "class Decimal:\n    def __init__(self, value):\n        self.value = value\n"
    if comm.rank == 0:
        (folder / "text.txt").write_text(text)
    comm.Barrier()
    cpmpi.prefill(model=CHECKPOINT, inputs=folder / "text.txt", output=folder / "run", kv_dtype="float32").close()
    prompt, more = "\n    def __repr__(self):", "\n    def __add__("
    given = {"run": folder / "run", "max_new_tokens": 12}
    (answer,) = cpmpi.generate(**given, prompts=prompt, save=True)
    (next_answer,) = cpmpi.generate(**given, prompts=more, save=True)
    comm.Barrier()
    if comm.rank:
        return
    assert verify_run(folder / "run").problems == []
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    with cpmpi.open_run(folder / "run") as run:
        document = run.documents[0]
        assert [part.id for part in document.appended] == ["answer 1", "answer 2"]
        whole = tokenizer.decode(document.token_ids, clean_up_tokenization_spaces=False)
        assert whole == text + prompt + answer + more + next_answer
        compare(document, *truth(CHECKPOINT, document.token_ids))


@pytest.mark.mpi(2)
def test_what_comes_after_stored_documents_is_watched_and_a_failing_disk_told_of_on_all_ranks(tmp_path, monkeypatch):
    """Each job has a watchdog that sees its passes through the layers; `generate` leaves the run's own logs alone."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.comm.watchdog import Watchdog
    from cpmpi.run.verify import verify_run
    from cpmpi.run.writer import ShardWriter

    from .test_continuations import CHECKPOINT

    comm, folder, dogs = MPI.COMM_WORLD, shared_folder(tmp_path), []
    if comm.rank == 0:
        np.save(folder / "context.npy", ids_of(60, 5) % 90)
        write_lines(folder / "a.jsonl", {"document": "context.npy", "id": "a", "token_ids": list(range(3, 23))})
    comm.Barrier()
    begin = Watchdog.__enter__
    monkeypatch.setattr(Watchdog, "__enter__", lambda dog: (dogs.append(dog), begin(dog))[1])
    given = {"run": folder / "run", "hang_timeout": 30, "attention": "ring"}
    asked = given | {"inputs": folder / "a.jsonl"}
    cpmpi.prefill(model=CHECKPOINT, inputs=folder / "context.npy", output=folder / "run").close()
    log = folder / "run" / "log" / f"rank-{comm.rank:05d}.log"
    cpmpi.extend(**asked, output=folder / "scores").close()
    before = log.read_bytes()
    cpmpi.generate(**given, prompts="a", max_new_tokens=3)
    comm.Barrier()
    assert log.read_bytes() == before
    write = ShardWriter._write

    def fail(self, item):
        if comm.rank == 1 and item.layer == 0:
            raise OSError(errno.EIO, "Input/output error")
        write(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", fail)
        with pytest.raises(
            cpmpi.UserError, match=r"^rank 1/2: \S+/rank-00001.h5: cannot be written \(Input/output error"
        ):
            cpmpi.extend(**asked, append=True)
    cpmpi.extend(**asked, append=True).close()
    logs = [dog._beats.folder.relative_to(folder) for dog in dogs]
    assert [path.parts[0] for path in logs] == ["run", "scores", "run", "run", "run"]
    assert [path.name for path in logs[:2] + logs[3:]] == ["beats"] * 4
    assert logs[2].name.startswith("beats-2"), "several of these jobs may read a run at a time"
    assert not any((folder / path).exists() for path in logs)
    assert [dog._limit.choice_s for dog in dogs] == [None, 30, 30, 30, 30]
    for dog, passes in zip(dogs, (1, 1, 3, 1, 1), strict=True):
        layers = [event.layer for event in dog._flight.events() if event.kind == "layer"]
        assert layers == list(range(max(layers) + 1)) * passes
        assert dog._flight.passes == passes + (dog is not dogs[0])
        assert dog._flight.name == "context.npy"
        assert any(event.kind == "attend" and event.layer == 0 for event in dog._flight.events())
    assert verify_run(folder / "run").problems == []


@pytest.mark.mpi(2)
def test_what_cannot_be_appended_is_refused(tmp_path, capsys):
    from mpi4py import MPI

    import cpmpi

    from .test_bad_input import call

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    prefilled(folder, comm)
    line = {"document": "context.npy", "id": "a", "token_ids": [1]}
    if comm.rank == 0:
        write_lines(folder / "good.jsonl", line)
        write_lines(folder / "choices.jsonl", line, {"document": "context.npy", "id": "b", "choices": [[1]]})
        write_lines(folder / "upto.jsonl", {**line, "upto": 4})
        write_lines(folder / "far.jsonl", {**line, "token_ids": [1] * 8000})
    comm.Barrier()
    run, before = str(folder / "run"), (folder / "run" / "run.h5").read_bytes()
    cases = [
        (
            ["extend", "--append", "--input", "choices.jsonl"],
            r'choices.jsonl:2: what is appended has neither "choices"',
        ),
        (["extend", "--append", "--input", "upto.jsonl"], r'upto.jsonl:1: what is appended has neither "choices"'),
        (["extend", "--append", "--input", "far.jsonl"], "more than the 8192 positions"),
        (["extend", "--append", "--input", "good.jsonl", "--output", "x"], "leave --output and --overwrite out"),
        (["extend", "--input", "good.jsonl"], "--output is missing: a run folder for the scores; or --append"),
        (["generate", "--save", "--prompt", "a", "--prompt", "b"], "--save appends one prompt with its answer"),
    ]
    for words, reason in cases:
        words = [f"{folder}/{word}" if word.endswith(".jsonl") or word == "x" else word for word in words]
        status, told = call([*words, "--quiet", "--run", run], capsys)
        assert status == 1, words
        if comm.rank == 0:
            assert reason in told, told
            assert told.count("\n") == 1
    assert (folder / "run" / "run.h5").read_bytes() == before
    comm.Barrier()
    if comm.rank == 0:
        (folder / "model").rename(folder / "moved")
    comm.Barrier()
    words = ["extend", "--quiet", "--append", "--input", f"{folder}/good.jsonl"]
    status, told = call([*words, "--run", run], capsys)
    assert status == 1
    if comm.rank == 0:
        assert f"the checkpoint that made it is not in {folder}/model any more; --model says where it is" in told
    assert call([*words, "--run", run, "--model", f"{folder}/moved"], capsys)[0] == 0
    status, told = call([*words, "--run", f"{folder}/absent"], capsys)
    assert status == 1
    if comm.rank == 0:
        assert "no run here" in told
        assert not (folder / "absent").exists()
        with cpmpi.open_run(run) as done:
            assert done.documents[0].n_tokens == CONTEXT + 1


def test_the_longest_texts_are_dealt_where_that_ends_sooner():
    from cpmpi.engine.extend import Question
    from cpmpi.engine.trunk import Joint, plan

    def question(stem, *answers):
        return Question(ids_of(stem, 0), tuple(ids_of(n, n) for n in answers))

    def planned(questions, holders):
        joints, left = plan(questions, holders)
        return joints, [[len(a) for a in one.answers] for one in left]

    assert planned([question(0, 4000)], 1) == ([], [[4000]]), "a single rank has all of it anyway"
    assert planned([question(0, 4000)], 4) == ([Joint(0, (0,), True)], [[0]])
    assert planned([question(0, 500)], 4) == ([], [[500]])
    assert planned([question(0, 4000) for _ in range(4)], 4)[0] == [], "one each is as even"
    joints, left = planned([question(0, 4000) for _ in range(5)], 4)
    assert len(joints) == 1
    assert sorted(left) == [[0], [4000], [4000], [4000], [4000]]
    assert planned([question(4000, 5, 6, 7)], 2) == ([Joint(0, (0, 1, 2), False)], [[0, 0, 0]])
    assert planned([question(4000, 0, 600, 7)], 2)[0] == [Joint(0, (1,), True), Joint(0, (2,), False)]


@pytest.mark.mpi(3)
def test_a_decode_step_moves_the_bytes_of_the_formula(tmp_path):
    """Tree: an edge carries a token's queries one way and its partial the other; ring: all keys pass all ranks."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine.decode import Decoding

    from .test_extend import extension_of

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    prefilled(folder, comm)
    layers, heads, kv_heads, dim, itemsize = 2, 8, 2, 8, 4
    formula = {
        "tree": layers * 2 * (heads * dim * itemsize + heads * (dim + 1) * 4),
        "ring": layers * 2 * CONTEXT * kv_heads * 2 * dim * itemsize,
    }
    with cpmpi.open_run(folder / "run") as run:
        for kind, expected in formula.items():
            one = extension_of(comm, folder, run, kind, True)
            decoding = Decoding(
                engine=one.engine, context=one.context, n_tokens=CONTEXT, last_hidden=None, gather=comm.allgather
            )  # fmt: skip
            sent = [0]
            for _ in decoding.generate([ids_of(1, 1)], lambda *_: 7, 4):
                sent.append(comm.allreduce(one.engine.transport.sent_bytes))
            assert np.diff(sent).tolist() == [expected] * 4, kind
            one.engine.transport.close()
            one.context.close()


def test_rotary_embeddings_are_compared_for_every_document(tmp_path):
    """LongRoPE changes at 64 positions: a short document may cross them where the longest one does not."""
    from types import SimpleNamespace

    from cpmpi.engine.contexts import New, check_rotary
    from cpmpi.errors import UserError
    from cpmpi.model.checkpoint import Checkpoint

    from .families import LONGROPE
    from .tiny_models import save_tiny, tiny_config

    save_tiny(tmp_path, tiny_config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64))
    import torch

    model = SimpleNamespace(skeleton=Checkpoint(tmp_path).skeleton(torch.float32))
    check_rotary(model, New(stored=100, longest=20, at_once=1, spans=((100, 110), (30, 50))).lengths)
    check_rotary(model, [(75, 69, 75 + 40), (0, 3, 32)])  # the first tokens of a document of 75, and a text by itself
    for text, reason in (((75, 34, 69), "keys of 75 .* of 34"), ((0, 32, 65), "keys of 32 tokens are not those of 65")):
        with pytest.raises(UserError, match=reason):
            check_rotary(model, [text])
    with pytest.raises(UserError, match="keys of 50 tokens are not those of 70"):
        check_rotary(model, New(stored=100, longest=20, at_once=1, spans=((100, 110), (50, 70))).lengths)
