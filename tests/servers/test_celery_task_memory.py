"""The kernel holds a task to memory_limit: it fails in its own stack, and its child goes on. Real nodes, real balloons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celerying import Start

MIB = 1 << 20
KINDS = ("megabytes", "at once", "numpy", "dict")
#: How far a task's peak may be above its limit of 200 MiB: its pages, of files too, that were not touched before.
OVER = 3 * MIB

#: One task among what its child is before and after; what the client sees of it.
RUN = """
before = proj.before.delay().get(timeout=30)
one = proj.{task}.apply_async(({kind!r},), **{options!r})
error = one.get(timeout=60, propagate=False)
after = proj.after.delay().get(timeout=30)
result = [before, one.state, type(error).__name__, list(getattr(error, "args", [])), str(error), after]
"""


def run(node: Any, task: str, kind: str, **options: Any) -> list[Any]:
    """What became of it; asserts that the next task runs in the same child, without a limit."""
    (pid, held), state, name, args, text, (then, peak, ended, soft, got) = node.ask(RUN.format(task=task, kind=kind, options=options))
    assert (then, soft, got) == (pid, -1, 300)
    return [state, name, args, text, peak - held, ended]


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_asks_for_too_much(celery: Start, broker: str, kind: str) -> None:
    """Fails with its own error where it asks, after its finally blocks, at its limit exactly; the same child runs the next without one."""
    node = celery(broker, soft_limit="2GiB", argv=("-c", "1")).ready()
    node.ask("result = proj.modest.delay('numpy').get(timeout=60)")  # it has imported by now what it needs

    state, name, (task, used, limit), text, peak, ended = run(node, "greedy", kind)

    assert (state, name, task, limit, ended) == ("FAILURE", "MemoryLimitExceeded", "proj.greedy", 200 * MIB, [kind])
    assert 0 <= used <= limit + OVER
    assert peak <= limit + OVER
    assert peak > 150 * MIB or kind == "at once"
    assert "its memory limit 200.0 MiB" in text
    (line,) = node.lines("task proj.greedy has asked for more than its memory limit 200 MiB leaves")
    assert "the child goes on (task id " in line
    assert not node.lines("exited with")
    assert not node.lines("oomsafe failed in")


def test_a_task_that_catches_it_goes_on(celery: Start) -> None:
    """And succeeds."""
    node = celery(soft_limit="2GiB", argv=("-c", "1")).ready()

    for kind in KINDS:
        assert run(node, "modest", kind)[:2] == ["SUCCESS", "int"], kind
    assert not node.lines("has asked for more than")


def test_a_call_that_says_so_by_its_errno(celery: Start) -> None:
    """Like mmap."""
    node = celery(soft_limit="2GiB", argv=("-c", "1")).ready()

    assert run(node, "greedy", "mapping")[:2] == ["FAILURE", "MemoryLimitExceeded"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_that_is_tried_again(celery: Start, tmp_path: Path, kind: str) -> None:
    """Its MemoryError is what autoretry_for sees, and there is memory to send it again."""
    node = celery(soft_limit="2GiB", argv=("-c", "1")).ready()

    assert run(node, "tried_again", kind)[:2] == ["FAILURE", "MemoryLimitExceeded"]

    assert len((tmp_path / "runs").read_text().splitlines()) == 2


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_late_acknowledgement(celery: Start, tmp_path: Path, broker: str) -> None:
    """It is a failure of the task, and no death: the message is acknowledged, and not delivered again."""
    node = celery(broker, soft_limit="2GiB", argv=("-c", "1")).ready()

    assert run(node, "greedy_late", "dict")[:2] == ["FAILURE", "MemoryLimitExceeded"]

    assert len((tmp_path / "runs").read_text().splitlines()) == 1
    assert not list((tmp_path / "state").rglob("*death*"))


def test_a_header_lowers_it(celery: Start) -> None:
    """For one call; the limit of the next is the task's own again."""
    node = celery(soft_limit="2GiB", argv=("-c", "1")).ready()

    low = run(node, "greedy", "megabytes", headers={"memory_limit": "50MiB"})
    own = run(node, "greedy", "megabytes")

    assert (low[2][2], own[2][2]) == (50 * MIB, 200 * MIB)
    assert low[4] <= 50 * MIB + OVER


def test_what_is_mapped_and_not_touched_does_not_count_for_long(celery: Start) -> None:
    """The kernel counts it; the child is signalled to measure again."""
    node = celery(soft_limit="2GiB", argv=("-c", "1")).ready()

    assert node.ask("result = proj.untouched.delay().get(timeout=60)") == [150, 130]


def test_a_program_has_no_such_limit_itself(celery: Start) -> None:
    """It counts towards its task's, by what it holds: MainProcess measures that."""
    node = celery(soft_limit="2GiB", task_memory_limit="1GiB", argv=("-c", "1")).ready()

    assert node.ask("result = proj.program_at_its_limit.delay(40).get(timeout=60)") == [150, "40"]


def test_a_task_inside_a_task(celery: Start) -> None:
    """Is refused by the limit of the one that runs it, which may go on."""
    node = celery(soft_limit="2GiB", argv=("-c", "1")).ready()

    assert node.ask("result = proj.refused_inside.delay().get(timeout=60)") == ["FAILURE", "MemoryError", 100]
    assert not node.lines("has asked for more than")


def test_shared_memory_is_left_to_main_process(celery: Start, tmp_path: Path) -> None:
    """It kills the child, and the result is the same."""
    node = celery(soft_limit="2GiB", argv=("-c", "1")).ready()

    kind, used, limit = node.ask(
        "e = proj.shared_memory.delay(1).get(timeout=60, propagate=False); result = [type(e).__name__, *e.args[1:]]"
    )

    assert (kind, limit) == ("MemoryLimitExceeded", 200 * MIB)
    assert used > limit
    assert len(node.lines("exited with 'signal 9")) == 1
    assert len((tmp_path / "runs").read_text().splitlines()) == 1


def test_the_child_s_own_hard_limit_is_the_lower_one(celery: Start) -> None:
    """Then a task may grow by what that leaves."""
    node = celery(soft_limit="100MiB", hard_limit="150MiB", argv=("-c", "1")).ready()

    kind, used, limit = node.ask(
        "e = proj.greedy.delay('megabytes').get(timeout=60, propagate=False); result = [type(e).__name__, *e.args[1:]]"
    )

    assert kind == "MemoryLimitExceeded"
    assert 50 * MIB < limit < 150 * MIB
    assert used <= limit + OVER
