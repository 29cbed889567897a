"""What all commands share: words in, exit status out, an error as one paragraph. Imports no torch; neither does any command
before it runs, so that help and a wrong configuration cost no start of torch."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lejepa_scale import logs
from lejepa_scale.errors import Exit, UserError
from lejepa_scale.parallel import launch

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # a write that fails does not say which file's it was
_SIGPIPE_STATUS = 128 + 13  # what a shell reports of a program that SIGPIPE ended


@dataclass(frozen=True)
class Command:
    """One command. `run` imports what it needs itself, and returns the exit status."""

    name: str
    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    only_prints: bool = False  # then a reader that closes early (`| head`) has had all it wanted


@dataclass(frozen=True)
class Group:
    """Commands under a common first word."""

    name: str
    summary: str
    introduction: str
    commands: tuple[Command | Group, ...]
    examples: str = ""
    options: tuple[tuple[str, str], ...] = ()  # of the caller, for the help

    def help(self, program: str) -> str:
        rows = [*((command.name, command.summary) for command in self.commands), *self.options]
        rows.append(("-h, --help", "this text, or that of a command"))
        table = "\n".join(f"  {name:<13}{summary}" for name, summary in rows)
        parts = [f"usage: {program} COMMAND ...", self.introduction, table, self.examples]
        return "\n\n".join(part for part in parts if part)


def start(command: Command | Group, words: Sequence[str], before: str = "") -> int:
    """Run the command that `words` ask for. Returns the exit status, as `Exit` has it."""
    program = f"{before} {command.name}".strip()
    if isinstance(command, Command):
        return _run(command, words, program)
    if not words or words[0] in ("-h", "--help"):
        print(command.help(program))
        return Exit.DONE if words else Exit.MISTAKE
    for one in command.commands:
        if one.name == words[0]:
            return start(one, words[1:], program)
    return refuse(_unknown(command, words[0], program))


def refuse(error: UserError) -> int:
    """Print the paragraph: once where every rank has the same error, else with the rank. Returns the exit status."""
    rank = launch.rank()
    if rank == 0 or not error.everywhere:
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
    else:
        time.sleep(3)  # a launcher ends the other ranks when the first one leaves: rank 0 speaks before that
    sys.stdout.flush()
    sys.stderr.flush()
    return error.status


def positive(text: str) -> int:
    """A count on the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=["best", "trained", "average", "first"],
        default="best",
        help="best: averaged along the way where the run keeps an average (average.kind), else trained; first: those it "
        "began with",
    )


def add_range(parser: argparse.ArgumentParser, default: str) -> None:
    """`--range LOW HIGH`, of all channels or a pair for each; `ranges` reads it."""
    parser.add_argument(
        "--range",
        nargs="+",
        type=float,
        metavar="N",
        help=f"LOW HIGH of the stored values, or a pair for each channel; default: {default}",
    )


def add_keys(parser: argparse.ArgumentParser, default: str = "any image's, and cls", *, label: bool = True) -> None:
    """`--image-key` and `--label-key`, as `data.shards` has them."""
    parser.add_argument(
        "--image-key",
        metavar="ENDING",
        help=f"of the member that is a sample's image, as left.jpg (default: {default})",
    )
    if label:
        parser.add_argument(
            "--label-key", metavar="ENDING", help="of its label, with a path in JSON documents, as json:category.id"
        )


def shown_again(text: Callable[[], str], every: float, *, once: bool) -> int:
    """Print what `text` gives, on a terminal on an empty screen, again and again until Ctrl-C. Returns the exit status."""
    try:
        while True:
            said = text()
            if not once and sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")
            print(said, flush=True)
            if once:
                return Exit.DONE
            time.sleep(every)
    except KeyboardInterrupt:
        return Exit.DONE


def expect_writable(*files: Path | None) -> None:
    """Before the work whose results they are to hold. Raises UserError where a file could not be written; its folder need
    not be there yet. Of more than one rank, the one that writes looks."""
    for file in files:
        if file is None or launch.rank() > 0:
            continue
        if file.is_dir():
            raise UserError(f"{file} is a folder: name a file.")
        there = next(path for path in (file, *file.absolute().parents) if path.exists())
        if there != file and not there.is_dir():
            raise UserError(f"{file} cannot be written: {there} is no folder.")
        if not os.access(there, os.W_OK if there == file else os.W_OK | os.X_OK):
            raise UserError(f"{file} cannot be written: {there} is of others, or on a file system that is read alone.")


def ranges(numbers: Sequence[float] | None) -> tuple[tuple[float, float], ...] | None:
    """Pairs of them. Raises UserError for an odd count."""
    if numbers is None:
        return None
    if len(numbers) % 2:
        raise UserError(
            f"--range takes LOW HIGH, or such a pair for each channel, not {' '.join(f'{n:g}' for n in numbers)}."
        )
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        error = UserError(f"{message}; see {self.prog} --help.")
        error.everywhere = True
        raise SystemExit(refuse(error))


def _run(command: Command, words: Sequence[str], program: str) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=program, description=f"{command.summary}\n\n{command.description}", formatter_class=raw)
    command.add_arguments(parser)
    try:
        arguments = parser.parse_intermixed_args(words)
        logs.to_stderr()
        status = command.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        return refuse(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter's last flush would complain
        return 0 if command.only_prints else _SIGPIPE_STATUS
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        return refuse(_of_the_system(error))
    return status


def _of_the_system(error: OSError) -> UserError:
    """A file that cannot be read or written, which a command has not looked for itself."""
    named = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    status = Exit.MISTAKE if isinstance(error, PermissionError) else Exit.FAULT  # as checkpoint.places has it
    return UserError(f"{f'{named}: ' if named else ''}{error.strerror}.", status)


def _unknown(group: Group, word: str, program: str) -> UserError:
    names = [command.name for command in group.commands]
    inner = {one.name: f"{c.name} {one.name}" for c in group.commands if isinstance(c, Group) for one in c.commands}
    near = difflib.get_close_matches(word, [*names, *inner], n=1, cutoff=0.5)
    meant = f", did you mean `{program} {inner.get(near[0], near[0])}`?" if near else "."
    error = UserError(f"{program} has no command {word!r}{meant} It has {', '.join(names)}; see {program} --help.")
    error.everywhere = True
    return error
