"""The job from Python: the same options as the command line, and the finished run in return.

Under ``mpirun`` every rank calls alike; on one process, a notebook among them, it is a call like any other. What a job
changes in its process is put back at its end: the number of compute threads, and environment variables. Its attention
stays among those that transformers knows, under a name of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpmpi.comm.ranks import OPEN_MPI
from cpmpi.engine.options import ExtendOptions, GenerateOptions, ImportOptions, JobOptions
from cpmpi.run.reader import Run, open_run

PathText = str | os.PathLike[str]


def prefill(
    *, model: PathText, inputs: PathText | Sequence[PathText], output: PathText, quiet: bool = True, **options: Any
) -> Run:
    """Log-probabilities and the KV cache of whole documents. Collective: every rank of the launch calls it.

    Args:
        model: Hugging Face checkpoint folder (safetensors).
        inputs: text files, folders, globs, ``.jsonl`` and ``.npy``; one or several.
        output: run folder; the same call again resumes.
        quiet: no progress on standard error.
        **options: the command line's, with underscores: ``attention="ring"``, ``tp=2``, ``memory_limit="8GB"`` (see
            `cpmpi.engine.options.JobOptions`).

    Returns:
        The finished run, open for reading, on every rank; use it as a context manager or call its ``close``.

    Raises:
        UserError: something the user can mend, on all ranks alike; before any work where it can be known then.
        TypeError: there is no option of a name.
    """
    return _run(JobOptions.of(model=model, inputs=inputs, output=output, quiet=quiet, keep_kv=True, **options))


def score(
    *, model: PathText, inputs: PathText | Sequence[PathText], output: PathText, quiet: bool = True, **options: Any
) -> Run:
    """Log-probabilities of whole documents; like `prefill`, but no keys and values are kept. Collective."""
    return _run(JobOptions.of(model=model, inputs=inputs, output=output, quiet=quiet, keep_kv=False, **options))


def extend(
    *, run: PathText, inputs: PathText | Sequence[PathText], output: PathText | None = None,
    model: PathText | None = None, quiet: bool = True, **options: Any,
) -> Run:  # fmt: skip
    """Scores of what may follow stored documents, in a run of their own; or with ``append=True`` the documents
    themselves, extended. Collective; see docs/stored-kv.md.

    Args:
        run: run folder with the stored documents.
        inputs: ``.jsonl`` files with a continuation, or a question with answers, a line.
        output: run folder for the scores; the same call again goes on.
        model: the checkpoint folder that made the run; None: where it was.
        quiet: no progress on standard error.
        **options: as for `prefill` (see `cpmpi.engine.options.ExtendOptions`).

    Returns:
        The run of the continuations, or of the extended documents, open for reading, on every rank.

    Raises:
        UserError, TypeError: as for `prefill`.
    """
    from cpmpi.engine import append, continuations

    wanted = ExtendOptions.of(model=model, run=run, inputs=inputs, output=output, quiet=quiet, **options)
    with _as_before():
        ranks = append.append(wanted).ranks if wanted.append else continuations.extend(wanted).job.ranks
    ranks.comm.Barrier()
    return open_run(wanted.run if wanted.output is None else wanted.output)


def generate(
    *, run: PathText, prompts: str | Sequence[str], model: PathText | None = None, quiet: bool = True, **options: Any
) -> list[str]:  # fmt: skip
    """The answers to prompts that follow a stored document. Collective; see docs/stored-kv.md.

    Args:
        run: run folder with the stored document; ``document="ID"`` chooses among several.
        prompts: one or several.
        model: the checkpoint folder that made the run; None: where it was.
        quiet: no progress on standard error.
        **options: ``max_new_tokens``, ``temperature`` and so on (see `cpmpi.engine.options.GenerateOptions`).

    Raises:
        UserError, TypeError: as for `prefill`.
    """
    from cpmpi.engine import generate as job

    with _as_before():
        done = job.generate(GenerateOptions.of(model=model, run=run, prompts=prompts, quiet=quiet, **options))
    return [answer.text for answer in done.answers]


def import_kv(
    *, model: PathText, files: PathText | Sequence[PathText], output: PathText, quiet: bool = True, **options: Any
) -> Run:  # fmt: skip
    """A run of keys and values that were computed elsewhere. Collective; see docs/export.md.

    Args:
        model: the checkpoint folder that they are of.
        files: safetensors files, a document each.
        output: run folder.
        quiet: no progress on standard error.
        **options: as for `prefill` (see `cpmpi.engine.options.ImportOptions`).

    Raises:
        UserError, TypeError: as for `prefill`.
    """
    from cpmpi.engine import import_kv as job

    wanted = ImportOptions.of(model=model, files=files, output=output, quiet=quiet, **options)
    with _as_before():
        done = job.import_kv(wanted)
    done.ranks.comm.Barrier()
    return open_run(wanted.output)


def _run(options: JobOptions) -> Run:
    from cpmpi.engine.run import run

    with _as_before():
        outcome = run(options)
    outcome.job.ranks.comm.Barrier()  # rank 0 writes the last bytes of run.h5
    return open_run(Path(options.output))


@contextmanager
def _as_before() -> Iterator[None]:
    """Within it a job may set threads and environment variables; they are as before at its end."""
    import torch

    added, threads = OPEN_MPI.keys() - os.environ.keys(), torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name in added:  # read when MPI starts, and not again
            os.environ.pop(name, None)
