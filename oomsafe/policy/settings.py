"""Policy: all settings with their defaults and units, from keywords and environment variables (``OOMSAFE_<FIELD>``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from oomsafe.errors import ConfigError
from oomsafe.policy.readers import (
    Metric,
    read_address,
    read_count,
    read_file,
    read_function,
    read_hard_limit,
    read_headers,
    read_lifetime,
    read_metric,
    read_name,
    read_paths,
    read_redeliveries,
    read_score,
    read_seconds,
    read_share,
    read_size,
    read_soft_limit,
    read_supervisor_score,
    read_switch,
    read_switch_or_auto,
    read_task_limit,
    read_token,
    read_worker_score,
)
from oomsafe.policy.text import near_matches, printable
from oomsafe.policy.units import MIB, Percent, Size, format_duration, refused

if TYPE_CHECKING:
    from oomsafe.policy.address import Address
    from oomsafe.policy.death_line import DeathRecord

PREFIX = "OOMSAFE_"

#: Turns oomsafe off: nothing is measured, and nothing is done.
DISABLE = "OOMSAFE_DISABLE"

#: Variables with the prefix that are not fields of the policy.
OTHER_VARIABLES = (
    "OOMSAFE_SCOREBOARD", "OOMSAFE_GUNICORN_CONF", "OOMSAFE_SINGLE", "OOMSAFE_STATE", "OOMSAFE_TESTS_REQUIRE", "OOMSAFE_RUN", DISABLE,
)  # fmt: skip

SizeLike = int | str | Percent


@dataclass(frozen=True, init=False)
class Policy:
    """How much memory a pool of workers may use, and what happens at each limit.

    Sizes are an int of bytes, or text with an IEC suffix (``"300MiB"``) or ``%`` of the effective
    limit: the smallest memory limit of the process's cgroup and its ancestors, else the machine's
    memory. Times are in seconds, or text with a unit (``"90s"``, ``"5m"``, ``"6h"``, ``"1d"``). A bad value
    raises ConfigError: one line that names the field.
    """

    name: str | None
    """What the pool is called at boot, in `oomsafe status` and in the metrics; at most 64 bytes. None: gunicorn's proc_name, the app's
    import path, or the hostname of Celery's node."""
    soft_limit: Size | Literal["auto"]
    """A worker above it is recycled when its current work is done. auto: (budget - supervisor) / workers."""
    hard_limit: Size | Literal["auto"] | None
    """No worker gets more memory than this: the kernel refuses it (RLIMIT_DATA), so the request that asks for too much gets a MemoryError,
    and its client 503. Where the kernel does not do that, and for what it does not count (shared memory), a worker above it is recycled
    and waits neither for `sustain` nor `min_lifetime`, nor for its replacement where enough others serve. Compared with anon if `metric`
    is anon or private, else with rss. auto: what the memory limit leaves one worker while all others are at their soft limits. None: no
    hard limit."""
    budget: Size
    """What the whole pool may hold; `soft_limit` auto is a share of it. A percentage is of what others leave of the limit. Compared
    with the working set of the pool's cgroup or, if no cgroup limits the pool, with what its own processes hold."""
    metric: Metric
    """What the soft limit is compared with. anon: anonymous and shared memory and dirty file pages, that is, all but what the kernel drops
    before it kills a process. private: anon without memory that another process has mapped too. rss, pss and uss count clean file
    pages. Reading private, pss and uss stalls the process (2.5 ms a GiB), so they are read only while anon or rss is over the limit,
    every few seconds. With soft_limit auto, anon becomes private and rss becomes uss: memory shared with the supervisor
    counts as the supervisor's."""
    sustain: float
    """Seconds that a breach must last before a recycle."""
    reclaim: bool
    """Before a recycle, try gc.collect() and malloc_trim(), and measure again; less often if they give nothing back."""
    freeze_preload: bool
    """Keep what a forking supervisor loaded before its first fork shared with its workers: freeze it (gc.freeze), and end workers
    without walking their heap."""
    jitter: float
    """Each worker's soft limit is lowered by a random share of 0 to this (0.1 = 10 %), so that workers don't end together."""
    min_lifetime: float
    """Seconds after boot before a worker may be recycled, while the pool is within its budget."""
    max_lifetime: float | None
    """Seconds that a worker serves before it is recycled, whatever it holds; `jitter` lowers it for each worker. None: no limit."""
    max_unavailable: int | Percent
    """How many workers of the pool may be out of service at once; a percentage is rounded down, to at least 1. With `surge` the last worker
    that serves stays until another does, while the pool is within its budget."""
    surge: bool
    """Start the replacement first: a worker is recycled once its replacement serves, where memory holds both."""
    grace_period: float
    """Seconds that a draining worker has for its work in flight, and for its open connections."""
    shed: bool
    """While recycling can't keep up, and the kernel is about to kill, answer new requests with 503 and Retry-After. gunicorn, uvicorn."""
    shed_exempt: tuple[str, ...]
    """The paths of requests that are never shed: health checks. A list, or text with commas."""
    worker_oom_score_adj: int | Literal["auto"]
    """Added to the supervisor's oom_score_adj for each worker, clamped to 1000. auto: at least +300, and more if the
    kernel's formula needs it to rank even a fresh worker above its supervisor."""
    draining_oom_score_adj: int
    """Added to the worker's score while it drains, because it is about to end anyway."""
    supervisor_oom_score_adj: int | None
    """Absolute, -1000 to 1000, for the supervisor itself; lowering it needs CAP_SYS_RESOURCE. None: left as it is."""
    headers: bool | str = field(repr=False)
    """Memory headers on each response: False, True, or a secret that a request must carry in X-Memory-Token."""
    metrics: Address | None
    """Where a small process beside the supervisor serves the pool's metrics: ``"127.0.0.1:9400"``, or ``"unix:/a/path"``. None: nowhere."""
    metrics_token: str | None = field(repr=False)
    """The secret that each request for them carries, ``Authorization: Bearer ...``. Required where other machines can reach the address."""
    on_death: Callable[[DeathRecord], Any] | str | None
    """Called for each worker that ended other than in order, with a DeathRecord, in a process of its own, for 10 s at most: a function, or
    the text ``package.module:function``. None: nothing is called."""
    termination_log: str | None
    """A file that says, once memory is short or a worker has died, why the pool would be gone if it died now: Kubernetes shows
    /dev/termination-log after the container's end. Written only if it is there and nobody else has written to it. None: no such file."""
    task_soft_memory_limit: Size | None
    """Celery: SoftMemoryLimitExceeded is raised in a task that uses more. None: no such limit for tasks without one of their own."""
    task_memory_limit: Size | None
    """Celery: a task that uses more is stopped, and fails with MemoryLimitExceeded. None: as above."""
    task_memory_absolute: bool
    """Celery: compare both task limits with all that the child holds (anon, without dirty file pages); False: with what it has grown by
    since the task began."""
    max_oom_redeliveries: int
    """Celery, acks_late: how many deaths by the OOM killer a task survives; the next death fails it for good."""
    probe: bool | Literal["auto"]
    """Once for each load of the app, when its recycled workers show a leak, have one worker trace which line it is, for 60 s at most: that
    worker is slower meanwhile. auto: if memray is installed (the extra `probe`). `oomsafe probe` does it by hand."""
    dry_run: bool
    """Decide, log and count everything, and do nothing."""

    def __init__(
        self,
        *,
        name: str | None = None,
        soft_limit: SizeLike = "auto",
        hard_limit: SizeLike | None = None,
        budget: SizeLike = "90%",
        metric: Metric = "anon",
        sustain: float | str = 0,
        reclaim: bool = True,
        freeze_preload: bool = True,
        jitter: float = 0.1,
        min_lifetime: float | str = 10,
        max_lifetime: float | str | None = None,
        max_unavailable: int | str | Percent = 1,
        surge: bool = True,
        grace_period: float | str = 30,
        shed: bool = False,
        shed_exempt: Sequence[str] | str = (),
        worker_oom_score_adj: int | Literal["auto"] = "auto",
        draining_oom_score_adj: int = 300,
        supervisor_oom_score_adj: int | None = None,
        headers: bool | str = False,
        metrics: str | Address | None = None,
        metrics_token: str | None = None,
        on_death: Callable[[DeathRecord], Any] | str | None = None,
        termination_log: str | None = "/dev/termination-log",
        task_soft_memory_limit: SizeLike | None = None,
        task_memory_limit: SizeLike | None = None,
        task_memory_absolute: bool = False,
        max_oom_redeliveries: int = 1,
        probe: bool | Literal["auto"] = "auto",
        dry_run: bool = False,
        **unknown: NoReturn,
    ) -> None:
        given = dict(locals())
        for stranger in given.pop("unknown"):
            raise ConfigError(f"unknown setting {printable(stranger)}{near_matches(stranger, list(READERS))}")
        for setting, read in READERS.items():
            object.__setattr__(self, setting, read(setting, given[setting]))
        _check_order("soft_limit", self.soft_limit, "hard_limit", self.hard_limit)
        _check_lifetimes(self.min_lifetime, self.max_lifetime)
        _check_order("task_soft_memory_limit", self.task_soft_memory_limit, "task_memory_limit", self.task_memory_limit)

    @property
    def refuses_memory(self) -> bool:
        """Whether workers are to be held to a hard limit while they work."""
        return self.hard_limit is not None and not self.dry_run


