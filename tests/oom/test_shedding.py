"""New requests get 503 while the kernel is about to kill and recycling can't keep up; health checks don't, and who serves is not killed."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from serving import until

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

#: Requests wait for a worker that leaves, but not for long.
IMPATIENT = "\n".join(f"import {module}\n{module}.WAITS_FOR = 0.1" for module in ("oomsafe.policy.door", "oomsafe.worker.door"))

POLICY = {"soft_limit": "190MiB", "jitter": 0, "min_lifetime": 0, "reclaim": False, "budget": "290MiB"}

LEAK, REQUESTS = "/leak?kib=1024", 100


def ask(connection, path: str):
    """Status, headers and body."""
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, dict(response.getheaders()), response.read()


@pytest.mark.parametrize("shed", [True, False])
@pytest.mark.parametrize("worker_class", ["gthread", "asgi", "uvicorn_worker.UvicornWorker"])
def test_what_there_is_no_memory_for_gets_503(cgroup, serve, worker_class: str, shed: bool) -> None:
    """One worker of two drains with 190 MiB and takes its time; the other is asked for 100 MiB, and has room for 60."""
    sandbox = cgroup(300 * MIB)
    policy = {**POLICY, "shed": shed, "shed_exempt": ["/pid"]}
    gunicorn = serve(worker_class, 2, settings=IMPATIENT, wrap=sandbox.command, **policy).serving(2)
    leaves, stays = gunicorn.workers()
    slow = []
    with (
        closing(gunicorn.connected_to(leaves)) as first,
        closing(gunicorn.connected_to(leaves)) as second,
        closing(gunicorn.connected_to(stays)) as third,
    ):
        ask(first, "/fill?mib=180")
        # by this it has grown so fast that it may shed work itself for a moment
        until(lambda: ask(first, "/memory")[0] == 200, "it lets work in")
        earlier = len(gunicorn.lines("get 503 for now"))
        gunicorn.wait_for("new work is let in again: ", times=earlier)
        working = threading.Thread(target=lambda: slow.append(ask(second, "/held")[0]))
        (gunicorn.folder / "request-held").touch()
        working.start()
        until(lambda: [work.name for work in gunicorn.worker(leaves).in_flight] == ["GET /held"], "it has work")
        ask(first, "/fill?mib=192")
        gunicorn.wait_for(f"worker {leaves} (slot ")
        if not shed:
            assert [ask(third, LEAK)[0] for _ in range(20)] == [200] * 20
            (gunicorn.folder / "request-held").unlink()
            working.join()
            assert not gunicorn.lines("get 503 for now")
            return

        refused = next(answer for _ in range(REQUESTS) if (answer := ask(third, LEAK))[0] != 200)
        health = ask(third, "/pid")
        again = [ask(third, LEAK)[0] for _ in range(5)]
        (gunicorn.folder / "request-held").unlink()
        working.join()
        until(lambda: ask(third, LEAK)[0] == 200, "there is room again")

    assert refused[0] == 503
    assert refused[2] == b"This service is short of memory. Please try again in a moment.\n"
    assert refused[1]["retry-after" if "retry-after" in refused[1] else "Retry-After"] == "2"
    assert (health[0], health[2]) == (200, str(stays).encode())
    assert again == [503] * 5
    assert slow == [200]
    # its replacement boots meanwhile, so the kernel may take the one that leaves, when it has answered
    assert [line for line in gunicorn.lines("SIGKILL") if f"{leaves}" not in line] == []
    assert stays in gunicorn.workers()
    (line,) = gunicorn.lines("get 503 for now")[earlier:]
    assert f"worker {stays} (slot 1): " in line
    assert "recycling can't keep up: new requests get 503 for now, except /pid" in line
    lines = gunicorn.wait_for("new work is let in again: ", times=earlier + 1)
    told = [int(line.partition("again: ")[2].split()[0]) for line in lines]
    assert sum(told) == gunicorn.pool().totals.aborts_by_reason["shed"]
    assert told[-1] >= 6
