"""``oomsafe run``: execs the command, and guards every server that it starts. Without click, which a worker's image may lack."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from oomsafe.errors import ConfigError
from oomsafe.policy.readers import read_switch
from oomsafe.policy.settings import PREFIX, READERS, is_off, load_policy
from oomsafe.policy.text import near_matches, printable
from oomsafe.run.environment import environment_for, given_path

#: Exit statuses as in shells: command not found, found but not runnable; bad usage.
NOT_FOUND, NOT_RUN, USAGE = 127, 126, 2

ABOUT = """\
Usage: oomsafe run [OPTION ...] [--] COMMAND [ARGUMENT ...]

Run COMMAND, and guard every gunicorn, uvicorn and Celery worker that it starts: `oomsafe run --soft-limit 300MiB -- gunicorn app:app`.
The command takes this process's place: its exit status, signals and standard streams are its own. Each option sets the variable of the
same name for it (OOMSAFE_SOFT_LIMIT=300MiB); all settings are in the README. OOMSAFE_DISABLE=1 turns all of it off.
"""


def run(arguments: Sequence[str]) -> NoReturn:
    """Never returns: this process becomes the command, or ends with one line on stderr."""
    options, command = _read(arguments)
    settings = {PREFIX + name.upper(): text for name, text in options.items()}
    environ = dict(os.environ)
    if is_off(environ):
        print("oomsafe run: off (OOMSAFE_DISABLE is set)", file=sys.stderr)
    else:
        _check(options, {**environ, **settings})
        environ = environment_for(environ, settings, given_path())
    _become(command, environ)


def _read(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(settings by field, the command). Parsed by hand, because argparse takes 10 ms each time that a service starts."""
    known = _options()
    options: dict[str, str] = {}
    words = list(arguments)
    while words and words[0].startswith("-") and words[0] != "--":
        option, given, text = words.pop(0).partition("=")
        if option in ("-h", "--help"):
            _help(known)
        if option not in known:
            _end(USAGE, f"no such option: {printable(option)}{near_matches(option, list(known))}; oomsafe run --help has all of them")
        name, switched = known[option]
        if switched is None and not given:
            if not words or words[0].startswith("--"):
                _end(USAGE, f"{option} needs a value: {option}=VALUE")
            text = words.pop(0)
        elif switched is not None and given:
            _end(USAGE, f"{option} takes no value")
        options[name] = text if switched is None else switched
    if words[:1] == ["--"]:
        del words[0]
    if not words:
        _end(USAGE, "no COMMAND: oomsafe run -- gunicorn app:app")
    return options, words


def _options() -> dict[str, tuple[str, str | None]]:
    """By option: the field that it sets, and the text that it sets the field to; None: the option's value."""
    known: dict[str, tuple[str, str | None]] = {}
    for name, read in READERS.items():
        if name == "metrics_token":
            continue  # a secret, see below
        option = name.replace("_", "-")
        if read is read_switch or name == "headers":  # a secret would be in the list of processes, for every user to read
            known[f"--{option}"], known[f"--no-{option}"] = (name, "true"), (name, "false")
        else:
            known[f"--{option}"] = name, None
    return known


def _help(known: Mapping[str, tuple[str, str | None]]) -> NoReturn:
    print(ABOUT)
    for option, (_, switched) in known.items():
        print(f"  {option}{' VALUE' if switched is None else ''}")
    raise SystemExit(0)


def _check(options: Mapping[str, str], environ: Mapping[str, str]) -> None:
    """End with an error for an invalid setting, before anything starts."""
    try:
        for name, text in options.items():
            READERS[name](f"--{name.replace('_', '-')}", text)
        load_policy(environ, {})
    except ConfigError as error:
        _end(USAGE, str(error))


def _become(command: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    program = command[0]
    # Python ignores these signals, and an ignored signal stays ignored across exec
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(program, list(command), dict(environ))  # noqa: S606  the user's own command
    except FileNotFoundError:
        if len(program.split()) > 1 and len(command) == 1:
            _end(NOT_FOUND, f"COMMAND {printable(program)!r} is one word with spaces in it; leave the quotes out: oomsafe run -- {program}")
        if os.path.exists(program):
            _end(NOT_FOUND, f"COMMAND {printable(program)!r} can't be run: the interpreter in its first line does not exist")
        _end(NOT_FOUND, f"COMMAND not found: {printable(program)!r}; an example: oomsafe run -- gunicorn app:app")
    except NotADirectoryError:
        _end(NOT_FOUND, f"COMMAND not found: {printable(program)!r}; an example: oomsafe run -- gunicorn app:app")
    except PermissionError:
        _end(NOT_RUN, f"COMMAND {printable(program)!r} is not executable; chmod +x, or name its interpreter: oomsafe run -- python app.py")
    except OSError as error:
        _end(NOT_RUN, f"COMMAND {printable(program)!r} can't be run: {error.strerror}")


def _end(status: int, line: str) -> NoReturn:
    print(f"oomsafe run: {line}", file=sys.stderr, flush=True)
    raise SystemExit(status)