#: The reader of each field, for a keyword's value or a variable's text; raises ConfigError.
READERS: dict[str, Callable[[str, object], Any]] = {
    "name": read_name,
    "soft_limit": read_soft_limit,
    "hard_limit": read_hard_limit,
    "budget": read_size,
    "metric": read_metric,
    "sustain": read_seconds,
    "reclaim": read_switch,
    "freeze_preload": read_switch,
    "jitter": read_share,
    "min_lifetime": read_seconds,
    "max_lifetime": read_lifetime,
    "max_unavailable": read_count,
    "surge": read_switch,
    "grace_period": read_seconds,
    "shed": read_switch,
    "shed_exempt": read_paths,
    "worker_oom_score_adj": read_worker_score,
    "draining_oom_score_adj": read_score,
    "supervisor_oom_score_adj": read_supervisor_score,
    "headers": read_headers,
    "metrics": read_address,
    "metrics_token": read_token,
    "on_death": read_function,
    "termination_log": read_file,
    "task_soft_memory_limit": read_task_limit,
    "task_memory_limit": read_task_limit,
    "task_memory_absolute": read_switch,
    "max_oom_redeliveries": read_redeliveries,
    "probe": read_switch_or_auto,
    "dry_run": read_switch,
}

#: The field that each variable sets.
FIELD_OF = {PREFIX + name.upper(): name for name in READERS}


