"""Keys and values that were computed elsewhere become a run, which goes on as a native one does.

Tolerances: see ``tolerances.py``; keys and values are stored in float32. What is exported and imported again is the
same bit for bit.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.test_bad_input import call
from tests.test_exact import VOCABULARY, save_llama, shared_folder
from tests.test_extend import scratch
from tests.test_extend_families import (
    CONTEXT,
    FAMILY,
    NEW,
    PROMPTS,
    Truth,
    check_scores,
    ids_of,
    prepare,
    words,
)
from tests.test_models import GOES_ON

TOKENS = 70
LATENT = "DeepSeek V3"  # transformers caches something else than what its attention gets


def cache_of(model, ids):
    """transformers' own cache of a document as tensors by name; whole in layers with windows too."""
    import torch
    import transformers

    cache = transformers.DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids)[None], past_key_values=cache)
    tensors = {"token_ids": torch.from_numpy(ids)}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"layers.{i}.key": layer.keys, f"layers.{i}.value": layer.values}
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def document(seed=5):
    return np.random.default_rng(seed).integers(0, VOCABULARY, TOKENS)


def save_document(folder):
    """A checkpoint, a document, transformers' cache of it, and what may follow."""
    from safetensors.torch import save_file

    save_llama(folder / "model", 2)
    np.save(folder / "d.npy", document())
    save_file(cache_of(load(folder / "model"), document()), folder / "d.npy.safetensors")
    lines = [{"document": "d.npy", "id": "a", "token_ids": document(1)[:20].tolist()}]
    lines += [{"document": "d.npy", "id": "b", "token_ids": document(2)[:9].tolist(), "upto": 33}]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.slow
@pytest.mark.mpi(2)
def test_a_cache_of_transformers_goes_on_as_a_native_run_does(tmp_path):
    """And what was exported and is imported is the run that it was, bit for bit, in both layouts."""
    from mpi4py import MPI

    import cpmpi
    from cpmpi.engine.export import ExportOptions, export
    from cpmpi.run.verify import verify_run

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    if comm.rank == 0:
        save_document(folder)
    comm.Barrier()
    given = {"model": folder / "model"}
    cpmpi.prefill(**given, inputs=folder / "d.npy", output=folder / "native", kv_dtype="float32", segments=3).close()
    if comm.rank == 0:
        for layout in ("transformers", "safetensors"):
            export(ExportOptions(run=folder / "native", to=layout, output=folder / f"{layout}.safetensors"), print)
    comm.Barrier()
    for name in ("d.npy", "transformers", "safetensors"):
        cpmpi.import_kv(**given, files=folder / f"{name}.safetensors", output=folder / f"of-{name}").close()
    for run in ("native", "of-d.npy"):
        cpmpi.extend(**given, run=folder / run, inputs=folder / "lines.jsonl", output=folder / f"{run}-scores").close()
    if comm.rank:
        return
    model = load(folder / "model")
    for run in ("native", "of-d.npy"):
        assert verify_run(folder / run).problems == []
        with cpmpi.open_run(folder / f"{run}-scores") as scores:
            for found, before, after in zip(
                scores.documents, (document(), document()[:33]), (document(1)[:20], document(2)[:9]), strict=True
            ):
                expected, greedy = scratch(model, before, after[:0], after)
                assert np.abs(found.logprobs - expected).max() <= 1e-4, (run, found.id)
                assert (found.greedy == greedy).all()
    with cpmpi.open_run(folder / "native") as native, cpmpi.open_run(folder / "of-d.npy") as foreign:
        one, other = native.documents[0], foreign.documents[0]
        assert (other.id, other.scored, one.scored) == ("d.npy", False, True)
        assert np.isnan([other.nll, other.perplexity, *other.logprobs]).all()
        assert np.abs(other.last_hidden - one.last_hidden).max() <= 1e-4 * np.abs(one.last_hidden).max()
        for layout in ("transformers", "safetensors"):
            assert verify_run(folder / f"of-{layout}").problems == []
            with cpmpi.open_run(folder / f"of-{layout}") as again:
                same = again.documents["d.npy"]
                assert (same.nll, same.perplexity, same.scored) == (one.nll, one.perplexity, True)
                for name in ("token_ids", "logprobs", "last_hidden"):
                    np.testing.assert_array_equal(getattr(same, name), getattr(one, name))
                for layer in range(2):
                    for got, want in zip(same.kv(layer, raw=True), one.kv(layer, raw=True), strict=True):
                        np.testing.assert_array_equal(got, want)


