"""New work waits while the pool is about to meet the kernel's limit and another worker leaves: nobody is killed, nothing is lost."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from serving import until

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

#: Beside other tests a worker may take long to be gone; else nothing waits for longer than a probe does.
PATIENT = "import oomsafe.policy.door\noomsafe.policy.door.WAITS_FOR = 20.0"

#: What is asked for, one after the other: more than there is room for until the worker that leaves is gone.
LEAK, REQUESTS = "/leak?kib=1024", 100


def ask(connection, path: str) -> bool:
    """Whether it is answered."""
    connection.request("GET", path)
    response = connection.getresponse()
    return (response.status, response.read()) == (200, path.encode())


@pytest.mark.parametrize("worker_class", ["gthread", "asgi", "uvicorn_worker.UvicornWorker"])
def test_the_last_room_is_not_filled_while_another_leaves(cgroup, serve, worker_class: str) -> None:
    """One worker of two drains with 190 MiB and a request that takes a while; the other is asked for 100 MiB, and has room for 60."""
    sandbox = cgroup(300 * MIB)
    policy = {"soft_limit": "190MiB", "jitter": 0, "min_lifetime": 0, "reclaim": False}
    gunicorn = serve(worker_class, 2, settings=PATIENT, wrap=sandbox.command, **policy).serving(2)
    leaves, stays = gunicorn.workers()
    slow = []
    with (
        closing(gunicorn.connected_to(leaves)) as first,
        closing(gunicorn.connected_to(leaves)) as second,
        closing(gunicorn.connected_to(stays)) as third,
    ):
        ask(first, "/fill?mib=180")
        working = threading.Thread(target=lambda: slow.append(ask(second, "/slow?s=1.5")))
        working.start()
        until(lambda: [work.name for work in gunicorn.worker(leaves).in_flight] == ["GET /slow"], "it has work")
        ask(first, "/fill?mib=192")
        gunicorn.wait_for(f"worker {leaves} (slot ")

        for _ in range(REQUESTS):
            assert ask(third, LEAK)
        working.join()

    assert (sandbox.cgroup.oom_kills(), gunicorn.lines("SIGKILL"), slow) == (0, [], [True])
    assert len(gunicorn.lines(f"worker {stays} (slot 1) keeps what comes waiting, 20.0 s at most")) == 1
