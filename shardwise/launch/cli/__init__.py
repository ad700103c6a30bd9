"""The `shardwise` command: a table of verbs, each in its own module, imported only when it is asked for."""

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

VERBS = {
    "plan": "what a model becomes under a layout: shapes, bytes and collectives of every rank, without weights",
    "run": "answer prompts with a model split over several ranks",
    "bench": "measure: comm, ops, moe or generate",
    "shard": "write per-rank checkpoints, or merge them back",
    "doctor": "what this machine offers, and what is wrong with it",
    "ops": "the operator library: what exists, what runs here and why not",
    "explain": "print the report of a failed job, with the stacks of its ranks",
}
BENCHES = {
    "comm": "collectives, beside gloo, MPI or NCCL",
    "ops": "operators, beside other libraries",
    "moe": "mixture-of-experts layers",
    "generate": "a whole model: prefill and decode",
}
DONE, FAILED, USAGE = 0, 1, 2
DIGITS = 18
"""Of a count: what has more is no machine's, and overflows a 64-bit integer or a float somewhere."""
ECHO_PAUSE = 0.5
"""Seconds that a rank other than 0 waits before it complains of the command line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the return value is the process's exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without a character shows its number, not an error
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None:  # closed by the caller: nobody hears what is said there, which is no reason to fail
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        _require_folder()
        return _dispatch(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; there is nobody to tell
        return FAILED
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return _complain(error)
    except BaseException as error:
        if not hasattr(error, "exit_code"):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would meet the interpreter's own end
        print(f"shardwise: ended by {error}", file=sys.stderr)  # a signal asked us to
        return error.exit_code


def _require_folder() -> None:
    """FileNotFoundError where the current folder was removed: neither torch nor a launcher starts in such a place."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise FileNotFoundError("the current folder is gone: change into one that is there") from None


def _dispatch(words: list[str]) -> int:
    from shardwise import __version__

    parser = _Parser(prog="shardwise", description="Plan, load and run language models over many ranks.")
    parser.add_argument("--version", action="version", version=f"shardwise {__version__}")
    chosen = _chosen(parser, "verbs", "VERB", VERBS, words)
    if chosen == "bench":
        return _bench(words[1:])
    return _run_module(f"shardwise {chosen}", chosen, VERBS[chosen], words[1:])


def _bench(words: list[str]) -> int:
    parser = _Parser(prog="shardwise bench", description=VERBS["bench"])
    what = _chosen(parser, "what to measure", "WHAT", BENCHES, words)
    return _run_module(f"shardwise bench {what}", f"bench_{what}", BENCHES[what], words[1:])


def _chosen(parser: "_Parser", title: str, metavar: str, legal: dict[str, str], words: list[str]) -> str:
    """The first of `words`, one of `legal`; whatever else it may be ends the process."""
    table = parser.add_subparsers(title=title, dest="chosen", metavar=metavar)
    for name, help in legal.items():
        table.add_parser(name, help=help, add_help=False)
    found, unknown = parser.parse_known_args(words[:1])
    if unknown:
        parser.error(f"unrecognized arguments: {unknown[0]}")
    if found.chosen is None:
        parser.error(f"the following arguments are required: {metavar}")
    return found.chosen


def _run_module(prog: str, module: str, description: str, words: list[str]) -> int:
    verb = importlib.import_module(f"{__name__}.{module}")
    parser = _Parser(prog=prog, description=description)
    verb.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return verb.run(parser.parse_args(words))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, like every other error; the list of options would bury it."""
        _after_rank_0()
        self.exit(USAGE, f"{self.prog}: error: {message} ({self.prog} --help lists what is legal)\n")


def _after_rank_0() -> None:
    """Let rank 0 speak first: where all ranks make the same mistake, its exit ends the others before they repeat it."""
    import time

    from shardwise.launch import env

    with contextlib.suppress(ValueError):
        if env.detect().rank > 0:
            time.sleep(ECHO_PAUSE)


def positive(text: str) -> int:
    """Type of options that count something."""
    if not (text.isascii() and text.isdigit()) or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    if len(text) > DIGITS:
        raise argparse.ArgumentTypeError(f"{text:.{DIGITS}}... has more than {DIGITS} digits")
    return int(text)


class UsageError(ValueError):
    """The command line asks for something contradictory or unknown."""

    exit_code = USAGE


@contextlib.contextmanager
def file_of(option: str) -> Iterator[None]:
    """UsageError for what is wrong with the file that this option names."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {_sentence(error)}") from error


def _complain(error: Exception) -> int:
    """One sentence for an error that its text explains, with the name of its type for any other."""
    from shardwise.launch.failure import INPUT_ERRORS
    from shardwise.launch.job import JobFailed

    _after_rank_0()
    if isinstance(error, JobFailed):  # its report is the text
        print(error, file=sys.stderr)
        return error.exit_code
    text = _sentence(error)
    known = type(error).__module__.split(".")[0] == "shardwise" or isinstance(error, (*INPUT_ERRORS, ImportError))
    if isinstance(error, OSError) and error.strerror:
        known = known or error.filename is not None or error.errno == errno.ENOSPC
    print(
        f"shardwise: error: {text if known else f'{type(error).__name__}: {text} (--debug shows where)'}",
        file=sys.stderr,
    )
    return getattr(error, "exit_code", FAILED)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
