"""What all tests share."""

import os

import pytest

# Before torch is imported: one thread per process, and no chatter.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("RAY_ADDRESS", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Sorts tests into what one process runs in one go: a file, or all that needs a Ray cluster, which goes first because it
    takes longest: so there is one cluster at a time, while another process runs the rest (`make test`)."""
    for item in items:
        ray = item.get_closest_marker("ray") is not None or "/ray/" in item.nodeid
        item.add_marker(pytest.mark.xdist_group("ray" if ray else item.nodeid.split("::")[0]))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] != "ray")
