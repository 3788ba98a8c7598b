"""gunicorn's hooks: they translate and decide nothing, and none can hurt the master: a failure is logged once."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from oomsafe.errors import ConfigError
from oomsafe.gunicorn import workers
from oomsafe.gunicorn.chain import chain
from oomsafe.gunicorn.fleet import GunicornFleet
from oomsafe.gunicorn.reaping import Reaping, ended_by
from oomsafe.gunicorn.waiting import watch_with
from oomsafe.kernel.net import migrates_requests
from oomsafe.log import attempt, failed, log, log_with, say_off
from oomsafe.policy.settings import PREFIX, Policy, came_too_late, is_off, load_policy, set_in
from oomsafe.scoreboard.slot import Slot
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.worker.current import set_guard
from oomsafe.worker.guard import Guard

if TYPE_CHECKING:
    from oomsafe.gunicorn.dirty import DirtyPool

#: How to give gunicorn a variable in time.
GIVE_IT = "give it to gunicorn, in the environment that it is started with or with its -e (raw_env), or to install()"

_plugin: Plugin | None = None


def install(namespace: dict[str, Any], **policy: Any) -> None:
    """Guard the workers of the gunicorn with the configuration `namespace`: ``install(globals(), ...)``, as its last line.

    The hooks that the configuration defines are called as before. The keywords are those of Policy. A
    setting that can't be right is reported in one line on stderr, and gunicorn does not start; at a reload
    (SIGHUP) the policy stays as it was, because exiting would take the whole service down. OOMSAFE_DISABLE turns oomsafe off.
    """
    if is_off(os.environ):
        say_off()
        return
    global _plugin
    running = _plugin is not None and _plugin.running
    try:
        loaded = Loaded(policy)
    except ConfigError as error:
        _refuse(error, running)
    else:
        if _plugin is None or not running:
            _plugin = Plugin(loaded)
        else:
            _plugin.next = loaded
    assert _plugin is not None
    for name, (hook, first) in _plugin.hooks().items():
        namespace[name] = chain(hook, namespace.get(name), first=first, failed=_plugin.failed)


class Loaded:
    """The policy from install()'s keywords, the environment, and the variables that gunicorn will add to it."""

    def __init__(self, keywords: dict[str, Any], more: dict[str, str] | None = None) -> None:
        """`more` are the variables of gunicorn's raw_env. Raises ConfigError."""
        environ = {**os.environ, **(more or {})}
        self.keywords = keywords
        self.variables = set_in(environ)
        self.policy, self.warnings = load_policy(environ, keywords)


