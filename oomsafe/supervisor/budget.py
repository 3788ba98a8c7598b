"""In the supervisor: while the pool is above its budget, orders workers to drain that are still below their soft limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from oomsafe.kernel.process import shared_out
from oomsafe.log import attempt, log
from oomsafe.policy.budget import NEEDED_FOR, SELDOM, Candidate, Life, Plan, Pool, Watch, Why, is_level, lived, next_check, plan
from oomsafe.policy.limits import turns
from oomsafe.policy.recycle import ENDS_WITHIN, Order
from oomsafe.policy.settings import Policy
from oomsafe.policy.trend import Growth
from oomsafe.policy.units import counted, format_size
from oomsafe.scoreboard.board import Entry, Scoreboard
from oomsafe.supervisor.replacements import Reading

#: Seconds without work after which a worker counts as idle: one that is busy has none in flight at many a moment.
IDLE_AFTER = 1.0

#: Seconds for which the amount that a worker shares with its supervisor is assumed not to change: reading it stalls the worker.
SHARED_FOR = 5.0

#: Below this share of the budget, workers are not checked.
FAR_BELOW = 0.5

#: Why nothing is done is logged again if the budget has changed by more than this share.
MOVED = 0.1

Sizes = Callable[[int, int], "tuple[int, int] | None"]


class Budget:
    """The budget of one pool. `sizes_if` is that of a KeptSizes. `may_act()`: False while the server itself replaces its workers."""

    def __init__(self, board: Scoreboard, sizes_if: Sizes, may_act: Callable[[], bool] = lambda: True) -> None:
        self._board = board
        self._may_act = may_act
        self._sizes_if = sizes_if
        self._watch = Watch()
        self._check_at = self._ticked = 0.0
        self._lives: dict[int, Life] = {}
        self._shared: dict[int, tuple[float, int]] = {}
        """When and how much each worker shared with others, by generation."""
        self._said: dict[Why, int] = {}
        """The budget for which it was logged that recycling can't help."""
        self._would: set[int] = set()
        """In a dry run: the generations of the workers that would have been recycled since the pool went above its budget."""

    @property
    def is_above(self) -> bool:
        """Whether the pool was above its budget when it was last checked, or about to be."""
        return self._watch.since is not None

    def tick(self, policy: Policy, read: Callable[[], Reading], shares: bool, now: float) -> None:
        """Do what is due. `shares`: workers share much memory with the supervisor. Call it as often as you like."""
        pause, self._ticked = min(SELDOM, now - self._ticked), now
        if now < self._check_at and not self.is_above:
            return
        self._check_at = now + SELDOM
        attempt("the pool's budget", "the server", partial(self._tick, policy, read, shares, now, pause))

    def _tick(self, policy: Policy, read: Callable[[], Reading], shares: bool, now: float, pause: float) -> None:
        capacity, budget, used = read()
        if used is not None and capacity.held is not None and used == capacity.held:
            used = max(0, used - capacity.droppable)  # the kernel drops cached file pages by itself, and recycling gives none back
        if used is None or budget is None or used < budget * FAR_BELOW:
            self._watch, self._lives, self._would = replace(self._watch, since=None), {}, set()
            return
        entries = self._board.roll()
        serving = [entry for entry in entries if entry.state.serves]
        self._lives = {
            entry.generation: lived(self._lives.get(entry.generation), entry.used, now) for entry in serving if entry.used is not None
        }
        workers: Sequence[Candidate] = ()
        growth = sum((entry.growth for entry in serving), Growth())
        # some servers' loops turn once a second, so the next tick may be as far off as the last
        ahead = int(growth.steady * (ENDS_WITHIN + pause))
        pool = Pool(used, budget, ahead, capacity.room, capacity.workers, turns(policy, capacity.workers), policy.sustain)
        self._check_at = now + next_check(pool, max(growth))
        if not self._may_act():
            self._watch = replace(self._watch, since=None)
            return
        if used + pool.ahead > budget:
            workers = self._candidates(policy, entries, shares, now)
        due = plan(self._watch, pool, workers, now)
        if due.watch.refused is not None:
            self._say_why_not(due, pool, workers, budget)
        self._watch = due.watch
        if not self.is_above:
            self._would = set()
        for entry in entries:
            if entry.generation in due.victims:
                self._recycle(policy, entry, next(one for one in workers if one.generation == entry.generation), pool)

    def _candidates(self, policy: Policy, entries: Sequence[Entry], shares: bool, now: float) -> list[Candidate]:
        shared = {entry.generation: self._shares(entry, now) for entry in entries} if shares else {}
        self._shared = {generation: found for generation, found in self._shared.items() if generation in shared}
        return [self._candidate(policy, entry, shared, now) for entry in entries]

    def _candidate(self, policy: Policy, entry: Entry, shared: dict[int, int], now: float) -> Candidate:
        ordered = entry.order is not Order.NONE or entry.generation in self._would
        held, used = self._held(entry), entry.used or 0
        gained = max(0, used - entry.baseline) if entry.baseline and entry.used is not None else 0
        if shared and policy.metric not in ("private", "uss"):
            # a fresh worker shares as much as the one that shares most: pages that others have written to since are their own now
            gained += max(shared.values()) - shared[entry.generation]
        life = self._lives.get(entry.generation)
        quiet = self._board.quiet_for(entry.number, now)
        return Candidate(
            generation=entry.generation, serves=entry.state.serves and not ordered, leaves=entry.state.leaves or ordered,
            own=max(0, held - shared.get(entry.generation, 0)), gained=gained,
            over=entry.soft is not None and 0 < entry.soft < used,
            idle=quiet is not None and quiet >= IDLE_AFTER,
            level=life is not None and entry.used is not None and is_level(life, entry.used, gained, now),
        )  # fmt: skip

    def _held(self, entry: Entry) -> int:
        """What the worker holds without clean file pages, in bytes; as it has published it, if it can't be measured."""
        process = self._board.process(entry.number, entry.generation)
        sizes = None if process is None else self._sizes_if(*process)
        return (entry.anon or 0) if sizes is None else sizes[1]

    def _shares(self, entry: Entry, now: float) -> int:
        """How much of that it shares with other processes, in bytes; 0: not known."""
        at, shared = self._shared.get(entry.generation, (float("-inf"), 0))
        process = self._board.process(entry.number, entry.generation)
        if process is not None and now - at >= SHARED_FOR:
            found = shared_out(process[0])
            shared = 0 if found is None else max(0, self._held(entry) - found.private)
            self._shared[entry.generation] = now, shared
        return shared

    def _recycle(self, policy: Policy, entry: Entry, worker: Candidate, pool: Pool) -> None:
        if policy.dry_run:
            self._would.add(entry.generation)
            self._board.count_recycle("budget")
        else:
            self._board.give_order(entry.number, entry.generation, Order.BUDGET)
        why = "it has nothing to do" if worker.idle else "it is above its soft limit" if worker.over else "it has the most of its own"
        above = (pool.used or 0) > (pool.budget or 0)
        held = f"{format_size(pool.used)} >" if above else f"{format_size(pool.used)}, and soon {format_size(pool.ahead)} more, of a"
        log.info(
            "the pool holds %s budget %s: the worker in slot %d %s: %s; %s of its own, %s more than a fresh one",
            held, format_size(pool.budget), entry.number, "would be recycled (dry run)" if policy.dry_run else "is to go", why,
            format_size(worker.own), format_size(worker.gained),
        )  # fmt: skip

    def _say_why_not(self, due: Plan, pool: Pool, workers: Sequence[Candidate], budget: int) -> None:
        """Log why nothing is done, once for a budget."""
        why = due.watch.refused
        said = self._said.get(why) if why is not None else None
        if why is None or not workers or (said is not None and abs(budget - said) <= said * MOVED):
            return
        self._said[why] = budget
        what = f"the pool holds {format_size(pool.used)} > budget {format_size(budget)}"
        do = "have fewer workers, or a larger budget or more memory"
        if why is Why.FRESH:
            log.error(
                "%s, and recycling does not help: with %s fresh from their boot it would hold %s; no worker is recycled for it. %s",
                what, counted(len(workers), "workers"), format_size(due.floor), do.capitalize(),
            )  # fmt: skip
        else:
            log.error(
                "%s again, after %s were recycled for it: each came to hold as much as before, and then grew no more (%s now); "
                "no worker is recycled for it in the next %.0f min. %s",
                what, counted(pool.wanted, "workers"), ", ".join(format_size(worker.own) for worker in workers), NEEDED_FOR / 60,
                do.capitalize(),
            )  # fmt: skip
