"""An endpoint on a Ray cluster: each replica is one process with the application and its pool.

Owns: `deploy`, `remove`, `status`, `build` (for `serve run` and `serve deploy`), `build_llm`. Must not know: routes, models,
studies. It may add only placement, replicas and restarts to what `serving.targets.local` does.

The models are no part of what is deployed: replicas follow the endpoint's table, so a new version, a share or a rollback changes
a file and restarts nothing. Serve's proxy passes requests on; admission, tokens and limits are the application's, because Ray's
own token protects the cluster and not what Serve answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import ray
from ray import serve

from serving.endpoint import Table, read_table
from serving.pool import Pool, living
from serving.targets.local import is_loopback, require_ready, require_token
from training.errors import InputError, Problem, wrong

HEALTH = 1.0  # seconds between health checks; a killed replica is replaced after the next one
LOADING_TRIES = 2
DOOR = 180.0  # seconds for Serve's proxy to come up; a second one, where the first was given up
SHOWN = 2_000  # characters of a proxy's log
LLM_REMEDY = 'Install "ray[llm]" on a machine with a GPU, or leave engine.kind at transformers.'


def deploy(folder: str | Path, *, name: str | None = None, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Serves an endpoint on the connected cluster until `remove`, and returns its address. A second time changes nothing, unless
    the table's engine settings have changed since: then replicas are replaced, without a gap where there is room for one more.

    Args:
        folder: the endpoint's, on storage that every node sees.
        name: of the application and its path; default: the endpoint's name.
        host: where the proxy on the head node listens. It and `port` hold for all of Serve on a cluster: where that runs
            already, its own do.
        port: likewise.

    Raises:
        InputError: an address beyond this machine without a token, a port in use, no version that can answer.
    """
    table = read_table(folder)
    name = name or table.name
    require_token(table, host)
    if table.engine.kind == "vllm":
        _llm()
    address = _start(host, port)
    found = status(name)
    if found["status"] == "RUNNING" and _as_wanted(folder, table):
        return f"{address}/{name}"
    try:
        if table.engine.kind == "vllm":
            application = build_llm(table, without_token=is_loopback(host))
        else:
            application = _application(folder, table, beside=_room(table))
        serve.run(application, name=name, route_prefix=f"/{name}", logging_config={"enable_access_log": False})
    except RuntimeError as error:
        said = status(name)["message"] or str(error)
        if found["status"] == "NOT_STARTED":
            remove(name)
        reasons = dict.fromkeys(re.findall(r"cannot be served: ([^\n]+)", said)) or [said.strip().splitlines()[-1]]
        raise InputError(*(Problem(name, f"cannot be served: {reason}") for reason in reasons)) from None
    return f"{address}/{name}"


def remove(name: str) -> None:
    """Ends an endpoint, if there is one; requests that run may end first. Serve itself ends with the last application."""
    if name in serve.status().applications:
        serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()


def status(name: str) -> dict[str, Any]:
    """Returns `status` (Serve's own word, such as RUNNING, or NOT_STARTED), `message` and `replicas`, how many in each state."""
    found = serve.status().applications.get(name)
    if found is None:
        return {"status": "NOT_STARTED", "message": "", "replicas": {}}
    parts = list(found.deployments.values())
    replicas = {str(state): count for part in parts for state, count in part.replica_states.items()}
    said = "\n".join([found.message, *(part.message for part in parts)]).strip()
    return {"status": str(found.status.value), "message": said, "replicas": replicas}


def build(args: dict[str, str]) -> serve.Application:
    """Returns the application of an endpoint: `serve run serving.targets.ray_serve:build folder=...`, or in a Serve config.

    Args:
        args: `folder`, the endpoint's.

    Raises:
        InputError: no folder, no endpoint in it, or one that asks for no token: where Serve will listen is not known here.
    """
    if set(args) != {"folder"}:
        raise wrong("args", f"must be folder alone, got {', '.join(sorted(args)) or 'nothing'}.", "Give folder=...")
    table = read_table(args["folder"])
    require_token(table, "any address")
    return _application(args["folder"], table)


