"""What all tests share."""

import os
import signal

import pytest

# Before torch is imported: one thread per process, and no chatter.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("RAY_ADDRESS", None)
# A shell starts what it runs in the background with SIGINT ignored, and that is inherited; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def in_one_go(nodeid):
    """Returns what a test is run together with, by one of two processes (`make test`): all with Ray clusters, or its file."""
    file = nodeid.split("::")[0]
    return "ray" if "/ray/" in file or file.endswith("test_readme.py") else file


def pytest_collection_modifyitems(items):
    """Puts first what needs a Ray cluster: it takes longest, while another process runs the rest."""
    items.sort(key=lambda item: in_one_go(item.nodeid) != "ray")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class InOneGo(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return in_one_go(nodeid)

    return InOneGo(config, log)
