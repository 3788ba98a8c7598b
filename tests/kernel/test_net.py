"""Who listens."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from oomsafe.kernel.net import who_listens

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_listens(family: socket.AddressFamily, host: str) -> None:
    """This process, while it does; one that is only bound does not."""
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        port = listener.getsockname()[1]
        assert who_listens(port) is None
        listener.listen()
        assert who_listens(port) == os.getpid()
    assert who_listens(port) is None


@pytest.mark.parametrize("table", ["", "garbage\n", HEAD + "0: x\n", HEAD + "   0: 0100007F:24B8 00000000:0000 0A 0:0 00:0 0 0 0 word 1\n"])
def test_what_can_not_be_read_is_nobody(tmp_path: Path, table: str) -> None:
    """A table that is missing, or holds what it should not."""
    if table:
        (tmp_path / "self" / "net").mkdir(parents=True)
        (tmp_path / "self" / "net" / "tcp").write_text(table)

    assert who_listens(9400, proc=str(tmp_path)) is None
