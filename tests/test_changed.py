"""What changed between two starts is refused by name, what did not is kept on request, what failed is tried again."""

from dataclasses import replace

import numpy as np
import pytest

from cpmpi import open_run
from cpmpi.errors import UserError
from cpmpi.run.folder import start_index
from cpmpi.run.spec import DocumentSpec
from cpmpi.run.unchanged import changed_documents, changed_files
from tests.runs import make_run, make_spec
from tests.test_relisting import listed


def of(names: str) -> list[DocumentSpec]:
    """Documents as ``id`` and content, each a letter, such as ``"aX bY"``."""
    template = make_spec((5,), 1).documents[0]
    return [replace(template, id=name[0], token_ids_sha256=name[1] * 64) for name in names.split()]


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ("aX bY", "aX bY", ""),
        ("aX bY", "bY aX", ""),  # another order
        ("aX bY", "aY bX", ""),  # names exchanged
        ("aX", "aX bY", ""),  # added
        ("aX bY", "bY", ""),  # taken away
        ("aX bY", "cX dY", ""),  # renamed
        ("aX bY cZ", "aX bN cY dZ", ""),  # a line put in between, where ids are numbers of lines
        ("aX bY cZ", "aX bZ", ""),  # a line taken away
        ("aX bX", "aX bY", ""),  # one of two alike: its text is still there
        ("aX bY", "aN bY", "aXN"),
        ("aX bY", "bM aN", "bYM aXN"),
        ("aX bY", "aN cX bY", ""),  # the old text has another name now
        ("aX bY", "aN", "aXN"),  # and b was taken away
    ],
)
def test_what_has_changed(before, now, changed):
    found = changed_documents(of(before), of(now))
    assert " ".join(old.id + old.token_ids_sha256[0] + new.token_ids_sha256[0] for old, new in found) == changed


def test_the_same_digest_but_another_length_has_changed():
    (old,), (new,) = of("aX"), make_spec((6,), 1).documents
    assert changed_documents([old], [replace(new, id="a", token_ids_sha256=old.token_ids_sha256)])


def test_changed_documents_are_refused_and_the_others_kept_on_request(tmp_path):
    make_run(tmp_path, listed(0, 1, 2), stop_after=2)
    spec, other = listed(0, 1, 2), replace(listed(3).documents[0], id="d0", source="corpus.jsonl:0")
    spec = replace(spec, documents=(other, *spec.documents[1:]))
    old = listed(0).documents[0].token_ids_sha256
    message = (
        rf"1 document has changed since this run was started: 'd0' \(corpus.jsonl:0: 30 tokens with SHA-256 "
        rf"{other.token_ids_sha256[:12]}, then 50 with {old[:12]}\); --keep-finished keeps the 1 finished "
    )
    with pytest.raises(UserError, match=message):
        start_index(tmp_path, spec)
    with open_run(tmp_path) as run:
        assert [document.complete for document in run.documents] == [True, True, False], "nothing was touched"
    assert start_index(tmp_path, spec, keep_finished=True).finished == {1}
    with open_run(tmp_path) as run:
        assert [document.id for document in run.set_aside] == ["d0"]
    assert start_index(tmp_path, spec).finished == {1}, "the new list holds from now on"
    with pytest.raises(UserError, match="'d0'"):
        start_index(tmp_path, listed(0, 1, 2))
    assert start_index(tmp_path, listed(0, 1, 2), keep_finished=True).finished == {0, 1}, "taken back"


def test_an_unfinished_document_that_changed_is_refused_too(tmp_path):
    make_run(tmp_path, listed(0, 1), stop_after=1)
    spec = listed(0, 1)
    spec = replace(spec, documents=(spec.documents[0], replace(spec.documents[1], token_ids_sha256="e" * 64)))
    with pytest.raises(UserError, match=r"'d1' .* --keep-finished keeps the 1 finished"):
        start_index(tmp_path, spec)


def test_files_of_the_checkpoint_are_named(tmp_path):
    then = {"config.json": "a" * 64, "model.safetensors": "b" * 64, "merges.txt": "c" * 64}
    now = {"config.json": "a" * 64, "model.safetensors": "d" * 64, "vocab.txt": "c" * 64}
    assert changed_files(then, then) == changed_files({}, now) == changed_files(then, {}) == ""
    said = "merges.txt is gone, "
    said += "model.safetensors has changed: digest bbbbbbbbbbbb then, dddddddddddd now, vocab.txt is new"
    assert changed_files(then, now) == said
    make_run(tmp_path, make_spec(files=tuple(then.items())))
    with pytest.raises(UserError, match=rf"model_sha256 a+, this one has e+ \({said}\); choose another --output"):
        start_index(tmp_path, make_spec(files=tuple(now.items()), model_sha256="e" * 64))
    with pytest.raises(UserError, match=r"dtype float32, this one has bfloat16; choose"):
        start_index(tmp_path, make_spec(files=tuple(now.items()), dtype="bfloat16"))


@pytest.mark.mpi(1)
def test_a_job_with_a_changed_text_a_changed_checkpoint_and_a_document_that_failed(tmp_path):
    import cpmpi
    from cpmpi.run.index import NotFiniteError, RunIndex
    from tests.test_exact import save_documents, save_llama

    save_llama(tmp_path / "model", 2)
    save_documents(tmp_path / "documents", (40, 30))
    first, _ = sorted((tmp_path / "documents").iterdir())
    options = {"model": tmp_path / "model", "inputs": tmp_path / "documents", "output": tmp_path / "run"}
    real = RunIndex.write_outputs

    def fail_first(index, i, **outputs):
        if i == 0:
            raise NotFiniteError("it is not finite")
        real(index, i, **outputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunIndex, "write_outputs", fail_first)
        cpmpi.prefill(**options).close()
        with cpmpi.prefill(**options, retry_failed=True) as run:
            assert [document.failed for document in run.documents] == ["it is not finite", ""], "it failed again"
            before = run.documents[1].logprobs
    with cpmpi.prefill(**options) as run:
        assert run.documents[0].failed, "not tried again unless that is asked for"
    with cpmpi.prefill(**options, retry_failed=True) as run:
        assert [document.complete for document in run.documents] == [True, True]
        assert run.documents[0].failed == ""
    cpmpi_verify(tmp_path / "run")

    np.save(first, np.load(first)[::-1])
    with pytest.raises(cpmpi.UserError, match=rf"1 document has changed .*{first.name}.*--keep-finished keeps the 1"):
        cpmpi.prefill(**options)
    with cpmpi.prefill(**options, keep_finished=True) as run:
        np.testing.assert_array_equal(run.documents[0].token_ids, np.load(first))
        np.testing.assert_array_equal(run.documents[1].logprobs, before)
    cpmpi_verify(tmp_path / "run")

    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for job in (cpmpi.prefill, cpmpi.extend):
        given = {**options, "inputs": tmp_path / "q.jsonl", "run": tmp_path / "run", "output": tmp_path / "scores"}
        (tmp_path / "q.jsonl").write_text('{"document": "x", "token_ids": [3]}\n')
        with pytest.raises(cpmpi.UserError, match=r"model\.safetensors has changed: digest \w{12} then, \w{12} now"):
            job(**(options | {"keep_finished": True} if job is cpmpi.prefill else given))


def cpmpi_verify(folder):
    from cpmpi.run.verify import verify_run

    assert verify_run(folder).problems == []
