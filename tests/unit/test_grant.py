"""What a worker that has settled above its soft limit is granted, by what those before it held."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from unit.retiring import several, worker

from oomsafe.policy.grant import Grant, grant
from oomsafe.policy.retirement import Retirement

lives = st.builds(worker, st.integers(0, 500), kept=st.integers(0, 500), number=st.integers(0, 99))


def test_in_use_is_needed() -> None:
    """And free memory is not."""
    assert grant(several(3, kept=10)).needed
    assert not grant(several(3, kept=90)).needed
    assert not grant([*several(2, kept=10), worker(100, kept=90, number=9)]).needed


def test_only_the_last_that_left_for_their_limit_count() -> None:
    """Whatever those before them were, and those that left for another reason."""
    others = [replace(one, reason="max_lifetime") for one in several(3, kept=90)]
    long_ago = [replace(one, at=1.0) for one in several(3, kept=90)]

    assert grant([*others, *long_ago, *several(3, kept=10)]).needed


def test_without_figures_nothing_is_claimed() -> None:
    """One is too few, and so are those whose allocators can't be asked."""
    unknown = [replace(one, parts=replace(one.parts, python_kept=None, malloc_kept=None, malloc_stuck=None)) for one in several(3, kept=10)]

    assert grant([]) == grant(several(1)) == grant(unknown) == Grant()


@given(st.lists(lives, max_size=8), st.integers(0, 7))
def test_less_free_memory_never_takes_a_grant_away(retired: list[Retirement], which: int) -> None:
    """Law: for any of them."""
    which %= max(1, len(retired))
    fewer = [replace(one, parts=replace(one.parts, python_kept=0)) if at == which else one for at, one in enumerate(retired)]

    # what was kept is in use now
    fewer = [
        replace(new, parts=replace(new.parts, python_live=(old.parts.python_live or 0) + (old.parts.python_kept or 0)))
        if at == which
        else new
        for at, (old, new) in enumerate(zip(retired, fewer, strict=True))
    ]

    assert grant(retired).needed <= grant(fewer).needed
