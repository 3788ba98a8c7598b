"""The text of the line that states the limits in force, logged when a pool or a single process boots."""

from __future__ import annotations

from oomsafe.policy.limits import Capacity, Limits
from oomsafe.policy.settings import Policy
from oomsafe.policy.units import format_duration, format_size


def limits_in_force(policy: Policy, limits: Limits, capacity: Capacity, each: str = "") -> str:
    """``soft limit 300 MiB, hard limit 500 MiB, budget 461 MiB of 512 MiB (cgroup v2 /a)``, with where the limits come from."""
    metric = "" if limits.metric == "anon" else f" of {limits.metric}"
    auto = f"{metric} (auto)" if policy.soft_limit == "auto" else metric
    itself = " (auto)" if policy.hard_limit == "auto" else ""
    hard = "" if limits.hard is None else f", hard limit {format_size(limits.hard)}{itself}"
    budget = f"budget {format_size(limits.budget)} of {format_size(capacity.limit)} ({capacity.whence})"
    return f"soft limit {format_size(limits.soft)}{each}{auto}{hard}{lifetime_in_force(limits)}, {budget}"


def lifetime_in_force(limits: Limits) -> str:
    """``, max_lifetime 6 h``, or nothing."""
    return "" if limits.max_lifetime is None else f", max_lifetime {format_duration(limits.max_lifetime)}"


#: Where a soft limit leaves less than this share of itself, workers are recycled all the time.
LITTLE = 0.1


def room_after_boot(who: str, baseline: int, soft: int) -> tuple[bool, str]:
    """Whether that is little, and ``workers have 246 MiB right after boot: soft limit 300 MiB leaves 54.0 MiB``."""
    left, has = soft - baseline, format_size(baseline)
    return left < soft * LITTLE, f"{who} {has} right after boot: soft limit {format_size(soft)} leaves {format_size(left)}"


def called(name: str) -> str:
    """`` (shop)``: a pool's name behind what it is; empty where it has none."""
    return f" ({name})" if name else ""


def dry(policy: Policy) -> str:
    """The end of a line in a dry run; empty otherwise."""
    return "; dry run: nothing will be done" if policy.dry_run else ""
