"""A unit for systemd."""

from __future__ import annotations

import re

from oomsafe.cli.paste.deployment import Deployment, mib
from oomsafe.policy.text import printable

_UNIT = """\
# {about}
[Unit]
Description={name}, guarded by oomsafe
After=network.target

[Service]
# User= and Group= of its own are better than root's
WorkingDirectory={directory}
ExecStart={command}
Restart=on-failure
KillMode=mixed
TimeoutStopSec=40

# the kernel kills above this; the pool keeps to 90 % of it
MemoryMax={memory}M
# above MemoryHigh the kernel makes processes wait, and a leak becomes a hang: none, or well above the pool's budget
MemoryHigh=infinity
# one killed worker is one killed worker: systemd's default, stop, would end the whole service
OOMPolicy=continue
# workers have {raised} more than this, so that the kernel takes one of them before their supervisor
OOMScoreAdjust={score}
# Delegate= is not needed: oomsafe makes no cgroups. With Delegate=yes, for whatever needs it, the lines above hold as well

# where oomsafe leaves its last words for the next start
StateDirectory={label}
StateDirectoryMode=0700

[Install]
WantedBy=multi-user.target
"""

#: Words that need no quotes on a command line of a unit (systemd.syntax(7), systemd.service(5)).
_BARE = re.compile(r"[A-Za-z0-9_./:=@+,-]+")


def systemd(pool: Deployment) -> str:
    """A service; programs stand there with their folder, because systemd does not search a virtual environment."""
    run = [f"{pool.folder}/oomsafe" if pool.folder else "/usr/bin/oomsafe", "run", *pool.options, "--"]
    return _UNIT.format(
        about=pool.about,
        name=_plain(pool.name or pool.app),
        directory=_specifiers(printable(pool.directory, 4096)),
        command=" ".join(map(_word, [*run, *pool.command(folder=pool.folder)])),
        memory=mib(pool.memory),
        raised=-pool.score,
        score=pool.score,
        label=pool.label,
    )


def _plain(name: str) -> str:
    """A name that holds nothing that means something to systemd."""
    return re.sub(r"[^A-Za-z0-9._:@ -]", "-", name)[:64]


def _word(word: str) -> str:
    if _BARE.fullmatch(word):
        return word
    quoted = printable(word, 4096).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{_specifiers(quoted)}"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")
