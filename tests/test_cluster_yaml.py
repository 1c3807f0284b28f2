"""cluster.yaml and the Kubernetes manifests: what can be checked without a cloud.

Ray checks its own schema offline but accepts anything inside `node_config`, and nothing here checks a manifest against
KubeRay's, so both are also held against lists of the fields that exist.
"""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SHARED = "/mnt/shared"

# Parameters of EC2's RunInstances that a node may set (API version 2016-11-15); the rest is Ray's to set.
RUN_INSTANCES = {
    "BlockDeviceMappings", "CapacityReservationSpecification", "CpuOptions", "CreditSpecification", "EbsOptimized",
    "IamInstanceProfile", "ImageId", "InstanceMarketOptions", "InstanceType", "KeyName", "MetadataOptions", "Monitoring",
    "NetworkInterfaces", "Placement", "SecurityGroupIds", "SubnetIds", "TagSpecifications", "UserData",
}  # fmt: skip
MARKET = {"MarketType", "SpotOptions"}
SPOT = {"BlockDurationMinutes", "InstanceInterruptionBehavior", "MaxPrice", "SpotInstanceType", "ValidUntil"}
DISK = {"DeviceName", "Ebs", "NoDevice", "VirtualName"}
EBS = {"DeleteOnTermination", "Encrypted", "Iops", "KmsKeyId", "SnapshotId", "Throughput", "VolumeSize", "VolumeType"}

# ray.io/v1 (KubeRay 1.6): the fields of each type that a manifest may set.
RAY_JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
RAY_SERVICE = {
    "excludeHeadPodFromServeSvc", "rayClusterConfig", "rayClusterDeletionDelaySeconds", "serveConfigV2", "serveService",
    "upgradeStrategy",
}  # fmt: skip
RAY_CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
AUTOSCALER = {
    "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext", "upscalingMode",
    "version", "volumeMounts",
}  # fmt: skip
HEAD_GROUP = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER_GROUP = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
    "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip


def read(path: str) -> dict:
    # Through JSON: plain dicts, as Ray's schema wants them.
    return json.loads(json.dumps(YAML(typ="safe", pure=True).load((ROOT / path).read_text())))


@pytest.fixture
def cluster() -> dict:
    return read("cluster.yaml")


@pytest.fixture
def job() -> dict:
    return read("examples/kubernetes/rayjob.yaml")["spec"]


def accept(cluster: dict) -> dict:
    util = pytest.importorskip("ray.autoscaler._private.util")
    prepared = util.prepare_config(copy.deepcopy(cluster))
    util.validate_config(prepared)
    return prepared


def mistakes(cluster: dict) -> list[str]:
    """Returns the keys inside node_config that EC2 does not have: Ray's schema lets them through."""
    found = []
    for kind in cluster["available_node_types"].values():
        node = kind["node_config"]
        market = node.get("InstanceMarketOptions", {})
        found += [*(node.keys() - RUN_INSTANCES), *(market.keys() - MARKET), *(market.get("SpotOptions", {}).keys() - SPOT)]
        for disk in node.get("BlockDeviceMappings", []):
            found += [*(disk.keys() - DISK), *(disk.get("Ebs", {}).keys() - EBS)]
    return found


# cluster.yaml


def test_ray_accepts_the_cluster(cluster):
    prepared = accept(cluster)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    assert prepared["setup_commands"] == cluster["setup_commands"]


def test_ray_refuses_an_unknown_field_and_we_refuse_one_inside_node_config(cluster):
    with pytest.raises(Exception, match="idle_timeout_minute"):
        accept(cluster | {"idle_timeout_minute": 1})
    assert mistakes(cluster) == []
    node = cluster["available_node_types"]["spot"]["node_config"]
    node["InstanceMarketOptions"]["MarktType"] = node["InstanceTyp"] = "spot"
    accept(cluster)
    assert sorted(mistakes(cluster)) == ["InstanceTyp", "MarktType"]


def test_the_head_trains_nothing_and_every_worker_has_a_gpu(cluster):
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    for name in types.keys() - {cluster["head_node_type"]}:
        assert types[name]["resources"]["GPU"] >= 1 and types[name]["resources"]["CPU"] >= 1
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]


def test_one_type_is_spot_and_one_is_not(cluster):
    markets = {name: kind["node_config"].get("InstanceMarketOptions") for name, kind in cluster["available_node_types"].items()}
    assert markets.pop("spot")["MarketType"] == "spot"
    assert markets == {"head": None, "on_demand": None}


