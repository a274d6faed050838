"""What `syncbn doctor` finds."""

import os
import socket

import pytest

from syncbn.launch import health


def test_a_machine_that_runs_these_tests_can_train(tmp_path):
    findings = health.examine(tmp_path / "runs", tmp_path)
    assert not [f for f in findings if f.verdict == "FAIL"]
    assert not (tmp_path / "runs").exists(), "looking changes nothing"


def test_every_complaint_comes_with_advice(tmp_path):
    findings = [
        health.package("no-such-package"),
        health.shared_memory(tmp_path / "missing"),
        health.data(tmp_path / "missing"),
    ]
    assert all(f.verdict != "OK" and f.advice for f in findings)


def test_a_taken_port_is_noticed():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert health.port(taken.getsockname()[1], "a test").verdict == "WARN"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_fails(tmp_path):
    tmp_path.chmod(0o500)
    assert health.writable(tmp_path / "runs").verdict == "FAIL"


def test_a_file_in_the_place_of_the_runs_folder_fails(tmp_path):
    (tmp_path / "runs").write_text("")
    assert health.writable(tmp_path / "runs").verdict == "FAIL"


def test_an_interface_that_does_not_exist_fails(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    assert health.network_interface().verdict == "FAIL"


def test_a_token_that_others_can_read_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)
    assert health.ray_token().verdict == "WARN"
    (tmp_path / "token").chmod(0o600)
    assert health.ray_token().verdict == "OK"
