"""The command line `medmicn`: one entry point, errors for people, exit codes that mean something."""

from __future__ import annotations

import sys
import traceback
import warnings

import typer

from data_contracts.errors import ExitCode, MedMicnError
from flows import console as consoles
from flows.commands import demo, exchange, journal, labels, repeat, run, steps, use
from flows.commands.common import OUTCOME

# typer carries its own click and exports of its usage errors only this one's children.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_HELP = """Concept labels for medical images, and a classifier that explains itself.

\b
First steps:
  medmicn demo         try everything on generated images
  medmicn run FOLDER   images in; labels, classifier and report out
  medmicn review       look at the labels in a browser, correct them
  medmicn doctor       what works on this machine, what is missing

\b
Exit codes: 0 done, 2 usage or configuration, 3 input refused,
4 stopped (resumable), 5 finished with failures, 130 interrupted (resumable).

A research tool, no medical device.
"""

app = typer.Typer(
    name="medmicn",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (run, steps, labels, exchange, journal, use, demo, repeat):
    module.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and leave the process with its exit code."""
    # Libraries below warn about their own insides; what a user must know is said by this project itself.
    warnings.simplefilter("ignore")
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        result = app(args=arguments, standalone_mode=False)
        if result == ExitCode.INTERRUPTED:
            # typer turns an interrupt into a result; people still want to hear that nothing is lost.
            return _close(*_explained(KeyboardInterrupt()))
        return _close(int(result) if isinstance(result, int) else ExitCode.DONE)
    except typer.Exit as stop:
        return _close(stop.exit_code)
    except Exception as error:
        return _close(*_explained(error))
    except KeyboardInterrupt as error:
        return _close(*_explained(error))


def _explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error, after it was shown to the person."""
    say = consoles.shared()
    if isinstance(error, MedMicnError):
        say.error(str(error))
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        message = "interrupted; nothing is lost, the same command goes on from here."
        say.error(message)
        return ExitCode.INTERRUPTED, message
    if isinstance(error, _UsageError):
        message = str(getattr(error, "message", error))
        # Without any argument the message is the help page.
        say.error(message if "Usage:" not in message else f"a verb is missing.\n\n{message}")
        return ExitCode.CONFIGURATION, message
    say.error(f"unexpected: {type(error).__name__}: {error}")
    say.say(traceback.format_exc())
    return ExitCode.FAILED, f"{type(error).__name__}: {error}"


def _close(exit_code: int, error: str | None = None) -> int:
    OUTCOME.print(exit_code, error)
    return exit_code


if __name__ == "__main__":
    main()
