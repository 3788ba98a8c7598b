"""A node's intake against its budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.shedding import FUTILE_AFTER, RESUME_AT, Child, Intake, biggest_idle, shed

BUDGET = 1000
CHILDREN = st.lists(
    st.builds(Child, st.integers(1, 50), st.integers(0, 900), st.integers(0, 300), st.booleans(), st.booleans()),
    max_size=6, unique_by=lambda child: child.generation,
)  # fmt: skip
WORKING = [Child(1, 500, 100, serves=True, idle=False)]


@given(CHILDREN, st.integers(0, 2000), st.booleans())
def test_it_pauses_above_and_goes_on_well_below(children: list[Child], used: int, paused: bool) -> None:
    """Between the two it stays as it was."""
    plan = shed(Intake(paused), used, BUDGET, children, 0.0)

    expected = used > BUDGET or (paused and used >= BUDGET * RESUME_AT)
    assert plan.intake.paused is expected
    assert plan.recycle is None or used > BUDGET


@given(CHILDREN)
def test_only_an_idle_child_that_gives_something_back_goes(children: list[Child]) -> None:
    """And never a second one while one is away."""
    gone = shed(Intake(), BUDGET + 1, BUDGET, children, 0.0).recycle

    if gone is None:
        assert biggest_idle(children) is None or not all(child.serves for child in children)
        return
    able = [child for child in children if child.idle and child.held > child.fresh * 1.1]
    assert all(child.serves for child in children)
    assert next(child.held for child in children if child.generation == gone) == max(child.held for child in able)


@given(CHILDREN, st.sampled_from([(None, BUDGET), (2000, None), (None, None)]))
def test_what_is_not_known_stops_nothing(children: list[Child], figures: tuple[int | None, int | None]) -> None:
    """Nor does it keep a node paused."""
    assert shed(Intake(paused=True), *figures, children, 0.0).intake == Intake()


def test_waiting_for_nothing_ends() -> None:
    """All idle, and none has grown: after a while the budget is refused, until the node is below it again."""
    children = [Child(1, 105, 100, serves=True, idle=True)]
    intake = shed(Intake(), 2000, BUDGET, children, 0.0).intake
    assert intake.paused
    assert shed(intake, 2000, BUDGET, children, FUTILE_AFTER - 0.1).intake.paused

    refused = shed(intake, 2000, BUDGET, children, FUTILE_AFTER).intake

    assert refused == Intake(refused=True)
    assert shed(refused, 2000, BUDGET, WORKING, 99.0).intake == refused
    assert shed(refused, 100, BUDGET, children, 99.0).intake == Intake()


def test_it_waits_for_those_who_work() -> None:
    """However long that takes; and the wait begins anew when they are done."""
    intake = shed(Intake(), 2000, BUDGET, [Child(1, 100, 100, serves=True, idle=True)], 0.0).intake
    intake = shed(intake, 2000, BUDGET, WORKING, 5.0).intake

    assert shed(intake, 2000, BUDGET, WORKING, 999.0).intake == Intake(paused=True)