def load_policy(environ: Mapping[str, str], keywords: Mapping[str, Any]) -> tuple[Policy, list[str]]:
    """The policy, and warnings to log. Keywords override `environ`'s OOMSAFE_ variables, which override the defaults.

    A misspelt keyword raises ConfigError; an unknown variable is only a warning, because an environment is
    shared with other programs and may be meant for a newer or older version. An empty variable counts as unset. With OOMSAFE_DISABLE
    set, the defaults are returned, because nothing that is wrong here may then keep a server from starting.
    """
    if is_off(environ):
        return Policy(), []
    known = FIELD_OF
    from_environment: dict[str, Any] = {}
    warnings = []
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in known:
            warnings.append(f"ignoring unknown variable {printable(variable)}{near_matches(variable, list(known))}")
        elif text.strip():
            from_environment[known[variable]] = _from_text(variable, known[variable], text)
    policy = Policy(**{**from_environment, **keywords})
    for name, text in from_environment.items():
        if name in keywords and READERS[name](name, text) != getattr(policy, name):
            warnings.append(f"{PREFIX}{name.upper()} does nothing: the app's own code or configuration sets {name}, and that holds")
    return policy, warnings


def is_off(environ: Mapping[str, str]) -> bool:
    """Whether DISABLE is set. A value that is neither yes nor no counts as yes: who sets it wants to be rid of us, not of his service."""
    text = environ.get(DISABLE, "")
    try:
        return bool(text.strip()) and read_switch(DISABLE, text)
    except ConfigError:
        return True


def set_in(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables and values that load_policy() uses from `environ`."""
    return {variable: environ[variable] for variable in FIELD_OF if environ.get(variable, "").strip()}


def came_too_late(read: Mapping[str, str], environ: Mapping[str, str], give_it: str) -> str | None:
    """A line about variables that were set after the policy was read, when set_in() returned `read`; None if there are none.

    `give_it` says how to set them with this server.
    """
    late = sorted(variable for variable, text in set_in(environ).items() if text != read.get(variable))
    if not late:
        return None
    come, do = ("it was", "does") if len(late) == 1 else ("they were", "do")
    return f"{', '.join(late)} {do} nothing: {come} set by the app, which is loaded after the pool's policy has been read; {give_it}"


def misplaced(names: Iterable[str], where: str, instead: str) -> list[str]:
    """A line for each of `names`, a framework's settings, that looks like one of ours but is never read there."""
    known = {variable.lower(): field for variable, field in FIELD_OF.items()}
    found = sorted(name for name in names if isinstance(name, str) and name.lower() in known)
    return [f"{name} in {where} does nothing: {instead.format(field=known[name.lower()], variable=name.upper())}" for name in found]


def _from_text(variable: str, field: str, text: str) -> Any:
    """Check one variable on its own, so that the error names the variable and not the field."""
    value = text.strip()
    READERS[field](variable, value)
    return value


def _check_lifetimes(least: float, most: float | None) -> None:
    """A worker can't be due before it may be recycled."""
    if most is not None and most <= least:
        example = "6h" if least < 6 * 3600 else f"{math.ceil(2 * least)}s"
        raise refused("max_lifetime", format_duration(most), f"is not above min_lifetime={format_duration(least)}", example)


def _check_order(soft_name: str, soft: Size | str | None, hard_name: str, hard: Size | str | None) -> None:
    """A soft limit must be below the hard one; resolve_limits() checks this again where it depends on the machine."""
    if isinstance(soft, int) and isinstance(hard, int) and soft >= hard:
        raise refused(soft_name, soft, f"is not below {hard_name}={hard}", f"{int(hard * 0.75 / MIB) or 1}MiB")
    if isinstance(soft, Percent) and isinstance(hard, Percent) and soft.value >= hard.value:
        raise refused(soft_name, str(soft), f"is not below {hard_name}={hard}", f"{hard.value * 0.75:g}%")