@pytest.mark.mpi(1)
def test_what_cannot_be_imported_is_refused(tmp_path, capsys):
    """Each before anything is written, in one line that names the file, the numbers and the choices."""
    import torch
    from safetensors.torch import save_file

    save_document(tmp_path)
    save_llama(tmp_path / "other", 1)
    whole = cache_of(load(tmp_path / "model"), document())

    def less(*names):
        return {name: x for name, x in whole.items() if name not in names}

    halves = {name: x.half() if name.endswith("key") else x for name, x in whole.items()}
    shuffled = whole | {"token_ids": whole["token_ids"].roll(1)}
    turned = whole | {f"layers.{i}.key": whole[f"layers.{i}.key"].roll(1, dims=2) for i in range(2)}
    cases = {
        "none": ({"x": torch.zeros(1)}, "has no tensor token_ids; it has x. A file .* needs token_ids, layers.0.key"),
        "lacks": (less("layers.1.value"), "lacks layers.1.value: the model has 2 layers"),
        "more": (whole | {"layers.2.key": whole["layers.0.key"]}, "has layers.2.key, but the model has 2 layers"),
        "short": (
            whole | {"layers.1.key": whole["layers.1.key"][:, :, -24:].contiguous()},
            r"layers.1.key is \[1, 2, 24, 8\], but must be \[1, 2, 70, 8\]: a cache that keeps the last tokens",
        ),
        "shape": (whole | {"layers.0.key": whole["layers.0.key"][0]}, r"is \[2, 70, 8\], but must be \[70, 2, 8\]"),
        "types": (halves, "layers.0.value is of F32; all keys and values must be of one of F32, BF16, F16"),
        "vocabulary": (
            whole | {"token_ids": whole["token_ids"] + 9}, "token id 30[0-9] at index .* has 300 tokens, 0 to 299"
        ),
        "tokens": (shuffled, "layers.0.key of the last token is not what the model computes"),
        "positions": (turned, "layers.0.key of the last token is not what the model computes"),
        "ids": (whole | {"token_ids": whole["token_ids"].float()}, r"token_ids must be \(T,\) of int32 or int64"),
        "hidden": (whole | {"last_hidden": torch.zeros(64)}, "last_hidden of the last token is not what the model"),
        "results": (whole | {"logprobs": torch.zeros(3)}, r"logprobs must be \[70\] of F32, not \[3\] of F32"),
    }  # fmt: skip
    for name, (tensors, _) in cases.items():
        own = {key: x.clone().contiguous() for key, x in tensors.items()}  # some share their memory
        save_file(own, tmp_path / f"{name}.safetensors")
    save_file(whole, tmp_path / "made.safetensors", {"model_sha256": "f" * 64})
    (tmp_path / "text.safetensors").write_text("no such file")
    cut = (tmp_path / "d.npy.safetensors").read_bytes()[:-100]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    expected = [(f"{name}.safetensors", "model", reason) for name, (_, reason) in cases.items()]
    expected += [
        ("absent.safetensors", "model", "absent.safetensors: no such file"),
        ("text.safetensors", "model", "text.safetensors: is no safetensors file, or damaged"),
        ("cut.safetensors", "model", "cut.safetensors: is no safetensors file, or damaged"),
        ("made.safetensors", "model", "was made with another model .digest ffffffffffff"),
        ("d.npy.safetensors", "other", r"layers.0.key is \[1, 2, 70, 8\], but must be \[1, 1, 70, 8\]"),
        ("d.npy.safetensors", "nowhere", "nowhere: no such checkpoint folder"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for file, model, reason in expected:
        words = ["import", "--quiet", f"{tmp_path}/{file}", "--model", f"{tmp_path}/{model}", "--output"]
        status, told = call([*words, f"{tmp_path}/out"], capsys)
        assert status == 1, (file, model)
        assert re.match(f"error: .*{reason}", told), (file, told)
        assert told.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before, file
    good = ["import", "--quiet", f"{tmp_path}/d.npy.safetensors", "--model", f"{tmp_path}/model", "--output"]
    assert call([*good, f"{tmp_path}/out"], capsys)[0] == 0
    status, told = call([*good, f"{tmp_path}/out"], capsys)
    assert (status, told) == (
        1,
        f"error: {tmp_path}/out: holds a run already; choose another --output, or --overwrite\n",
    )
    assert call([*good, f"{tmp_path}/out", "--overwrite"], capsys)[0] == 0
    status, told = call(["report", f"{tmp_path}/out"], capsys)
    assert (status, told) == (1, f"error: {tmp_path}/out: document 'd.npy' was imported without log-probabilities\n")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 3)])
def test_caches_of_every_kind_of_attention_go_on(ranks, tmp_path):
    """Windows, chunks, sinks, soft caps, layers of several shapes; bfloat16; and latent attention."""
    import torch
    from mpi4py import MPI
    from safetensors.torch import save_file

    import cpmpi
    from cpmpi.errors import UserError

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    for i, name in enumerate(GOES_ON):
        here, context = folder / f"{i}", ids_of(CONTEXT, 1)
        if comm.rank == 0:
            here.mkdir()
            prepare(here, FAMILY[name], i)
            tensors = cache_of(load(here / "model"), context)
            save_file(tensors, here / "context.npy.safetensors")
            halves = {n: x.bfloat16() if x.is_floating_point() else x for n, x in tensors.items()}
            save_file(halves, here / "halves.safetensors")
        comm.Barrier()
        given = {"model": here / "model", "chunk_tokens": 16, "segments": 3}
        if name == LATENT:
            with pytest.raises(UserError, match=r"layers\.0\.(key|value) is|transformers caches other keys and values"):
                cpmpi.import_kv(**given, files=here / "context.npy.safetensors", output=here / "run")
            continue
        files = here / "context.npy.safetensors", here / "halves.safetensors"
        for file, run in zip(files, ("run", "halves"), strict=True):
            cpmpi.import_kv(**given, files=file, output=here / run).close()
        given["run"] = here / "run"
        scored = cpmpi.extend(**given, inputs=here / "lines.jsonl", output=here / "scores")
        answers = cpmpi.generate(**given, prompts=[words(ids_of(n, n)) for n in PROMPTS], max_new_tokens=NEW)
        if comm.rank == 0:
            truth = Truth(here / "model")
            check_scores(scored, truth, context, name)
            assert answers == [words(truth.greedy([*context, *ids_of(n, n)], NEW)) for n in PROMPTS]
            with cpmpi.open_run(here / "halves") as run:
                assert run.kv_dtype == "bfloat16"
                assert torch.equal(run.documents[0].kv(1, as_torch=True)[0], halves["layers.1.key"][0].transpose(0, 1))
        scored.close()
        comm.Barrier()
