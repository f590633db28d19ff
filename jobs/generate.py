"""``cpmpi generate``: answer prompts from a stored document."""

from __future__ import annotations

from typing import Any

import click

from cpmpi.engine.options import GenerateOptions
from cpmpi.jobs.options import asked, options_of
from cpmpi.text import counted


@click.command(name="generate")
@options_of(GenerateOptions)
def command(**options: Any) -> None:
    """Answer prompts from a stored document, which is not read again.

    A single prompt's answer appears as it is made; of several prompts each answer at the end, under its prompt. The
    answers are those of one transformers process on the whole text, on any number of ranks.
    """
    from cpmpi.comm.ranks import start
    from cpmpi.engine.generate import generate

    wanted = asked(GenerateOptions, options)
    alone, speaks = len(wanted.prompts) == 1, start().is_root

    def show(_: int, text: str) -> None:
        if alone and speaks:
            click.echo(text, nl=False)

    done = generate(wanted, show)
    if not done.job.ranks.is_root:
        return
    if alone:
        click.echo()
    else:
        for answer in done.answers:
            click.echo(f"> {answer.prompt}\n{answer.text}\n")
    tokens, step_s = sum(len(a.ids) for a in done.answers), done.steps_s / max(1, done.steps)
    done.job.progress.say(
        f"{counted(tokens, 'token')}; prompts {done.first_s:.2f} s, then {step_s * 1e3:.3g} ms a step"
    )
