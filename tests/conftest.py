"""Fixtures that all rooms share: a real gunicorn, ended with all its processes, its log shown when the test fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from serving import Gunicorn, app_for, conf

Serve = Callable[..., Gunicorn]


@pytest.fixture
def serve(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serve]:
    """Start gunicorn: serve("gthread", soft_limit="64MiB"), as conf(); serve(text=..., app=..., argv=..., env=..., files=...)."""
    started: list[Gunicorn] = []
    with ExitStack() as stack:

        def start(
            worker_class: str = "sync", workers: int = 2, *, text: str | None = None, app: str | None = None, settings: str = "",
            install: bool = True, argv: Any = (), env: dict[str, str] | None = None, prefix: Any = (), wrap: Any = list,
            files: Any = (), **policy: object,
        ) -> Gunicorn:  # fmt: skip
            folder = tmp_path / f"gunicorn-{len(started)}"
            folder.mkdir()
            for name, content in dict(files).items():
                (folder / name).write_text(content)
            text = conf(worker_class, workers, settings=settings, install=install, **policy) if text is None else text
            gunicorn = Gunicorn(folder, text, app or app_for(worker_class), argv=argv, env=env, prefix=prefix, wrap=wrap)
            started.append(gunicorn)
            return stack.enter_context(gunicorn)

        yield start
        for gunicorn in started:
            # shown with the failure of the call, which has its own report behind it by now
            request.node.add_report_section("teardown", f"log of gunicorn {gunicorn.pid}", gunicorn.log())
    left = [path for gunicorn in started for path in _boards(gunicorn.pid)]
    for path in left:
        os.unlink(path)


def _boards(pid: int) -> list[str]:
    folder = f"/dev/shm/oomsafe-{os.geteuid()}"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [f"{folder}/{name}" for name in names if name.startswith(f"{pid}-")]
