"""The environment of a command under ``oomsafe run``: it makes each Python process below the command run start.py at its start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from oomsafe.run.start import RUN

#: The folder of our sitecustomize, which has no other modules.
PATH = os.path.join(os.path.dirname(__file__), "path")


def environment_for(environ: Mapping[str, str], settings: Mapping[str, str], given: str | None = None) -> dict[str, str]:
    """`environ` for the command, with `settings` (by variable) added.

    `given` is the PYTHONPATH that this process was started with; None: not known. An entry that is missing in `environ` was taken out by
    another wrapper for its process's children; it is added again, so that the command keeps that wrapper.
    """
    folders = [PATH]
    for text in (environ.get("PYTHONPATH", ""), given or ""):
        # an empty PYTHONPATH has no entry; an empty entry between others means the current folder
        folders += [folder for folder in (text.split(os.pathsep) if text else []) if folder not in folders]
    return {**environ, **settings, RUN: str(os.getpid()), "PYTHONPATH": os.pathsep.join(folders)}


def stay_first(module: Any) -> None:
    """`module` is what opentelemetry-instrument runs. Its sitecustomize does not import any other one, so ours must be found first.

    It puts its own folder first on PYTHONPATH right before it execs its command; this puts our folder before that one again.
    """
    execl = module.execl

    def becoming(*arguments: Any) -> None:
        folders = [PATH, *(folder for folder in module.environ.get("PYTHONPATH", "").split(os.pathsep) if folder != PATH)]
        module.environ["PYTHONPATH"] = os.pathsep.join(folders)
        execl(*arguments)

    module.execl = becoming


def given_path() -> str | None:
    """The PYTHONPATH that this process was started with, whatever os.environ says now; None if /proc is not available."""
    try:
        with open("/proc/self/environ", "rb") as file:
            block = file.read()
    except OSError:
        return None
    found = [entry for entry in block.split(b"\0") if entry.startswith(b"PYTHONPATH=")]
    return os.fsdecode(found[0].partition(b"=")[2]) if found else ""
