"""A real terminal for tests: a program runs in tmux, which tells what stands on its screen. Always ended."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from needs import need
from serving import until

if TYPE_CHECKING:
    from typing_extensions import Self

#: What tmux knows of the terminal: nothing of it is left by a program that has put it back.
STATE = "#{alternate_on} #{cursor_flag} #{keypad_flag} #{mouse_any_flag}"
SANE = "0 1 0 0"


class Terminal:
    """`command` in a terminal of this size. When it has ended, the screen says with which status, and what stty says."""

    def __init__(self, folder: Path, *command: str, columns: int = 80, rows: int = 24, env: dict[str, str] | None = None) -> None:
        need(shutil.which("tmux") is not None, "tmux is not installed")
        self._socket = str(folder / "tmux")
        # a size in the environment, which xdist sets, would count for more than the terminal's own
        ours = {"NO_COLOR", "COLUMNS", "LINES"}
        environ = {name: value for name, value in os.environ.items() if not name.startswith("OOMSAFE_") and name not in ours}
        # a server of its own, which runs nothing but this, and reads no configuration of the user's
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        # tmux gives the terminal its size after it has started the shell, and a program may miss the signal that says so
        sized = f'until [ "$(stty size)" = "{rows} {columns}" ]; do sleep 0.05; done'
        script = f"{sized}; {shlex.join(['env', *variables, *command])}; echo ended $?; stty -a; exec sleep 600"
        self._tmux(
            "new-session", "-d", "-x", str(columns), "-y", str(rows), "sh", "-c", script,
            first=("-f", "/dev/null"), env={**environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    def screen(self, *, styled: bool = False) -> str:
        """What stands there now; with `styled`, with its escape sequences."""
        return self._tmux("capture-pane", "-p", *(["-e"] if styled else []))

    def until(self, text: str, seconds: float = 20) -> str:
        """Wait until this stands there, and return the screen."""
        return until(lambda: (screen := self.screen()) and text in screen and screen, f"{text!r} on the screen", seconds)

    def press(self, *keys: str) -> None:
        """Press these, as tmux names them."""
        self._tmux("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        """As the user draws its window."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    @property
    def state(self) -> str:
        """See STATE."""
        return self._tmux("display-message", "-p", STATE).strip()

    @property
    def pid(self) -> int:
        """Of the program, which is the shell's only child."""
        shell = self._tmux("display-message", "-p", "#{pane_pid}").strip()
        return int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])

    def hang_up(self) -> None:
        """The terminal is gone, as when a connection of ssh's breaks."""
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True, check=False)

    def _tmux(self, *argv: str, first: Sequence[str] = (), env: dict[str, str] | None = None) -> str:
        ended = subprocess.run(["tmux", "-S", self._socket, *first, *argv], capture_output=True, text=True, check=True, env=env, timeout=20)
        return ended.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hang_up()
