"""Whether what a job would add to a run is of the same checkpoint and the same documents as what is in it.

Documents are told by their tokens. A list may grow, shrink, or come in another order, and documents may be renamed:
each one of the run is then found again, or set aside. A document has *changed* where neither list knows the tokens of
the other: the run has an id with tokens that the new list lacks, and the new list has that id with tokens that the run
lacks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from cpmpi.errors import UserError, some
from cpmpi.run.index_layout import kv_dtype
from cpmpi.run.reader import Run
from cpmpi.run.spec import PLAIN, DocumentSpec, RunSpec

MOST_NAMED = 5
DIGITS = 12  # of a digest, where somebody is to compare two


def check_same_run(run: Run, spec: RunSpec, deletes: Callable[[], str]) -> None:
    """Refuse another checkpoint, tokenizer, type or scoring; files of the checkpoint that differ are named.

    Args:
        run: that is in the folder.
        spec: of the job that would go on with it.
        deletes: says what ``--overwrite`` deletes.

    Raises:
        UserError: something differs.
    """
    kinds = ["continuations" if one.documents[0].continues else "documents" for one in (run, spec)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{run.paths.folder}: holds a run of {kinds[0]}, this one is of {kinds[1]}; choose another --output, "
            f"or --overwrite, which deletes {deletes()}"
        )
    expected = {
        "model_sha256": spec.model_sha256,
        "tokenizer_sha256": spec.tokenizer_sha256,
        "dtype": spec.dtype,
        "kv_dtype": kv_dtype(spec),
        "hidden_size": spec.hidden_size,
        **asdict(spec.scoring),
    }
    before = asdict(PLAIN)  # of runs that were made before these were choices
    for name, value in expected.items():
        found = run.attributes.get(name, before.get(name))
        if found != value:
            files = changed_files(recorded_files(run), dict(spec.files)) if name.endswith("sha256") else ""
            raise UserError(
                f"{run.paths.folder}: holds a run with {name} {'nothing' if found == '' else found}, this one has "
                f"{'nothing' if value == '' else value}{files and f' ({files})'}; "
                f"choose another --output, or --overwrite, which deletes {deletes()}"
            )


def recorded_files(run: Run) -> dict[str, str]:
    """The digest of each file of the checkpoint that a run was begun with; none where an older version began it."""
    found: dict[str, str] = json.loads(run.attributes.get("checkpoint_files", "{}"))
    return found


def changed_files(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which files differ, with their digests; empty where that is not known, or none does."""
    if not then or not now:
        return ""
    lines = []
    for name in sorted({*then, *now}):
        if name not in now:
            lines.append(f"{name} is gone")
        elif name not in then:
            lines.append(f"{name} is new")
        elif then[name] != now[name]:
            lines.append(f"{name} has changed: digest {then[name][:DIGITS]} then, {now[name][:DIGITS]} now")
    return some(lines, MOST_NAMED)


def check_same_documents(run: Run, spec: RunSpec, *, keep_finished: bool) -> None:
    """Refuse documents that have changed since the run was started, unless those that did not are to be kept.

    Args:
        run: that is in the folder.
        spec: of the job that would go on with it.
        keep_finished: what changed is computed anew, and the rest is kept.

    Raises:
        UserError: documents have changed; they are named with the file that each is from, and both digests.
    """
    changed = [] if keep_finished else changed_documents([document.spec for document in run.documents], spec.documents)
    if not changed:
        return
    lines = [
        f"{new.id!r} ({new.source}: {new.n_tokens} tokens with SHA-256 {new.token_ids_sha256[:DIGITS]}, "
        f"then {old.n_tokens} with {old.token_ids_sha256[:DIGITS]})"
        for old, new in changed
    ]
    kept = sum(document.complete for document in run.documents) - sum(
        run.documents[old.id].complete for old, _ in changed
    )
    have = "documents have" if len(changed) > 1 else "document has"
    raise UserError(
        f"{run.paths.folder}: {len(changed)} {have} changed since this run was started: {some(lines, MOST_NAMED)}; "
        f"--keep-finished keeps the {kept} finished that did not change and computes the others, or choose another "
        "--output"
    )


def changed_documents(
    before: Sequence[DocumentSpec], now: Sequence[DocumentSpec]
) -> list[tuple[DocumentSpec, DocumentSpec]]:
    """The documents that changed from one list to another, as they were and as they are."""
    old = {content for document in before for content in document.contents}
    new = {document.contents[0] for document in now}
    gone = {document.id: document for document in before if new.isdisjoint(document.contents)}
    return [(gone[each.id], each) for each in now if each.id in gone and each.contents[0] not in old]
