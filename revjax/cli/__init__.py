"""`revjax COMMAND ...`: each command is one function that parses, builds and calls.

A mistake of the user's is one message on stderr and exit code 2. Results go to stdout, the log to stderr.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from ..errors import RevjaxError, nearest

COMMANDS = {
    "train": "train a language model from a config file",
    "generate": "continue a text with a trained model",
    "evaluate": "the loss of a trained model on any text",
    "export": "the parameters of a run as safetensors",
    "convert": "a pretrained model of transformers as a run, and a run as such a model",
    "tokenizer": "train a tokenizer on your own text",
    "runs": "runs side by side: a table, and a plot of their losses",
    "check": "prove on this machine that a model's gradients are right to the bit",
    "plan": "the fastest training step that fits into so much memory",
    "profile": "where the memory of a training step goes: a table, and a plot over the step",
    "doctor": "what revjax finds on this machine, and whether a small model is exact on it",
    "benchmark": "measure exactness, memory or speed beside the alternatives",
    "compare": "train variants of a model by paired seeds, and compare their losses",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `revjax COMMAND ...`; `argv` (default: the command line) starts with the command. Returns the exit code."""
    is_program, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from ..experiment import versions

        print(versions())
        return 0
    if argv[0] not in COMMANDS:
        print(f"revjax: there is no command {argv[0]!r}.{nearest(argv[0], COMMANDS)}\n\n{_usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{argv[0]}", __package__)
    return call(getattr(module, argv[0]), argv[1:], is_program=is_program)


def call(
    command: Callable[[list[str]], int], argv: Sequence[str] | None = None, *, is_program: bool | None = None
) -> int:
    """Runs one command (default: with the command line's words). Returns its exit code: 2 for a user's mistake.

    Where it is all that this process does (default: where the words are the command line's), an interrupt ends it.
    """
    is_program = argv is None if is_program is None else is_program
    if is_program:
        sys.unraisablehook = _send_again
    try:
        code = command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except RevjaxError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read stdout has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 141  # 128 + SIGPIPE, as shells have it
    except KeyboardInterrupt:  # while nothing was under way that could be saved
        print("\nInterrupted.", file=sys.stderr, flush=True)  # below what stands on the line of the terminal
        if is_program:  # ends at once: Python's own end crashes now and then where threads of XLA still run
            with contextlib.suppress(OSError):  # nobody reads it any more
                sys.stdout.flush()
            os._exit(130)
        return 130


def _send_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python drops an interrupt that comes in a callback; jax often is in one while it traces (garbage collection)."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT])
        again.daemon = True  # a command that is done by then has ended as it should
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}   {what}" for name, what in COMMANDS.items())
    return f"usage: revjax COMMAND ...\n\n{listed}\n\nrevjax COMMAND --help explains a command; revjax --version."