def environment(commands: list[str]) -> dict[str, str]:
    """Returns what the command that starts Ray exports."""
    (start,) = (c for c in commands if "ray start" in c)
    exported = start.split(";")[0]
    assert exported.startswith("export ") and start.index("export") < start.index("ray start")
    return dict(item.split("=", 1) for item in shlex.split(exported)[1:])


@pytest.mark.parametrize("role", ["head", "worker"])
def test_every_node_asks_for_the_token_and_knows_the_storage(cluster, role):
    exported = environment(cluster[f"{role}_start_ray_commands"])
    assert exported["RAY_AUTH_MODE"] == "token"
    assert exported["HPO_STORAGE"] == f"{SHARED}/paretune" and exported["HF_HOME"].startswith(SHARED)
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]
    assert any(f"{SHARED}" in c and "mount -t nfs4" in c for c in cluster["initialization_commands"])


def test_no_token_stands_in_the_file():
    assert not re.search(r"RAY_AUTH_TOKEN=|[0-9a-f]{32}", (ROOT / "cluster.yaml").read_text())


def test_every_node_gets_the_package_and_what_is_mounted_is_in_the_checkout_or_made_by_a_documented_command(cluster):
    assert any("pip install" in c and "paretune" in c for c in cluster["setup_commands"])
    assert (ROOT / cluster["file_mounts"]["/home/ubuntu/constraints.txt"]).is_file()
    assert f"pip wheel --no-deps -w {cluster['file_mounts']['/home/ubuntu/paretune']} ." in (ROOT / "docs/cluster.md").read_text()


def test_the_head_tells_the_autoscaler_where_hpo_looks_for_its_limits(cluster):
    tune = pytest.importorskip("hpo.tune")
    assert f"--autoscaling-config={tune.BOOTSTRAP}" in " ".join(cluster["head_start_ray_commands"])


def test_the_cluster_grows_to_six_gpus(cluster):
    tune = pytest.importorskip("hpo.tune")
    from training.recipe import Resources

    nodes = tune.growth(accept(cluster))
    assert len(nodes) == 1 + 6 and sum(n.get("GPU", 0) for n in nodes) == 6
    assert tune.concurrency(Resources(gpus=1, cpus=4), nodes, None) == 6
    assert tune.concurrency(Resources(gpus=1, workers=2), nodes, None) == 3


# The Kubernetes manifest


def groups(job: dict) -> list[dict]:
    return [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]


def container(group: dict) -> dict:
    (only,) = group["template"]["spec"]["containers"]
    return only


def test_every_field_of_the_manifest_exists(job):
    whole, spec = read("examples/kubernetes/rayjob.yaml"), job["rayClusterSpec"]
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayJob")
    assert job.keys() <= RAY_JOB and spec.keys() <= RAY_CLUSTER
    assert spec["autoscalerOptions"].keys() <= AUTOSCALER and spec["headGroupSpec"].keys() <= HEAD_GROUP
    assert all(group.keys() <= WORKER_GROUP for group in spec["workerGroupSpecs"])
    assert all(isinstance(v, str) for group in groups(job) for v in group["rayStartParams"].values())


def test_a_retry_runs_the_same_command_on_the_shared_storage(job):
    hpo, run, study = shlex.split(job["entrypoint"])
    assert (hpo, run) == ("hpo", "run") and study.startswith(SHARED)
    assert job["backoffLimit"] >= 1 and job["submissionMode"] == "K8sJobMode"
    assert "working_dir" not in YAML(typ="safe", pure=True).load(job["runtimeEnvYAML"])


def test_every_pod_has_the_storage_and_the_same_image(job):
    for group in groups(job):
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in container(group)["volumeMounts"]}
        assert set(mounts.values()) <= volumes.keys() and "persistentVolumeClaim" in volumes[mounts[SHARED]]
        storage = {e["name"]: e["value"] for e in container(group)["env"]}["HPO_STORAGE"]
        assert Path(storage).is_relative_to(SHARED)
    assert len({container(group)["image"] for group in groups(job)}) == 1


