"""gunicorn's dirty workers (25 and later): a pool beside the HTTP workers', with the dirty arbiter as its supervisor.

The kernel kills the dirty workers first, which hold the heavy models, then the HTTP workers, then the two arbiters. The dirty arbiter
keeps the master's score: it holds little but the stash, and if it is killed its workers live on without it while new ones are started.

On SIGTERM a dirty worker drops the action that it runs. So one that is over its limit says so on the scoreboard and keeps working. The
arbiter starts its replacement first, if the budget holds it, gives the old worker no more actions, and ends it after its last action.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from oomsafe.gunicorn.reaping import Reaping, ended_by
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.process import held_of, rss_of
from oomsafe.log import attempt, log
from oomsafe.policy.readers import SCORE_MAX
from oomsafe.policy.settings import Policy
from oomsafe.policy.state import State
from oomsafe.policy.units import format_size
from oomsafe.policy.victims import MARGIN, auto_raise
from oomsafe.scoreboard.slot import Slot
from oomsafe.scoreboard.view import PoolView
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.worker.background import in_thread
from oomsafe.worker.current import set_guard
from oomsafe.worker.guard import Guard

#: Seconds between two ticks of a dirty worker; its own heartbeat comes every dirty_timeout / 2.
TICK_EVERY = 1.0

#: Seconds between two attempts to find a worker for an action.
POLL_EVERY = 0.05

#: Seconds before the next attempt after a replacement failed to boot; doubled with each failure, up to the second figure.
BACKOFF, LONGEST_BACKOFF = 2.0, 60.0

#: Seconds to wait before a dead worker's place is filled. A killed worker's memory is only given back some milliseconds after it was
#: reaped (measured: up to 31): a fork before that, in a full cgroup, would make the kernel kill another worker.
GIVEN_BACK = 0.1

Wake = Callable[[int], None]


@dataclass
class Exchange:
    """A replacement that is under way."""

    old: int
    """The pid of the worker that is replaced."""
    new: int | None
    """The pid of its replacement; None: the old one ends first, because there is no room for both."""
    serves: bool = False
    """Whether the new one serves."""
    ending: asyncio.Task[None] | None = None
    """Ends the old one after its last action; None: it has not begun."""


class DirtyPool:
    """The dirty arbiter's part. Created in the arbiter's process before its first fork; its workers inherit it."""

    def __init__(self, arbiter: Any, policy: Policy, http_workers: int, wake: Wake, name: str) -> None:
        self.pid = os.getpid()
        self._arbiter = arbiter
        # its own score is the master's, which is set already; the master's metrics show this pool, too; and the termination log is its
        self._policy = replace(policy, supervisor_oom_score_adj=None, metrics=None, termination_log=None)
        self._wake = wake
        # gunicorn 25.1 introduced both: a number of workers that can change, and workers that end without removing the arbiter's socket
        self._recycles = hasattr(arbiter, "num_workers")
        self._extra = 0
        """How many more workers than its user wants the arbiter currently has to keep."""
        log.addFilter(_say_whose)
        self._supervisor = Supervisor(self._scored(), "gunicorn dirty", self._wanted, beside=http_workers, top=arbiter.ppid, name=name)
        atexit.register(self._supervisor.close)
        if not self._recycles:
            log.warning("before gunicorn 25.1 a dirty worker that ends removes its arbiter's socket: they are measured, but not recycled")
        self._reaping = attempt("how workers end", "gunicorn", partial(Reaping, arbiter))
        self._exchange: Exchange | None = None
        self._booting: set[int] = set()
        self._leaving: set[int] = set()
        """Pids of workers that get no more actions and are about to end."""
        self._awaited = False
        """Whether the next forked worker replaces one that had to end first."""
        self._failures, self._not_before, self._died_at = 0, 0.0, float("-inf")
        _reserve_at_birth(self)
        self._tick_with_arbiter()
        self._route()

    # In the arbiter.

    def _tick_with_arbiter(self) -> None:
        """The arbiter manages its workers once a second, and whenever one has ended or has poked it."""
        manage, one_at_a_time = self._arbiter.manage_workers, asyncio.Lock()

        async def managing() -> None:
            # gunicorn's method reads the number of workers once, at its start, and would end a worker that is added meanwhile
            async with one_at_a_time:
                attempt("the dirty pool's tick", "gunicorn", self.tick)
                if self._forks_in() > 0:
                    await asyncio.sleep(self._forks_in())
                await manage()

        self._arbiter.manage_workers = managing

    def _route(self) -> None:
        """Send no action to a worker that boots or is about to end; while there is no other, the action waits here."""
        choose = self._arbiter._get_available_worker

        async def available(app_path: str | None = None) -> int | None:
            while True:
                attempt("finding out which workers serve", "gunicorn", self._note_serving)
                for _ in range(max(1, len(self._arbiter.workers))):
                    pid: int | None = await choose(app_path)
                    waits = self._forks_in() > -POLL_EVERY if pid is None else pid in self._booting | self._leaving
                    if not waits or not self._arbiter.alive:
                        return pid
                await asyncio.sleep(POLL_EVERY)

        self._arbiter._get_available_worker = available

    @property
    def _wanted(self) -> int:
        """How many workers the user wants; in gunicorn 25.0 that never changes."""
        return int(getattr(self._arbiter, "num_workers", self._arbiter.cfg.dirty_workers)) - self._extra

    def _forks_in(self) -> float:
        """Seconds until a worker may be forked again; negative after that."""
        return self._died_at + GIVEN_BACK - time.monotonic()

    def reserve(self, worker: Any) -> None:
        """Called before a fork."""
        worker.oomsafe_slot = self._supervisor.reserve()

    def forked(self, worker: Any) -> None:
        """Called after a fork."""
        if self._awaited:
            self._awaited = False
            self._booting.add(worker.pid)

    def exited(self, worker: Any) -> None:
        """Called when a worker has been reaped and not been replaced yet."""
        self._supervisor.release(_slot(worker), ended_by(self._reaping, worker))
        if worker.pid not in self._leaving:
            self._died_at = time.monotonic()
        self._booting.discard(worker.pid)
        self._leaving.discard(worker.pid)
        exchange = self._exchange
        if exchange is None:
            return
        if worker.pid == exchange.old:
            self._exchange = None
            if exchange.new is None:
                self._awaited = True
            else:
                self._shrink(worker)
        elif worker.pid == exchange.new and not exchange.serves:
            self._exchange = None
            self._shrink(worker)
            self._boot_failed(exchange.old)

    def tick(self) -> None:
        """About once a second: update scores and limits, and decide which worker is replaced."""
        wanted = self._wanted
        self._supervisor.policy = self._scored()
        if wanted != self._supervisor.capacity.workers:
            self._supervisor.change(wanted)
        self._supervisor.tick()
        if self._recycles and self._arbiter.alive and self._supervisor.board is not None:
            self._advance(self._supervisor.board.read())

    def _advance(self, pool: PoolView) -> None:
        if self._exchange is None and time.monotonic() >= self._not_before and self._forks_in() <= 0:
            over = [worker for worker in pool.workers if worker.state is State.DRAINING and worker.pid in self._arbiter.workers]
            if over:
                old = max(over, key=lambda worker: held_of(worker.pid) or 0).pid
                first = self._policy.surge and self._holds_one_more(pool)
                new = self._spawn_beside(old) if first else None
                if new is not None or not first:
                    self._exchange = Exchange(old, new)
        exchange = self._exchange
        self._note_serving()
        if exchange is not None and exchange.ending is None and (exchange.new is None or exchange.serves):
            self._leaving.add(exchange.old)
            exchange.ending = asyncio.ensure_future(self._end(exchange.old))

    async def _end(self, pid: int) -> None:
        """End a worker that gets no more actions, after the actions that it has, however long they take."""
        queue = self._arbiter.worker_queues.get(pid)
        if queue is not None:
            await queue.join()
        # since Python 3.12 a worker's server waits for its connections when it is closed
        self._hang_up(pid)
        self._arbiter.kill_worker(pid, signal.SIGTERM)
        await asyncio.sleep(self._policy.grace_period)
        if pid in self._arbiter.workers and pid in self._leaving:
            log.warning("worker %d is idle and did not end within %.0f s of SIGTERM: it is killed", pid, self._policy.grace_period)
            self._arbiter.kill_worker(pid, signal.SIGKILL)

    def _hang_up(self, pid: int) -> None:
        """End the arbiter's connection to a worker. Closing it is not enough: workers forked later have inherited it, and hold it open."""
        _, writer = self._arbiter.worker_connections.get(pid, (None, None))
        if writer is not None:
            with suppress(OSError):  # the worker has ended meanwhile
                writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._arbiter._close_worker_connection(pid)

    def _note_serving(self) -> None:
        if not self._booting or self._supervisor.board is None:
            return
        for worker in self._supervisor.board.read().workers:
            if worker.state is not State.STARTING and worker.pid in self._booting:
                self._booting.discard(worker.pid)
                self._failures = 0
                if self._exchange is not None and worker.pid == self._exchange.new:
                    self._exchange.serves = True

    def _spawn_beside(self, old: int) -> int | None:
        """Fork a worker with the same apps and return its pid, or None if that fails. In the child, this does not return."""
        apps = list(self._arbiter.worker_app_map.get(old, ()))
        self._arbiter._pending_respawns.insert(0, apps)
        try:
            new: int | None = self._arbiter.spawn_worker()
        except OSError as error:
            log.error("no replacement for worker %d can be forked, so it keeps serving: %s", old, error)
            self._back_off()
            return None
        if new is not None:
            self._arbiter.num_workers += 1
            self._extra += 1
            self._booting.add(new)
        return new

    def _shrink(self, gone: Any) -> None:
        """Reduce the number of workers again, so that the worker that is gone is not replaced."""
        self._arbiter.num_workers -= 1
        self._extra -= 1
        if gone.app_paths in self._arbiter._pending_respawns:
            self._arbiter._pending_respawns.remove(gone.app_paths)

    def _boot_failed(self, old: int) -> None:
        self._back_off()
        pause = self._not_before - time.monotonic()
        log.error(
            "a replacement died before it served: worker %d keeps serving, next attempt in %.0f s (its own error is above)", old, pause
        )

    def _back_off(self) -> None:
        self._not_before = time.monotonic() + min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(self._failures, 30))
        self._failures += 1

    def _holds_one_more(self, pool: PoolView) -> bool:
        """Whether the budget holds one more worker of the biggest size that one had right after boot."""
        fresh = max((worker.figures.baseline or 0 for worker in pool.workers), default=0)
        _, budget, used = self._supervisor.reading()
        if fresh and budget is not None and used is not None and budget - used >= fresh:
            return True
        free = None if budget is None or used is None else max(0, budget - used)
        log.warning(
            "no room for a replacement beside the worker that it replaces (a fresh worker has %s, %s of the budget are free): "
            "actions wait while it boots", format_size(fresh or None), format_size(free),
        )  # fmt: skip
        return False

    def _scored(self) -> Policy:
        """The policy with the dirty workers' score: above that of the HTTP workers, which their master may have raised since."""
        wanted = self._policy.worker_oom_score_adj
        if wanted == "auto":
            biggest = max(rss_of(os.getpid()) or 0, rss_of(self._arbiter.ppid) or 0)
            wanted = auto_raise(biggest, read_capacity().effective)
        return replace(self._policy, worker_oom_score_adj=min(SCORE_MAX, wanted + MARGIN) if wanted > 0 else wanted)

    # In a worker.

    def enlist(self, worker: Any) -> None:
        """Right after the fork, before the worker drops privileges."""
        self._supervisor.enlist(_slot(worker))

    def init(self, worker: Any) -> None:
        """When its apps are loaded, before the worker serves."""
        slot = _slot(worker)
        # a worker asks for its replacement through the scoreboard; without a slot, it could not
        recycle = _serve_on if slot is not None and self._recycles else None
        how = {"recycle": recycle, "background": in_thread, "poke": partial(self._wake, worker.ppid)}
        guard = Guard.of_seat(self._supervisor.seat(slot), self._supervisor.board, slot, unit="actions", **how)
        _count_actions(worker, guard)
        _tick_with_worker(worker, guard)
        set_guard(guard)