class Plugin:
    """One gunicorn: its policy, and its Supervisor once the arbiter has started."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.next: Loaded | None = None
        """The policy of a configuration that is being reloaded, until gunicorn has read all of it."""
        self._supervisor: Supervisor | None = None
        self._fleet: GunicornFleet | None = None
        self._reaping: Reaping | None = None
        self._dirty: DirtyPool | None = None
        """Set in a dirty arbiter and its workers."""
        self._reloading = False
        self._reserved: Slot | None = None
        """The slot of the worker that is being forked."""
        self._first_age = 1
        """The age of the first worker that is forked after a load: it logs for all workers."""

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._loaded.policy

    @property
    def running(self) -> bool:
        """Whether this process is an arbiter that has started, so that reading the configuration is a reload."""
        return self._supervisor is not None and self._supervisor.pid == os.getpid()

    def hooks(self) -> dict[str, tuple[Callable[..., None], bool]]:
        """For each of gunicorn's hook names: our hook, and whether it runs before the user's own.

        Ours runs last if it needs the result of theirs: the app, and the worker's last moments.
        """
        return {
            "on_starting": (self.on_starting, True),
            "on_reload": (self.on_reload, True),
            "nworkers_changed": (self.nworkers_changed, True),
            "pre_fork": (self.pre_fork, True),
            "post_fork": (self.post_fork, True),
            "post_worker_init": (self.post_worker_init, False),
            "worker_abort": (self.worker_abort, True),
            "worker_exit": (self.worker_exit, False),
            "child_exit": (self.child_exit, False),
            "on_exit": (self.on_exit, False),
            # gunicorn before 25 has none of these, and ignores them
            "on_dirty_starting": (self.on_dirty_starting, True),
            "dirty_post_fork": (self.dirty_post_fork, True),
            "dirty_worker_init": (self.dirty_worker_init, False),
            "dirty_worker_exit": (self.dirty_worker_exit, False),
        }

    def on_starting(self, server: Any) -> None:
        """In the arbiter, once, before its first fork."""
        theirs = getattr(server.log, "error_log", None)
        if isinstance(theirs, logging.Logger):
            log_with(theirs)
            theirs.addFilter(self._is_of_a_worker)
        self._fleet = GunicornFleet(server)
        name, dirty = f"gunicorn {server.cfg.worker_class_str}", _dirty_workers(server.cfg)
        self._supervisor = Supervisor(
            self.policy, name, server.num_workers, self._fleet, forks=True, beside=dirty, name=name_of(server.cfg)
        )
        atexit.register(self._supervisor.close)
        if server.cfg.reuse_port and not migrates_requests():
            log.warning("reuse_port: connections queued at a worker that is recycled are lost; set sysctl net.ipv4.tcp_migrate_req=1")
        self._tick_with(server)
        self._reaping = attempt("how workers end", "gunicorn", partial(Reaping, server))
        attempt("caps", "gunicorn", partial(watch_with, server, self._supervisor.watch))
        self._outlive_failed_forks(server)
        self._has_loaded(server)

    def _is_of_a_worker(self, record: logging.LogRecord) -> bool:
        """False for the line in which gunicorn before 25.1 calls the metrics process, when that is killed, a worker."""
        if self._supervisor is None or not str(record.msg).startswith("Worker (pid:"):
            return True
        return not any(f"(pid:{pid})" in record.getMessage() for pid, _ in self._supervisor.exporting)

    def _tick_with(self, server: Any) -> None:
        """The arbiter's loop calls manage_workers at least once a second: a tick without a thread."""
        manage_workers = server.manage_workers

        def ticking() -> None:
            try:
                if self._supervisor is not None:
                    for pid, worker in list(server.WORKERS.items()):
                        self._supervisor.born(_slot(worker), pid)
                    self._supervisor.tick()
            except Exception as error:
                self.failed("tick", error)
            manage_workers()
            self._reloading = False  # reload() has forked by now

        server.manage_workers = ticking

    def _outlive_failed_forks(self, server: Any) -> None:
        """Keep gunicorn from exiting when a worker can't be forked (EAGAIN, ENOMEM, EMFILE) while others serve.

        gunicorn tries again each second, when it counts its workers.
        """
        spawn_worker = server.spawn_worker

        def spawning() -> Any:
            try:
                return spawn_worker()
            except OSError as error:
                if self._supervisor is None or not self.running or not self._supervisor.serves:
                    raise
                slot, self._reserved = self._reserved, None
                self._supervisor.not_started(slot.number if slot else None, slot.generation if slot else None, error)
                return None

        server.spawn_worker = spawning

    def on_reload(self, server: Any) -> None:
        """In the arbiter, after SIGHUP has reloaded the configuration."""
        loaded, self.next = self.next, None
        if loaded is not None:
            self._take_over(loaded, server)
        if self._supervisor is not None and self._fleet is not None:
            self._reloading = True
            self._fleet.forget()
            self._supervisor.change(server.num_workers, self.policy)
        self._has_loaded(server)

    def nworkers_changed(self, server: Any, new: int, old: int | None) -> None:
        """In the arbiter: on SIGTTIN, SIGTTOU, SIGWINCH, our own replacements, and before on_starting, once all options are read."""
        if self._supervisor is None:
            self._take_over(self._loaded, server)
        if self._supervisor is None or self._fleet is None or new == old:
            return
        if not new:
            self._fleet.forget()
        if self._fleet.wanted != self._supervisor.capacity.workers:
            self._supervisor.change(self._fleet.wanted)

    def pre_fork(self, server: Any, worker: Any) -> None:
        """In the arbiter, before each fork."""
        if self._supervisor is None or self._fleet is None:
            return
        if self._supervisor.serves and not self._reloading:
            # a failure while gunicorn starts or reloads must stop it, as always; a worker forked because of us must not end the service
            workers.spare_arbiter(worker, min(self._supervisor.boot_pause, max(1.0, worker.timeout)))
        worker.oomsafe_slot = self._reserved = self._supervisor.reserve()

    def post_fork(self, server: Any, worker: Any) -> None:
        """In the worker, before gunicorn drops privileges: after that its score can no longer be written."""
        if self._supervisor is not None:
            self._supervisor.enlist(_slot(worker))

    def post_worker_init(self, worker: Any) -> None:
        """In the worker, once the app is loaded, before it serves."""
        if self._supervisor is None:
            return
        recycle, left_alone = workers.recycle_of(worker, self.policy.grace_period), workers.left_alone(worker)
        unit = "requests" if left_alone is None else "requests (they are not counted)"
        how = {"recycle": recycle, "background": workers.background_of(worker), "poke": partial(_wake, worker.ppid)}
        guard = Guard.of_seat(self._supervisor.seat(_slot(worker)), self._supervisor.board, _slot(worker), unit=unit, **how)
        if left_alone is None:
            workers.wrap_app(worker, guard)
        workers.tick_with(worker, guard)
        if worker.age == self._first_age:
            _say_what_is_missing(worker, left_alone, recycle is not None)
            late = came_too_late(self._loaded.variables, os.environ, GIVE_IT)
            if late:
                log.warning("%s", late)
        set_guard(guard)
        worker.oomsafe_guard = guard

    def worker_abort(self, worker: Any) -> None:
        """In the worker, when the arbiter ends it because it has not answered in time: what it does now is to be told."""
        guard = getattr(worker, "oomsafe_guard", None)
        if guard is not None and guard.pid == os.getpid():
            guard.meter.keep_in_flight()

    def worker_exit(self, server: Any, worker: Any) -> None:
        """In the worker, at its end; in the arbiter, when a worker that it wants to signal is already gone."""
        guard = getattr(worker, "oomsafe_guard", None)
        if guard is not None and guard.pid == os.getpid():
            guard.retire()
        elif self.running:
            self.child_exit(server, worker)
            return
        if self._supervisor is not None and self._supervisor.preload is not None:
            self._supervisor.preload.end_with(sys.exc_info()[1])  # gunicorn calls this hook while a SystemExit is being raised

    def child_exit(self, server: Any, worker: Any) -> None:
        """In the arbiter, after it has reaped a worker."""
        if self._supervisor is not None:
            self._supervisor.release(_slot(worker), ended_by(self._reaping, worker))

    def on_exit(self, server: Any) -> None:
        """In the arbiter, at its end; its process may run another arbiter afterwards."""
        if self._supervisor is not None and self.running:
            atexit.unregister(self._supervisor.close)
            self._supervisor.close()
            self._supervisor = None

    def on_dirty_starting(self, arbiter: Any) -> None:
        """In the dirty arbiter, which is a fork of the arbiter, before its first fork."""
        if self._supervisor is not None:
            from oomsafe.gunicorn.dirty import DirtyPool

            self._dirty = DirtyPool(arbiter, self.policy, self._supervisor.capacity.workers, _wake, name_of(arbiter.cfg))

    def dirty_post_fork(self, arbiter: Any, worker: Any) -> None:
        """In the dirty arbiter, after each fork."""
        if self._dirty is not None:
            self._dirty.forked(worker)

    def dirty_worker_init(self, worker: Any) -> None:
        """In a dirty worker, once its apps are loaded, before it serves."""
        if self._dirty is not None:
            self._dirty.init(worker)

    def dirty_worker_exit(self, arbiter: Any, worker: Any) -> None:
        """In the dirty arbiter, after it has reaped a worker."""
        if self._dirty is not None:
            self._dirty.exited(worker)

    def failed(self, hook: str, error: Exception) -> None:
        """Log once that a hook of ours failed, and let gunicorn go on."""
        failed(hook, "gunicorn", error)

    def _take_over(self, loaded: Loaded, server: Any) -> None:
        """Put this policy in force, with the variables of gunicorn's -e and raw_env, which are only known after install()."""
        try:
            more = {name: text for name, text in server.cfg.env.items() if name.startswith(PREFIX)}
        except RuntimeError:
            more = {}  # malformed, as gunicorn itself will report
        try:
            self._loaded = Loaded(loaded.keywords, more) if more else loaded
        except ConfigError as error:
            _refuse(error, self.running)
            self._loaded.variables = set_in({**os.environ, **more})  # so that this is not reported again
        if "OOMSAFE_GUNICORN_CONF" in more:
            self._loaded.warnings.append(
                "OOMSAFE_GUNICORN_CONF does nothing in -e or raw_env, which gunicorn reads after its configuration; "
                "set it in the environment that gunicorn is started with"
            )

    def _has_loaded(self, server: Any) -> None:
        for warning in self._loaded.warnings:
            log.warning("%s", warning)
        self._loaded.warnings = []
        self._first_age = server.worker_age + 1
        # gunicorn imports a python: configuration once; without this, SIGHUP would not read it again
        sys.modules.pop("oomsafe.gunicorn.conf", None)


