import socket

import pytest

pytest.importorskip("datasets")
pytest.importorskip("flwr_datasets")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Any attempt to look up or reach a host fails the test at once."""

    def refuse(*arguments, **options):
        raise AssertionError(f"network access: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