def test_the_head_trains_nothing_workers_have_gpus_and_a_token_is_asked_for(job):
    head, *workers = groups(job)
    assert head["rayStartParams"]["num-cpus"] == "0" and "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    for group in workers:
        assert container(group)["resources"]["limits"]["nvidia.com/gpu"] == "1" and group["numOfHosts"] == 1
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"} and job["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in groups(job)), "the v2 autoscaler's condition"


def test_what_the_head_says_of_the_clusters_growth_is_what_the_worker_groups_say(job, monkeypatch):
    tune = pytest.importorskip("hpo.tune")
    head, *workers = groups(job)
    said = {e["name"]: e["value"] for e in container(head)["env"]}[tune.GROWTH]
    monkeypatch.setenv(tune.GROWTH, said)
    limits = [(g["maxReplicas"], container(g)["resources"]["limits"]) for g in workers]
    wanted = [{"CPU": int(has["cpu"]), "GPU": int(has["nvidia.com/gpu"])} for most, has in limits for _ in range(most)]
    assert tune.capacity() == wanted


def test_the_pods_run_the_ray_that_is_pinned(job):
    assert f"ray=={job['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


# examples/kubernetes/rayservice.yaml


@pytest.fixture
def service() -> dict:
    return read("examples/kubernetes/rayservice.yaml")["spec"]


def test_every_field_of_the_service_exists_and_its_cluster_is_as_the_job_s(service, job):
    whole, spec = read("examples/kubernetes/rayservice.yaml"), service["rayClusterConfig"]
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayService")
    assert service.keys() <= RAY_SERVICE and spec.keys() <= RAY_CLUSTER
    of_job = job["rayClusterSpec"]
    assert {k: spec[k] for k in ("rayVersion", "authOptions")} == {k: of_job[k] for k in ("rayVersion", "authOptions")}
    (worker,), (of_jobs_worker,) = spec["workerGroupSpecs"], of_job["workerGroupSpecs"]
    assert spec["headGroupSpec"].keys() <= HEAD_GROUP and worker.keys() <= WORKER_GROUP
    for key in ("image", "resources", "volumeMounts"):
        assert container(worker)[key] == container(of_jobs_worker)[key]
    for key in ("volumes", "tolerations", "restartPolicy"):
        assert worker["template"]["spec"][key] == of_jobs_worker["template"]["spec"][key]
    assert worker["minReplicas"] >= 1 and spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_ray_accepts_the_serve_config_and_the_builder_takes_its_arguments(service):
    schema = pytest.importorskip("ray.serve.schema")
    ray_serve = pytest.importorskip("serving.targets.ray_serve")
    from hpo.endpoint import folder_of

    given = YAML(typ="safe", pure=True).load(service["serveConfigV2"])
    config = schema.ServeDeploySchema.model_validate(given)
    (application,) = config.applications
    assert application.import_path == f"{ray_serve.build.__module__}:{ray_serve.build.__name__}"
    assert application.route_prefix == f"/{application.name}"
    for group in (service["rayClusterConfig"]["headGroupSpec"], *service["rayClusterConfig"]["workerGroupSpecs"]):
        env = {e["name"]: e["value"] for e in container(group)["env"]}
        assert application.args == {"folder": str(folder_of(env["HPO_STORAGE"], application.name))}
        assert config.http_options.port in {port["containerPort"] for port in container(group)["ports"]}
    # The schema lets unknown fields through.
    assert given.keys() <= schema.ServeDeploySchema.model_fields.keys()
    assert given["http_options"].keys() <= schema.HTTPOptionsSchema.model_fields.keys()
    assert given["applications"][0].keys() <= schema.ServeApplicationSchema.model_fields.keys()


def test_a_pod_of_the_service_may_finish_its_longest_answer(service):
    from serving.endpoint import Limits

    (worker,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] > Limits().seconds + 5


# docs/cluster.md


def test_every_documented_command_exists():
    scripts = pytest.importorskip("ray.scripts.scripts")
    from typer.main import get_command

    from hpo.cli import app

    text = (ROOT / "docs/cluster.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    found = re.findall(r"(?:^|`)ray (job )?([a-z-]+)", "\n".join(lines), re.M)
    assert {"up", "down", "submit"} <= {name for _, name in found}
    for job, name in found:
        known = scripts.cli.commands["job"].commands if job else scripts.cli.commands
        assert name in known, f"ray {job}{name}"
    for name in re.findall(r"hpo ([a-z]+)", "\n".join(lines)):
        assert name in get_command(app).commands, f"hpo {name}"
