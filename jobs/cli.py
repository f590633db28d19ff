"""The command line: one lazily imported module of ``jobs`` per command.

``cpmpi --help`` and the commands that only read files never import torch or start MPI.
"""

from __future__ import annotations

import importlib
import io
import sys
import time
from typing import NoReturn

import click

from cpmpi.comm.ranks import first_of_launch
from cpmpi.errors import Stopped, UserError
from cpmpi.text import escaped, escaped_lines
from cpmpi.version import __version__

# command name -> (module with a click command called `command`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "prefill": ("cpmpi.jobs.prefill", "Log-probabilities and KV cache of whole documents."),
    "score": ("cpmpi.jobs.score", "Log-probabilities of whole documents."),
    "extend": ("cpmpi.jobs.extend", "Score what may follow stored documents."),
    "generate": ("cpmpi.jobs.generate", "Answer prompts from a stored document."),
    "lm-eval": ("cpmpi.jobs.lm_eval", "Evaluate a checkpoint with lm-evaluation-harness."),
    "demo": ("cpmpi.jobs.demo", "Run the main job on a small checkpoint and a long text."),
    "inspect": ("cpmpi.jobs.inspect", "What is in a run folder."),
    "compare": ("cpmpi.jobs.compare", "Two runs of the same documents: where one is less surprised."),
    "tokens": ("cpmpi.jobs.tokens", "A passage of a document with the scores of its tokens."),
    "verify": ("cpmpi.jobs.verify", "Check the files of a run folder against their checksums."),
    "import": ("cpmpi.jobs.import_kv", "A run of keys and values that were computed elsewhere."),
    "export": ("cpmpi.jobs.export", "Documents of a run folder for other tools."),
    "report": ("cpmpi.jobs.report", "A run as one HTML page, and its plots as pictures."),
    "bench": ("cpmpi.jobs.bench", "Try a new machine; measure attention across ranks, or messages."),
    "plan": ("cpmpi.jobs.plan", "Time, memory and disk that a job will take on a machine."),
    "submit": ("cpmpi.jobs.submit", "Submit a command to Slurm: script, forecast, requeue."),
    "status": ("cpmpi.jobs.status", "Where a submitted run stands: jobs, documents, failures."),
    "cancel": ("cpmpi.jobs.cancel", "Cancel the jobs of a run."),
    "topology": ("cpmpi.jobs.topology", "What the machine is: discover, measure, save, draw."),
}
RANK_0_SPEAKS_S = 2.0


class LazyGroup(click.Group):
    """A click group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name][0]).command
        add_debug(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]!r}; choices: {', '.join(COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


def add_debug(command: click.Command) -> None:
    """Let a command and the commands in it accept ``--debug``, which the entry point reads for all alike."""
    if "--debug" not in {name for option in command.params for name in option.opts}:
        command.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, help="Show tracebacks."))
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            add_debug(inner)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cpmpi")
def cli() -> None:
    """Exact whole-document LLM prefill and scoring as MPI batch jobs."""


def main() -> None:
    """Entry point of the console script: exit status 0, 2 for bad usage, 1 with one ``error:`` line.

    An error that only one rank knows of ends all ranks, as under ``python -m mpi4py``.
    """
    from cpmpi.comm import ranks

    debug = "--debug" in sys.argv
    take_any_character()
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as problem:
        end_line()
        context = getattr(problem, "ctx", None)
        if first_of_launch() and isinstance(problem, click.exceptions.NoArgsIsHelpError):
            click.echo(problem.format_message(), err=True)
        elif first_of_launch():
            hint = f" (see {context.command_path} --help)" if context else ""
            click.echo(f"error: {escaped_lines(problem.format_message())}{hint}", err=True)
        leave(problem.exit_code)
    except click.Abort as stop:  # what click makes of two exceptions
        end_line()
        cause = stop.__cause__
        ranks.abort(f"{type(cause).__name__}: {cause}" if isinstance(cause, EOFError) else "interrupted")
        leave(130)
    except SystemExit as stop:  # of click, where standard output was closed
        if stop.code and ranks.connected():
            ranks.abort("standard output was closed")
        raise
    except Stopped as stopped:
        stop_together(stopped)
    except Exception as problem:
        end_line()
        if debug and (first_of_launch() or not isinstance(problem, ranks.AgreedError)):
            import traceback

            traceback.print_exc()
        if isinstance(problem, ranks.AgreedError):
            if first_of_launch():
                click.echo(f"error: {escaped_lines(str(problem))}", err=True)
        elif isinstance(problem, UserError):
            ranks.abort(escaped_lines(str(problem)), alone=first_of_launch())
        else:
            text = escaped(" ".join(str(problem).split()))
            ranks.abort(f"{type(problem).__name__}: {text} (--debug shows where)", alone=first_of_launch())
        leave(1)
    sys.exit(status)


def end_line() -> None:
    """Take away a line of progress that stands on the terminal."""
    from cpmpi.comm import progress

    progress.end_line()


def take_any_character() -> None:
    """Let names of any script be printed on any terminal: what its encoding has not is escaped, and no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def stop_together(stopped: Stopped) -> NoReturn:
    """Exit after a stop that all ranks agreed on: with its status on rank 0, with 0 on the others.

    Launchers end the other ranks when they see one with a status that is not 0; these are on their way out themselves,
    and must not be counted as killed.
    """
    import signal

    from cpmpi.comm.stop import last_words

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if first_of_launch():
        last_words(str(stopped))
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized():
        mpi.COMM_WORLD.Barrier()
    sys.exit(stopped.status if first_of_launch() else 0)


def leave(status: int) -> NoReturn:
    """Exit with a status that is not 0, having said why.

    A launcher ends all ranks when it sees one that failed. Where no MPI holds them together, those that say nothing
    give rank 0 the time to speak.
    """
    from cpmpi.comm import ranks

    if not (first_of_launch() or ranks.connected()):
        time.sleep(RANK_0_SPEAKS_S)
    sys.exit(status)
