"""One trial's workers on two nodes of a cluster come to what one worker comes to.

Run as a program this file starts a cluster of two nodes with one CPU each (Ray's local cluster utility, on loopback, in a folder
of its own), trains one job on it and prints what came out: a process can be in one cluster only, and other tests share theirs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from training.recipe import DataConfig, EvaluationConfig, Job, Recipe, Resources  # noqa: E402

pytestmark = pytest.mark.ray
FILES = {name: f"embedded:{name}.jsonl" for name in ("train", "validation", "test")}


def job(workers: int) -> Job:
    recipe = Recipe(steps=4, batch_size=8, micro_batch=3, dropout=0, learning_rate=1e-2, max_length=64)
    data = DataConfig(**FILES, template="{instruction}\nAnswer:")
    return Job(recipe=recipe, data=data, evaluation=EvaluationConfig(rows=13, reports=1), resources=Resources(workers=workers))


def train(job, report):
    """Trains, and says on which node each worker was."""
    import ray
    import torch.distributed as dist

    from training import loop

    outcome = loop.train(job, report)
    nodes = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return outcome.model_copy(update={"conditions": outcome.conditions | {"nodes": nodes}})


def main(folder: str) -> None:
    """Starts the cluster, trains and prints the outcome."""
    import ray
    from ray.cluster_utils import Cluster

    from hpo.tune import environment
    from training.mailbox import mailbox_of
    from training.workers import run_group

    here = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**here, "temp_dir": f"{folder}/r", "include_dashboard": False})
    try:
        cluster.add_node(**here)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": environment()})
        with mailbox_of("two-nodes") as mailbox:
            outcome = run_group(job(2), "two-nodes", mailbox, storage=f"{folder}/s", train=train)
        print(outcome.model_dump_json())
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_workers_on_two_nodes_come_to_what_one_comes_to(short):
    from training import loop

    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__, str(short / "two")], env=environment, capture_output=True, text=True,
                          timeout=500, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ended"] == "complete" and found["conditions"]["workers"] == 2
    assert len(set(found["conditions"]["nodes"])) == 2
    alone = loop.train(job(1))
    assert found["loss"] == pytest.approx(alone.loss, abs=1e-4)
    assert found["conditions"]["right"] == alone.conditions["right"]


if __name__ == "__main__":
    main(sys.argv[1])
