"""Connections between ranks: where they are made, and who is let in."""

import socket

import pytest

from syncbn.norm.comm.transports import sockets as connect

SECRET = bytes(range(16))


@pytest.mark.parametrize(
    ("hello", "admitted"),
    [
        (connect._HELLO.pack(3, SECRET), True),
        (connect._HELLO.pack(3, SECRET[::-1]), False),
        (b"GET / HTTP/1.1\r\n", False),
        (b"", False),
    ],
)
def test_only_who_knows_the_secret_is_let_in(hello, admitted):
    ours, theirs = socket.socketpair()
    theirs.sendall(hello)
    theirs.shutdown(socket.SHUT_WR)
    made = {}
    connect._admit(ours, SECRET, made)
    assert made == ({3: ours} if admitted else {})
    assert (ours.fileno() == -1) is not admitted
    ours.close()
    theirs.close()


def test_who_says_nothing_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr(connect, "CONNECT_S", 0.05)
    ours, theirs = socket.socketpair()
    connect._admit(ours, SECRET, made := {})
    assert not made
    theirs.close()


def test_ranks_listen_where_gloo_does(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth9")
    assert connect._address() == "127.0.0.1"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(connect.socket, "gethostbyname", lambda name: "127.0.0.2")
    with connect._listener() as listener:
        assert listener.getsockname()[0] == "127.0.0.2"


@pytest.mark.parametrize("name", ["a" * 64, "nobody.invalid"])
def test_a_host_whose_name_stands_for_no_address_listens_to_itself(monkeypatch, name):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(connect.socket, "gethostname", lambda: name)
    with connect._listener() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
