"""What a user asks of a job: the source of the command line's options, of the Python API's and of a plan's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from cpmpi.choices import (
    AUTO,
    DEVICES,
    DTYPES,
    KV_RESIDENCES,
    OFF,
    RESIDENCES,
    SCHEDULES,
    STORED_DTYPES,
    TRANSPORTS,
    check_prefix_token,
    check_segments,
    one_of,
    split_keep,
)  # fmt: skip
from cpmpi.errors import UserError
from cpmpi.text import parse_bytes

LEAST_HANG_S = 3  # a shorter wait is nothing to end a job for


def option(default: Any, text: str, *, choices: Sequence[str] = (), least: int | None = None, **more: Any) -> Any:
    """A field with what is known of it: its help, its choices or its least value, and what the command line adds."""
    return field(default=default, metadata={"help": text, "choices": tuple(choices), "least": least, **more})


TAKES = ("longest", "shortest")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What a user asks of any job that runs a model.

    Fields with ``command_line`` False are no options of a command, those with ``flag`` take no value there, those
    that are ``needed`` have no default, and those that are ``repeated`` may be given several times, under that name.

    Raises:
        UserError: a number is out of range, or a value is none of the choices, which are listed.
    """

    model: Path = option(None, "Hugging Face checkpoint folder (safetensors).", needed=True)
    attention: str = option(AUTO, "Schedule of attention across ranks; all are exact.", choices=(AUTO, *SCHEDULES))
    segments: int = option(2, "Segments a document is cut into.", least=1)
    tp: int = option(1, "Ranks of a node that share the weights (tensor parallelism); divides the heads.", least=1)
    dtype: str = option(
        AUTO, "Type to compute in; auto: float32 on CPUs, the checkpoint's own on GPUs.", choices=(AUTO, *DTYPES)
    )
    device: str = option(AUTO, "Where to compute; auto: on GPUs where every rank has one.", choices=(AUTO, *DEVICES))
    transport: str = option(
        AUTO, "What carries messages; auto: NCCL where every rank has a GPU of its own, else MPI.",
        choices=(AUTO, *TRANSPORTS),
    )  # fmt: skip
    weights: str = option(
        AUTO, "Keep all weights in memory, or a layer at a time; auto: as memory allows.", choices=(AUTO, *RESIDENCES)
    )
    memory_limit: int | None = option(
        None, "What a rank may use, such as 8GB.  [default: its share of free memory]", metavar="SIZE"
    )
    check_finite: bool = option(False, "Stop at NaN or infinities in weights or layers, by name.", flag=True)
    chunk_tokens: int = option(1024, "Tokens per pass through a layer.", least=1)
    allow_longer: bool = option(False, "Allow documents beyond the checkpoint's position limit.", flag=True)
    quiet: bool = option(False, "No progress, results only.", flag=True)
    command: str = option("", "The command line, for the record.", command_line=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = _as_declared(each, getattr(self, each.name))
            object.__setattr__(self, each.name, value)
            _check(each, value)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Options by name, as Python users give them: paths may be text, sizes such as ``"8GB"``.

        Raises:
            TypeError: there is no option of a name; all names are listed.
            UserError: as on construction.
        """
        names = [each.name for each in fields(cls)]
        if unknown := sorted(options.keys() - set(names)):
            raise TypeError(f"no option {', '.join(unknown)}: the options are {', '.join(names)}")
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class JobOptions(ModelOptions):
    """What a user asks of the main job."""

    inputs: tuple[str, ...] = option(
        (), "Text files, folders, globs, .jsonl and .json (id, and text or token_ids), .parquet and saved data sets, "
        ".npy token ids, any of these as .gz or .zst, - for standard input.", command_line=False,
    )  # fmt: skip
    output: Path = option(None, "Run folder. The same command again resumes.", needed=True)
    column: str | None = option(
        None, "Field or column with text or token ids.  [default: text, token_ids or input_ids]", metavar="NAME"
    )
    id_column: str | None = option(
        None, "Field or column with the id.  [default: id, else file and row]", metavar="NAME"
    )
    select: str | None = option(None, "Only documents in whose id this is found.", metavar="REGEX")
    limit: int | None = option(None, "Only the first so many documents.", least=1)
    skip_bad: bool = option(False, "Leave bad inputs out, and say which, instead of refusing all.", flag=True)
    keep_kv: bool = option(True, "Whether keys and values are stored.", command_line=False)
    kv_dtype: str = option("bfloat16", "Type to store keys and values in.", choices=STORED_DTYPES)
    special_tokens: bool | None = option(
        None, "Whether the tokenizer adds its special tokens.  [default: as the tokenizer does]"
    )
    keep: tuple[str, ...] = option(
        (), "Keep also rank, entropy, greedy, moments, topk=K or ids=FILE (docs/scores.md); once or several times.",
        repeated="--keep", metavar="WHAT",
    )  # fmt: skip
    prefix_token: str | None = option(
        None, "Token before each document, so that its first one is scored too.  [default: as the tokenizer does]",
        metavar="bos|none|ID",
    )  # fmt: skip
    spans: str | None = option(
        None, "Sum scores over lines, sentences or paragraphs of the text, or over those of a file (spans.csv).",
        metavar="lines|sentences|paragraphs|FILE.jsonl",
    )  # fmt: skip
    from_position: int = option(0, "Score only tokens from this position on.", least=0)
    context: int | None = option(
        None, "Score each token after at most so many, in windows: a baseline for whole documents.", least=1,
        metavar="TOKENS",
    )  # fmt: skip
    stride: int | None = option(
        None, "Tokens from one window's beginning to the next's.  [default: half of --context]", least=1,
        metavar="TOKENS",
    )  # fmt: skip
    fail_fast: bool = option(False, "End the job with the first document that fails, instead of going on.", flag=True)
    checkpoint: str = option(
        AUTO, "Minutes between checkpoints inside a document (0: as often as can be), off, or auto: by their cost.",
        metavar="auto|MINUTES|off",
    )  # fmt: skip
    grace: int = option(100, "Seconds from SIGTERM or SIGUSR1 until the job must have ended.", least=0)
    hang_timeout: str = option(
        AUTO, "Seconds that a rank may wait for one that does not go on, off, or auto: by earlier waits.",
        metavar="auto|SECONDS|off",
    )  # fmt: skip
    trace: Path | None = option(None, "Write what every rank did when, for chrome://tracing.", metavar="FILE")
    plot: Path | None = option(None, "Draw it: FILE.png, FILE.svg or FILE.pdf.", metavar="FILE")
    keep_finished: bool = option(
        False, "Go on where documents have changed since the last start: keep the finished that did not.", flag=True
    )
    retry_failed: bool = option(False, "Compute documents again that failed in an earlier start.", flag=True)
    overwrite: bool = option(False, "Delete a run that is in the output folder first.", flag=True)
    share: bool = option(False, "Share the documents with other jobs on the same run folder and --input.", flag=True)
    take: str = option("longest", "Which free document a job that shares takes first.", choices=TAKES)
    most_tokens: int | None = option(
        None, "A job that shares leaves longer documents to others, and is planned for this.", least=1
    )
    stay: bool = option(
        False, "A job that shares waits for documents that others have, to take over from one that dies.", flag=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share and self.overwrite:
            raise UserError("--share and --overwrite: each job would delete what the others did; delete the run first")
        for name, given in (("most_tokens", self.most_tokens is not None), ("stay", self.stay)):
            if given and not self.share:
                raise UserError(f"{spelled(name)} is for jobs that share the documents of a run (--share)")
        if self.context is not None and self.checkpoint == AUTO:  # a window is soon computed again
            object.__setattr__(self, "checkpoint", OFF)


@dataclass(frozen=True, kw_only=True)
class ContextOptions(ModelOptions):
    """What a user asks of a job that goes on from stored documents."""

    model: Path = option(
        None, "Hugging Face checkpoint folder (safetensors).  [default: the one that made the run, where it was]"
    )
    run: Path = option(None, "Run folder with the stored documents (made by prefill).", needed=True)
    kv: str = option(
        AUTO, "Keep stored keys and values in memory, or read a layer ahead; auto: as memory allows.",
        choices=(AUTO, *KV_RESIDENCES),
    )  # fmt: skip
    hang_timeout: str = option(
        AUTO, "Seconds that a rank may wait for one that does not go on, off, or auto: by earlier waits.",
        metavar="auto|SECONDS|off",
    )  # fmt: skip

    @property
    def goes_on(self) -> Path | None:
        """The run folder with results of an earlier start, if any, that this job would add to."""
        return None


@dataclass(frozen=True, kw_only=True)
class ExtendOptions(ContextOptions):
    """What a user asks of the job that scores continuations of stored documents."""

    inputs: tuple[str, ...] = option(
        (), '.jsonl lines: "document", "id", and "text", "token_ids" or "choices".', command_line=False
    )
    output: Path | None = option(None, "Run folder for the scores. The same command again goes on.")
    unconditional: str | None = option(
        None, "Score answers also after this text alone, or after the token that begins a text, and compare by the "
        "difference.", metavar="bos|TEXT",
    )  # fmt: skip
    append: bool = option(
        False, "Make the texts a part of the stored documents, with their KV, instead of scoring them in --output.",
        flag=True,
    )  # fmt: skip
    grace: int = option(100, "Seconds from SIGTERM or SIGUSR1 until the job must have ended.", least=0)
    overwrite: bool = option(False, "Delete a run that is in the output folder first.", flag=True)

    @property
    def goes_on(self) -> Path | None:
        """The run folder with results of an earlier start, if any, that this job would add to."""
        return None if self.overwrite else self.output


@dataclass(frozen=True, kw_only=True)
class ImportOptions(ModelOptions):
    """What a user asks of the job that makes a run of keys and values that were computed elsewhere."""

    files: tuple[str, ...] = option((), "safetensors files, a document each.", command_line=False)
    output: Path = option(None, "Run folder for the documents.", needed=True)
    overwrite: bool = option(False, "Delete a run that is in the output folder first.", flag=True)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ContextOptions):
    """What a user asks of the job that answers prompts from a stored document."""

    prompts: tuple[str, ...] = option((), "Text that follows the document; once or several times.", repeated="--prompt")
    document: str | None = option(None, "Id of the stored document.  [default: the run's only one]", metavar="ID")
    max_new_tokens: int = option(128, "Tokens for each prompt at most.", least=1)
    temperature: float = option(0.0, "What logits are divided by; 0: always the most probable token.")
    top_k: int = option(0, "Draw from so many tokens; 0: from all.", least=0)
    top_p: float = option(1.0, "Draw from the fewest tokens with so much probability.")
    min_p: float = option(0.0, "Draw from tokens at least so probable, relative to the most probable one.")
    repetition_penalty: float = option(1.0, "What logits of tokens that occurred are divided by.")
    seed: int = option(0, "Of the draws; the same on any number of ranks.", least=0)
    stop: tuple[str, ...] = option((), "Text that ends an answer; once or several times.", repeated="--stop")
    chat: bool = option(False, "Put prompts into the checkpoint's chat template.", flag=True)
    save: bool = option(False, "Append the prompt and its answer to the stored document, with their KV.", flag=True)


def minutes_between(checkpoint: str) -> float | None:
    """The minutes of ``--checkpoint``; None for ``auto``, and endless for ``off``.

    Raises:
        UserError: it is neither.
    """
    if checkpoint in (AUTO, OFF):
        return None if checkpoint == AUTO else float("inf")
    try:
        minutes = float(checkpoint)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise UserError(f"--checkpoint {checkpoint}: choose auto, off, or minutes such as 15")
    return minutes


def hang_seconds(choice: str) -> float | None:
    """The seconds of ``--hang-timeout``; None for ``auto``, and endless for ``off``.

    Raises:
        UserError: it is neither, or less than `LEAST_HANG_S`.
    """
    if choice in (AUTO, OFF):
        return None if choice == AUTO else float("inf")
    try:
        seconds = float(choice)
    except ValueError:
        seconds = -1.0
    if not LEAST_HANG_S <= seconds < float("inf"):
        raise UserError(f"--hang-timeout {choice}: choose auto, off, or seconds, {LEAST_HANG_S} or more")
    return seconds


def spelled(name: str) -> str:
    """An option's name on the command line: ``from`` itself is no name in Python."""
    return "--from" if name == "from_position" else f"--{name.replace('_', '-')}"


def _as_declared(each: Field[Any], value: Any) -> Any:
    """A value in its field's type: paths and sizes may come as text, a single input without a list around it."""
    if value is None:
        return None
    if value == "" and each.type.startswith("Path"):
        raise UserError(f"{spelled(each.name)} is empty; is a variable not set?")
    if each.type.startswith("Path"):
        return Path(value)
    if each.name == "memory_limit":
        return parse_bytes(value, spelled(each.name)) if isinstance(value, str) else value
    if each.name in ("checkpoint", "hang_timeout", "prefix_token", "spans"):
        return str(value)
    if each.type.startswith("tuple"):
        return (str(value),) if isinstance(value, str | Path) else tuple(map(str, value))
    return value


def _check(each: Field[Any], value: Any) -> None:
    known = each.metadata
    if known["choices"]:
        one_of(spelled(each.name), value, known["choices"])
    if known["least"] is not None and value is not None and not (isinstance(value, int) and value >= known["least"]):
        raise UserError(f"{spelled(each.name)} must be at least {known['least']}, not {value}")
    if each.name == "segments":
        check_segments(value)
    if each.name == "checkpoint":
        minutes_between(value)
    if each.name == "keep":
        split_keep(value)
    if each.name == "prefix_token" and value is not None:
        check_prefix_token(value)
    if each.name == "hang_timeout":
        hang_seconds(value)
    if each.name == "inputs" and "" in value:
        raise UserError("--input is empty; is a variable not set?")
    if known.get("needed") and value is None:
        raise UserError(f"{spelled(each.name)} is missing")
