"""The model of lm-evaluation-harness: its requests become questions and prompts, which all ranks compute.

The harness runs on rank 0 alone, in a world of one as far as it knows; the other ranks follow. How texts become tokens
is the harness' own rule, as its ``hf`` model has it, so that the numbers are the same; but nothing is cut off, unless
``max_length`` asks for the harness' windows.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from cpmpi.choices import AUTO
from cpmpi.comm.following import Following
from cpmpi.comm.ranks import start
from cpmpi.documents.tokenization import load_tokenizer, tokenize
from cpmpi.engine.extend import Question
from cpmpi.engine.options import ModelOptions
from cpmpi.engine.session import Session, Sessions, Total, longest_of
from cpmpi.errors import UserError
from cpmpi.version import __version__

HARNESS_DEVICE = "cuda:0"  # what the harness says where nobody chose
OF_DRAWS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed")  # greedy answers need none
MOST_TOKENS = 256  # of an answer, where the task does not say: as the harness' other models


class Asked(NamedTuple):
    """A request: token ids of the context, at least one, and of what is scored after it."""

    context: Sequence[int]
    continuation: Sequence[int]


@cache
def following() -> Following:
    """The ranks of this launch, once a process. Collective."""
    ranks = start()
    return Following(ranks, Sessions(ranks))


class CpmpiLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint on all ranks of the launch; only rank 0 comes out of its making, the others follow to their end.

    Args:
        pretrained: checkpoint folder.
        device: ``auto``, ``cpu`` or ``cuda``; the harness' default is taken for ``auto``.
        add_bos_token, prefix_token_id: as of the harness' ``hf`` model.
        max_length: tokens of the harness' windows; None: texts are whole.
        trust_remote_code: refused.
        batch_size, max_batch_size: not used: texts go by their tokens.
        **options: of `cpmpi.engine.options.ModelOptions`.

    Raises:
        UserError: something the user can mend.
    """

    def __init__(
        self, pretrained: str | None = None, *, device: str | None = None, add_bos_token: bool | None = None,
        prefix_token_id: int | None = None, max_length: int | None = None, trust_remote_code: bool | None = False,
        batch_size: Any = None, max_batch_size: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        lead = following()
        if not lead.ranks.is_root:
            problem = lead.follow()
            sys.exit(0 if problem is None else 1)
        if trust_remote_code:
            raise UserError("trust_remote_code: a checkpoint's own code is never run; leave it out")
        wanted = model_options(pretrained, device, options)
        if max_length is not None and not (isinstance(max_length, int) and max_length >= 1):
            raise UserError(f"max_length must be a number of tokens from 1 on, not {max_length}")
        self._call, number = lead.call, lead.call("open", wanted)
        self.session: Session = lead.worker.all[number]
        self._number = number
        if lead.ranks.size == 1:  # no other rank would be asked at a time of the collector's choice
            weakref.finalize(self, lead.call, "close", number)
        changes = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        self.tokenizer = load_tokenizer(wanted.model, **changes)
        self.add_bos_token, self._windows = add_bos_token, max_length
        self._prefix_token_id = self._choose_prefix(prefix_token_id)
        self._prefix = self.tokenizer.decode(self._prefix_token_id)

    def _choose_prefix(self, given: int | None) -> int:
        """What comes before a text without context: what was asked for, or the token that begins texts, or ends."""
        tokens = (given, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        chosen, size = next((token for token in tokens if token is not None), None), self.session.checkpoint.vocab_size
        if chosen is None:
            raise UserError("the tokenizer has no token that begins or ends texts: prefix_token_id=ID says which")
        if not (isinstance(chosen, int) and 0 <= chosen < size):
            raise UserError(f"prefix_token_id={chosen}: the vocabulary has {size} tokens, 0 to {size - 1}")
        return chosen

    @property
    def eot_token_id(self) -> Any:
        """The token that ends texts."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before texts that have no context."""
        return self._prefix_token_id

    @property
    def max_length(self) -> int | None:
        """Tokens of a window, or positions that the checkpoint was made for."""
        return self._windows or self.session.checkpoint.max_positions

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer, where the task does not say."""
        return MOST_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """For the harness' cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the checkpoint's template writes it.

        Raises:
            UserError: there is none, or it does not take this chat.
        """
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip
        except (TemplateError, ValueError) as problem:
            raise UserError(f"{self.tokenizer.name_or_path}: the chat template: {problem}") from problem

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes down of the model."""
        return {
            "model_dtype": str(self.session.model.dtype), "model_source": str(self.session.checkpoint.folder),
            "cpmpi_version": __version__, "cpmpi_ranks": self.session.ranks.size,
        }  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's token ids; special tokens as the tokenizer adds them, unless the text has the first itself."""
        if add_special_tokens is None:
            add_special_tokens = False if string.startswith(self._prefix) else self.add_bos_token
        ids: list[int] = tokenize(self.tokenizer, string, add_special_tokens).tolist()
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability, and whether it is the greedy answer, of each continuation."""
        found: list[Any] = [None] * len(requests)
        asked = [Asked(*self._cut(context, continuation)) for _, context, continuation in requests]
        for (text, _, _), one in zip(requests, asked, strict=True):
            if not len(one.continuation):
                raise UserError(
                    f"the tokenizer makes one token of the end of a context and {text[1]!r}: nothing is left to score; "
                    "a target_delimiter keeps them apart"
                )
        for i, total in self._totals(asked, "loglikelihood", disable_tqdm):
            found[i] = tuple(total)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """With windows, a context that is cut off on the left, as the harness does it."""
        if self._windows is None:
            return context, continuation
        if len(continuation) > self._windows:
            raise UserError(f"{len(continuation)} tokens to score are more than max_length={self._windows}")
        return context[-(self._windows + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, its first token among them."""
        asked: list[Asked] = []
        of: list[int] = []
        for number, request in enumerate(requests):
            for window in self._windows_of(self.tok_encode(request.args[0])):
                asked.append(window)
                of.append(number)
        found, left = [0.0] * len(requests), [of.count(number) for number in range(len(requests))]
        for i, total in self._totals(asked, "loglikelihood_rolling", disable_tqdm):
            found[of[i]] += total.logprob
            left[of[i]] -= 1
            if not left[of[i]]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[of[i]].args, found[of[i]])
        return found

    def _windows_of(self, ids: list[int]) -> Iterator[Asked]:
        """A text after the prefix token: whole, or in the harness' windows."""
        if not ids:
            return
        if self._windows is None:
            yield Asked([self.prefix_token_id], ids)
            return
        for window in get_rolling_token_windows(ids, self.prefix_token_id, self._windows, 1):
            yield Asked(*make_disjoint_window(window))

    def _totals(self, asked: Sequence[Asked], name: str, quiet: bool) -> Iterator[tuple[int, Total]]:
        """The number of each request and what it sums up to, as they come."""
        questions, numbers = grouped(asked, self.session.by_length)
        if not questions:
            return
        self._expect(max(map(longest_of, questions)))
        with tqdm(total=len(asked), desc=f"Running {name} requests", disable=quiet) as bar:
            for batch in self.session.batches(questions):
                found = self._do("score", [question for _, question in batch])
                for (place, answer), total in found.items():
                    same = numbers[batch[place][0]][answer]
                    yield from ((i, total) for i in same)
                    bar.update(len(same))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The most probable answer to each context, up to a stop text, the end of the text, or a number of tokens."""
        found = [""] * len(requests)
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(self._asked_for(request), []).append(i)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for (most, until), numbers in alike.items():
                prompts = [self._prompt(requests[i].args[0], most) for i in numbers]
                for place, answer in self._answers(prompts, most, until):
                    i = numbers[place]
                    found[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                    bar.update()
        return found

    def _asked_for(self, request: Any) -> tuple[int, tuple[str, ...]]:
        """Tokens at most, and the texts that end an answer.

        Raises:
            UserError: something else than the most probable tokens is asked for.
        """
        wanted = dict(normalize_gen_kwargs(dict(request.args[1]), MOST_TOKENS))
        most, until = int(wanted.pop("max_gen_toks")), tuple(wanted.pop("until"))
        task = getattr(request, "task_name", None) or "a task"
        if wanted.get("do_sample"):
            raise UserError(
                f"{task} asks for sampling (temperature {wanted.get('temperature')}): cpmpi answers greedily; "
                "--gen_kwargs do_sample=False,temperature=0 says so"
            )
        if unknown := sorted(wanted.keys() - set(OF_DRAWS)):
            raise UserError(f"{task} asks for {', '.join(unknown)} in generation_kwargs, which cpmpi does not know")
        end = self.tokenizer.decode(self.eot_token_id) if self.eot_token_id is not None else ""
        return most, tuple(stop for stop in dict.fromkeys((*until, end)) if stop)

    def _prompt(self, context: str, most: int) -> list[int]:
        """The token ids of a context; with windows cut off on the left, so that there is room for the answer."""
        bos = getattr(self.tokenizer, "bos_token", None)
        ids: list[int] = tokenize(
            self.tokenizer, context, False if bos and context.startswith(bos) else self.add_bos_token
        ).tolist()
        if self._windows is not None:
            if most >= self._windows:
                raise UserError(f"max_length={self._windows} has no room for answers of {most} tokens (max_gen_toks)")
            ids = ids[-(self._windows - most) :]
        return ids or [self.prefix_token_id]

    def _answers(self, prompts: Sequence[list[int]], most: int, until: tuple[str, ...]) -> Iterator[tuple[int, str]]:
        """The place of each prompt and the text after it, as they come."""
        room = np.zeros(most, np.int64)
        questions = [Question(np.array(prompt, np.int64), (room,)) for prompt in prompts]
        batches = list(self.session.batches(questions))
        longest = max(map(longest_of, questions))
        kept = max(-(-len(batch) // self.session.holders) * (longest_of(batch[0][1]) + 1) for batch in batches)
        self._expect(longest, kept)
        for batch in batches:
            answers = self._do("generate", [question.stem for _, question in batch], most, until)
            for (place, _), ids in zip(batch, answers, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                yield place, postprocess_generated_text(text, list(until), None)

    def _expect(self, longest: int, kept: int = 0) -> None:
        """Let the ranks decide how; a text that is too long is refused first."""
        checkpoint = self.session.checkpoint
        limit = checkpoint.max_positions
        if limit is not None and longest > limit and not self.session.options.allow_longer:
            raise UserError(
                f"a text of {longest} tokens is more than the {limit} positions that {checkpoint.folder} was made for "
                f"(max_position_embeddings): in --model_args, allow_longer=True goes on all the same, and "
                f"max_length={limit} cuts texts into the harness' windows"
            )
        self._do("expect", longest, kept)

    def _do(self, name: str, *arguments: Any) -> Any:
        """What the session says, on all ranks."""
        return self._call("do", self._number, name, *arguments)


def model_options(pretrained: Any, device: str | None, options: dict[str, Any]) -> ModelOptions:
    """The options of the model.

    Raises:
        UserError: one is missing, unknown, or cannot be so.
    """
    if pretrained is None:
        raise UserError("pretrained is missing in --model_args: the checkpoint folder, pretrained=DIR")
    if device in (None, HARNESS_DEVICE):
        device = AUTO
    try:
        return ModelOptions.of(**{"model": str(pretrained), "device": device, **options})
    except TypeError as problem:
        raise UserError(f"--model_args: {problem}") from problem


def grouped(asked: Sequence[Asked], by_length: bool) -> tuple[list[Question], list[list[list[int]]]]:
    """The requests as questions: continuations of one context share it, and the same ones are one answer.

    Args:
        asked: the requests.
        by_length: whether only those of the same number of tokens may share.

    Returns:
        The questions, and of each and each of its answers the numbers of the requests.
    """
    stems: dict[tuple[Any, ...], dict[tuple[int, ...], list[int]]] = {}
    for i, (context, continuation) in enumerate(asked):
        key = tuple(context), len(continuation) * by_length
        stems.setdefault(key, {}).setdefault(tuple(continuation), []).append(i)
    questions = [Question(ids_of(stem), tuple(map(ids_of, answers))) for (stem, _), answers in stems.items()]
    return questions, [list(answers.values()) for answers in stems.values()]


def ids_of(ids: Iterable[int]) -> Any:
    """Token ids as an array (T,)."""
    return np.array(list(ids), np.int64)
