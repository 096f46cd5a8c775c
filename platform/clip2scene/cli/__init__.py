"""The command line: ``main``, and one module for each few commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from clip2scene import __version__
from clip2scene.cli import cluster, data, plan, results, run, settings, sweep
from clip2scene.cli.options import Commands
from clip2scene.config import Job
from clip2scene.errors import Clip2sceneError
from clip2scene.machine import HOST

_EXAMPLES = """\
examples:
  clip2scene run jobs/demo.yaml seed=1
  clip2scene plan jobs/nuscenes.yaml --gpus 8
  clip2scene sweep search_spaces/temperatures.yaml --job jobs/streetworld.yaml

`clip2scene COMMAND --help` explains a command."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
_LOOPBACK = (HOST, "localhost")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence on stderr and exit status 1 (2: in the command line itself)."""
    _reach_this_machine_without_a_proxy()
    signals: list[int] = []
    try:
        with _interrupted_by(signals):
            options = _parsed(arguments)
            status: int = options.verb(options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("clip2scene: interrupted; run the same command again to continue", file=sys.stderr)
        return 128 + next(iter(signals), signal.SIGINT)
    except Clip2sceneError as error:
        print(f"clip2scene: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of the output has gone (`| head`); flushing the rest at exit would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in _NO_SPACE:
            sentence = f"the disk is full ({error}); free some space and run the same command again"
        elif error.errno in _UNUSABLE and error.filename is not None:
            sentence = f"{error.filename}: cannot be used ({error.strerror}); give another path"
        else:
            raise
        print(f"clip2scene: {sentence}", file=sys.stderr)
        return 1
    return 128 + signals[0] if signals else status


@contextlib.contextmanager
def _interrupted_by(signals: list[int]) -> Iterator[None]:
    """Let SIGTERM, and SIGHUP of a terminal that closes, end the block as Ctrl-C does, so that runs are closed.

    Signals that are taken care of already are left alone, such as SIGHUP by nohup.

    Args:
        signals: gets the one that came.
    """
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # shell and kernel both send SIGHUP; the second would end the clean-up
        if number == signal.SIGHUP:
            for descriptor in terminals:  # which are gone: whatever is still printed would be an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        signals.append(number)
        raise KeyboardInterrupt

    ours = [kind for kind in (signal.SIGHUP, signal.SIGTERM) if signal.getsignal(kind) == signal.SIG_DFL]
    for kind in ours:
        signal.signal(kind, end)
    try:
        yield
    finally:
        for kind in ours:
            signal.signal(kind, signal.SIG_DFL)


def _reach_this_machine_without_a_proxy() -> None:
    """Exempt this machine from a proxy of the environment, which would look for our servers on its own machine."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""  # the order of urllib and requests
    hosts = [host for host in given.split(",") if host]
    if hosts != ["*"]:
        hosts += [host for host in _LOOPBACK if host not in hosts]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options, with ``key=value`` allowed after options too, which argparse alone does not."""
    options, left = _parser().parse_known_args(arguments)
    if left and ("overrides" not in options or any(word.startswith("-") for word in left)):
        options.error(f"unrecognized arguments: {' '.join(left)}{_as_setting(left) if 'overrides' in options else ''}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _as_setting(left: Sequence[str]) -> str:
    """A hint when the first unknown option is spelled like a job's key."""
    for option, following in zip(left, (*left[1:], "VALUE"), strict=True):
        key, _, value = option.removeprefix("--").partition("=")
        if option.startswith("--") and key.partition(".")[0] in Job.model_fields:
            return f" (a setting is given without dashes: {key}={value or following})"
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip2scene",
        usage="clip2scene [-h] [--version] COMMAND ...",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clip2scene {__version__}")
    commands = Commands(parser)
    groups = {
        "run": (run, sweep, plan, settings),
        "data": (data,),
        "results": (results,),
        "cluster": (cluster,),
    }
    for title, modules in groups.items():
        commands.group(title)
        for module in modules:
            module.register(commands)
    parser.description = (
        "Teach a 3D network what CLIP knows, and fine-tune it with very few labels.\n" + commands.overview.rstrip()
    )
    return parser