def _start(host: str, port: int) -> str:
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if _get_global_client(raise_if_no_controller_running=False) is None:
        try:
            # Only the head node's proxy: loopback means that node, and one door is enough for a cluster's inside.
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        except ray.exceptions.RayActorError:
            pass  # Serve has given up a proxy that was slow to come up; its successor is on its way, and is waited for below
        except (RuntimeError, ValueError, TimeoutError) as error:
            with contextlib.suppress(Exception):
                serve.shutdown()
            raise wrong("port", f"Serve cannot listen on {host}:{port} ({str(error).strip().splitlines()[-1]}).",
                        "Use another port.") from None  # fmt: skip
    options = _get_global_client().http_config
    address = f"http://{options.host}:{options.port}"
    _wait_for_door(address)
    return address


def _wait_for_door(address: str) -> None:
    until = time.monotonic() + DOOR
    while True:
        try:
            urllib.request.urlopen(f"{address}/-/healthz", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # somebody is there; what it serves comes next
        except OSError as error:
            if time.monotonic() > until:
                rule = f"Serve's proxy does not answer at {address} within {DOOR:g} s ({error})."
                raise wrong("port", rule, f"Serve says: {_of_the_door()}") from None
            time.sleep(0.1)


def _of_the_door() -> str:
    """Returns what is known of Serve's proxies: how they are, and the end of what each has written."""
    said = []
    for proxy in serve.status().proxies.values():
        said.append(str(getattr(proxy, "value", proxy)))
    logs = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve")
    for log in sorted([*logs.glob("*proxy*.log")], key=lambda path: path.stat().st_mtime)[-2:]:
        said.append(f"{log.name}: {log.read_text(errors='replace')[-SHOWN:]}")
    return "\n".join(said) or "nothing"


def _as_wanted(folder: str | Path, table: Table) -> bool:
    return any(said.get("engine") == table.engine.model_dump(mode="json") for said in living(folder))


def _room(table: Table) -> bool:
    free, settings = ray.available_resources(), table.engine
    return free.get("CPU", 0) >= settings.cpus and free.get("GPU", 0) >= settings.gpus


def _application(folder: str | Path, table: Table, *, beside: bool = False) -> serve.Application:
    settings, limits, where = table.engine, table.limits, str(folder)
    admitted = limits.concurrent + limits.queue

    def app():
        return _app(where)

    @serve.ingress(app)
    class Endpoint:
        async def check_health(self) -> None:
            if not self.app.state.pool.healthy():
                raise RuntimeError("no model can answer")

        async def __del__(self) -> None:
            if hasattr(self, "_asgi_app"):
                await asyncio.to_thread(self.app.state.pool.close)

    scale: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.most_replicas is not None:
        scale = {"autoscaling_config": {
            "min_replicas": settings.replicas, "max_replicas": settings.most_replicas,
            "target_ongoing_requests": max(1, limits.concurrent // 2),
        }}  # fmt: skip
    if beside and "max_surge_percent" in inspect.signature(serve.deployment).parameters:
        scale["max_surge_percent"] = 100  # a replica that is replaced goes when its successor is ready
    return serve.deployment(
        Endpoint, name="endpoint", ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # More than the application admits: who is one too many gets its answer, with when to ask again, and waits in no queue
        # of Serve's.
        max_ongoing_requests=2 * admitted + 64,
        graceful_shutdown_timeout_s=limits.seconds + 5, graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH, health_check_timeout_s=30, max_constructor_retry_count=LOADING_TRIES, **scale,
    ).bind()  # fmt: skip


def _app(folder: str):
    """Returns the ASGI application, in the replica; loading is over when it returns."""
    from serving.app import create_app

    _keep_replicas_to_themselves()
    pool = Pool(folder)
    try:
        pool.start()
        require_ready(pool)
    except BaseException:
        pool.close(grace=0)
        raise
    app = create_app(pool, lambda: pool.table)
    app.state.pool = pool
    return app


def _keep_replicas_to_themselves() -> None:
    """Binds the replica's own gRPC port, which Ray 2.60 opens on every interface, to loopback, or to the node's address where
    Serve is told to use it: it asks for no token and unpickles what it gets. A test looks at the listening sockets."""
    from grpc.aio._server import Server
    from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT
    from ray.util import get_node_ip_address

    own = get_node_ip_address() if RAY_SERVE_USE_GRPC_BY_DEFAULT else "127.0.0.1"
    own = f"[{own}]" if ":" in own else own
    for name in ("add_insecure_port", "add_secure_port"):
        add = getattr(Server, name)

        def bound(self, address: str, *more, add=add):
            return add(self, address.replace("[::]:", f"{own}:").replace("0.0.0.0:", f"{own}:"), *more)

        setattr(Server, name, bound)


# vLLM, through Ray's own LLM application.


def build_llm(table: Table, *, without_token: bool = False) -> serve.Application:
    """Returns Ray's LLM application (vLLM) of an endpoint's versions and adapters.

    It has no token, no shares and no limits of ours, and it follows no table: deploy it again for a change, behind something that
    asks who is there.

    Args:
        table: see `llm_configs` for what it may hold.
        without_token: says that this is known.

    Raises:
        InputError: vLLM is not installed, or something that it cannot do.
    """
    if not without_token:
        raise wrong(
            "engine.kind", "Ray's LLM application asks for no token.", "Put it behind a proxy that does; without_token=True."
        )
    configs = llm_configs(table)
    llm = _llm()
    return llm.build_openai_app({"llm_configs": [llm.LLMConfig(**config) for config in configs]})


def _llm():
    try:
        from ray.serve import llm
    except ImportError as error:
        raise wrong("engine.kind", f"vllm is not to be had here ({error}).", LLM_REMEDY) from None
    return llm


def llm_configs(table: Table) -> list[dict[str, Any]]:
    """Returns the arguments of one LLMConfig per version, and of one per base with adapters.

    Adapters answer as `NAME@base:FOLDER`, where FOLDER is the last part of the adapter's address: Ray finds them by it below one
    address in S3, Google's or Azure's storage.

    Raises:
        InputError: shares that divide requests; adapters on a disk or in different places, of several bases or a quantized one.
    """
    settings, limits = table.engine, table.limits
    if sum(version.share > 0 for version in table.versions) > 1:
        raise wrong("versions", "Ray's LLM application does not divide requests.", "Give one version the whole share.")
    scale: dict[str, Any] = {"min_replicas": settings.replicas, "max_replicas": settings.most_replicas or settings.replicas}
    common = {
        "deployment_config": {"autoscaling_config": scale, "max_ongoing_requests": 2 * (limits.concurrent + limits.queue)},
        "engine_kwargs": {
            "tensor_parallel_size": max(1, int(settings.gpus)), "max_num_seqs": limits.concurrent, "trust_remote_code": False,
        },
    }  # fmt: skip
    found = [
        common | {"model_loading_config": {
            "model_id": table.name if version.share else f"{table.name}@v{version.version}", "model_source": version.folder,
        }} for version in table.versions
    ]  # fmt: skip
    if table.adapters:
        found.append(_llm_adapters(table, common))
    return found


def _llm_adapters(table: Table, common: dict[str, Any]) -> dict[str, Any]:
    from training.model import where_is
    from training.recipe import Recipe

    recipes = [Recipe.model_validate(adapter.recipe) for adapter in table.adapters]
    folders = [adapter.folder for adapter in table.adapters if adapter.folder]
    if len({(recipe.model, recipe.revision) for recipe in recipes}) > 1:
        raise wrong("adapters", "stand on several bases.", "Serve those of one base.")
    if any(recipe.bits < 16 for recipe in recipes):
        raise wrong("adapters", "were trained on a quantized base, which vLLM quantizes in its own way.",
                    "Merge and register them, or use engine.kind transformers.")  # fmt: skip
    places = {folder.rpartition("/")[0] for folder in folders}
    if len(places) > 1 or not all(re.match(r"(s3|gs|abfss|azure)://", place) for place in places):
        raise wrong("adapters", f"must lie side by side in S3, Google's or Azure's storage, got {', '.join(sorted(places))}.",
                    "Copy them there, or use engine.kind transformers.")  # fmt: skip
    ranks = max(recipe.rank for recipe in recipes)
    most = table.engine.adapters_loaded
    return common | {
        "model_loading_config": {"model_id": f"{table.name}@base", "model_source": str(where_is(recipes[0].model))},
        "lora_config": {"dynamic_lora_loading_path": next(iter(places), None), "max_num_adapters_per_replica": most},
        "engine_kwargs": common["engine_kwargs"] | {"enable_lora": True, "max_loras": most, "max_lora_rank": max(8, ranks)},
    }