def _serve_on() -> None:
    """Do nothing: the arbiter ends this worker when the time has come."""


def _count_actions(worker: Any, guard: Guard) -> None:
    handle = worker.handle_request

    async def handling(message: Any, writer: Any) -> None:
        name = f"{message.get('app_path')}.{message.get('action')}"
        work = guard.meter.begin(name.encode("utf-8", "replace"))
        work.route = name
        try:
            await handle(message, writer)
        finally:
            work.end()

    worker.handle_request = handling


def _tick_with_worker(worker: Any, guard: Guard) -> None:
    """Run the guard's tick beside the worker's heartbeat, which starts when the worker serves and ends with its loop."""
    beat = worker._heartbeat_loop

    async def beating() -> None:
        guard.ready()
        ticking = asyncio.ensure_future(_tick(guard))
        try:
            await beat()
        finally:
            ticking.cancel()
            guard.retire()

    worker._heartbeat_loop = beating


async def _tick(guard: Guard) -> None:
    while True:
        guard.tick()
        await asyncio.sleep(TICK_EVERY)


def _reserve_at_birth(pool: DirtyPool) -> None:
    """Replace the worker class in the arbiter's process: there is no hook before a fork, nor in a worker before it drops privileges."""
    module = sys.modules["gunicorn.dirty.arbiter"]
    plain: Any = module.DirtyWorker

    class GuardedDirtyWorker(plain):  # type: ignore[misc]  # whichever gunicorn is installed
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            attempt("reserving a slot", "gunicorn", lambda: pool.reserve(self))

        def init_process(self) -> None:
            attempt("raising the score", "gunicorn", lambda: pool.enlist(self))
            super().init_process()

    module.DirtyWorker = GuardedDirtyWorker  # type: ignore[attr-defined]


def _say_whose(record: logging.LogRecord) -> bool:
    record.msg = f"dirty pool: {record.msg}"
    return True


def _slot(worker: Any) -> Slot | None:
    return getattr(worker, "oomsafe_slot", None)