def _refuse(error: ConfigError, running: bool) -> None:
    """Print one line on stderr, and raise SystemExit unless that would take a running service down."""
    print(f"oomsafe: {error}{' (the policy stays as it was)' if running else ''}", file=sys.stderr, flush=True)
    if not running:
        raise SystemExit(1) from None


def _wake(arbiter: int) -> None:
    """Make the arbiter check its workers now, as if one of them had ended: by itself it does so once a second."""
    if os.getppid() == arbiter:
        os.kill(arbiter, signal.SIGCHLD)


def name_of(cfg: Any) -> str:
    """What gunicorn calls its processes: proc_name, else the app's import path; empty where it knows neither, as for an app in code."""
    name = str(getattr(cfg, "proc_name", None) or "")
    return "" if name == "gunicorn" else name


def _dirty_workers(cfg: Any) -> int:
    """How many dirty workers this configuration has; 0 before gunicorn 25."""
    return int(getattr(cfg, "dirty_workers", 0)) if getattr(cfg, "dirty_apps", None) else 0


def _say_what_is_missing(worker: Any, left_alone: str | None, recycles: bool) -> None:
    """Log one line about a worker class that can't have all features."""
    missing = []
    if left_alone is not None:
        missing.append(f"requests are not counted ({left_alone})")
    if not recycles:
        missing.append(f"workers are not recycled ({type(worker).__name__} does not handle SIGTERM)")
    if missing:
        log.warning("%s: memory is measured%s", " and ".join(missing), ", and workers are recycled" if recycles else "")


def _slot(worker: Any) -> Slot | None:
    return getattr(worker, "oomsafe_slot", None)
