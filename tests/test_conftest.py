"""The guards of the test suite hold: a test that leaves this machine fails."""

import os
import socket
import threading
from pathlib import Path

import pytest


def test_a_connection_to_another_machine_is_refused() -> None:
    with socket.socket() as one, pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        one.connect(("192.0.2.1", 9))


def test_a_name_of_another_machine_is_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match=r"example\.invalid"):
        socket.create_connection(("example.invalid", 443), timeout=1)


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"here"))
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            assert client.recv(4) == b"here"
        thread.join()


def test_the_cache_is_not_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert Path(os.environ["LMOPT_CACHE"]).is_relative_to(tmp_path_factory.getbasetemp())
