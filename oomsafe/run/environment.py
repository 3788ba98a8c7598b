"""The environment of a command under ``oomsafe run``: with it, each Python below it starts with start.py."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from oomsafe.run.start import RUN

#: Where our sitecustomize lies, and nothing else.
PATH = os.path.join(os.path.dirname(__file__), "path")


def environment_for(environ: Mapping[str, str], settings: Mapping[str, str], given: str | None = None) -> dict[str, str]:
    """`environ` for the command, with `settings` in it, by variable.

    `given` is the PYTHONPATH that this process itself was started with; None: not known. What is in it and not in `environ` any more,
    another wrapper has taken out for its own process's children, and the command would be without that wrapper.
    """
    folders = [PATH]
    for text in (environ.get("PYTHONPATH", ""), given or ""):
        # an empty PYTHONPATH is none; an empty entry between others is the current folder
        folders += [folder for folder in (text.split(os.pathsep) if text else []) if folder not in folders]
    return {**environ, **settings, RUN: str(os.getpid()), "PYTHONPATH": os.pathsep.join(folders)}


def stay_first(module: Any) -> None:
    """`module` is what opentelemetry-instrument runs. Its sitecustomize imports no other, so ours must be found before it.

    It puts its own folder first on PYTHONPATH right before it becomes its command; ours comes before that again.
    """
    execl = module.execl

    def becoming(*arguments: Any) -> None:
        folders = [PATH, *(folder for folder in module.environ.get("PYTHONPATH", "").split(os.pathsep) if folder != PATH)]
        module.environ["PYTHONPATH"] = os.pathsep.join(folders)
        execl(*arguments)

    module.execl = becoming


def given_path() -> str | None:
    """The PYTHONPATH that this process was started with, whatever has become of it in os.environ; None where the kernel can't tell."""
    try:
        with open("/proc/self/environ", "rb") as file:
            block = file.read()
    except OSError:
        return None
    found = [entry for entry in block.split(b"\0") if entry.startswith(b"PYTHONPATH=")]
    return os.fsdecode(found[0].partition(b"=")[2]) if found else ""
