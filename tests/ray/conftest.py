"""One real Ray cluster for all tests that need one: small, private, without a dashboard, and asking for a token."""

import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

# Read when Ray is imported: it otherwise listens on the machine's own address, whatever address it is given.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Every cluster of these tests asks for this token, which Ray would else write to the user's home. Ray reads it once per process.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def short():
    """A folder with a short path: Ray makes Unix sockets in it, whose names may have 107 characters."""
    folder = tempfile.mkdtemp(prefix="pt-", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(short):
    """The shared cluster: two CPUs, driven by this process."""
    ray = pytest.importorskip("ray")
    from hpo.tune import environment
    from serving.targets import haproxy

    front = haproxy.environment(short)  # as on every private cluster
    os.environ.update(front)
    # A group without resources asks again after 3 s instead of 60, so that a test can wait for it.
    patience = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3"}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        _temp_dir=str(short / "r"), runtime_env={"env_vars": environment() | patience | front},
    )  # fmt: skip
    yield ray
    ray.shutdown()
