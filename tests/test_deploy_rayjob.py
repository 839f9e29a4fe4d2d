"""docker/rayjob.yaml: after the schema, runs the config it brings, closed to the outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml
from deploy_files import RAYJOB, ROOT, pods_of, read_documents

from influence.config_loading import parse_config
from influence.credentials import is_secret_key

SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "rayjob.schema.json").read_text())

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    """The documents of rayjob.yaml by their kind."""
    return read_documents()


@pytest.fixture
def job(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The RayJob."""
    return documents["RayJob"]


def container(job: dict[str, Any], pod: str) -> dict[str, Any]:
    """The container of a pod of the job."""
    return pods_of(job)[pod]["spec"]["containers"][0]


def test_the_schema_accepts_the_rayjob(job: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(job, SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        lambda j: j["spec"].update(entryPoint="python"),
        lambda j: j["spec"].update(backoffLimit="2"),
        lambda j: j["spec"].update(submissionMode="K8SJobMode"),
        lambda j: j["spec"]["rayClusterSpec"].update(authOptions={"mode": "Token"}),
        lambda j: j["spec"]["rayClusterSpec"]["autoscalerOptions"].update(idleTimeout=60),
        lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"),
        lambda j: container(j, "head")["resources"]["limits"].update(cpu="x"),
        lambda j: container(j, "gpu").pop("name"),
        lambda j: container(j, "submitter")["securityContext"].update(runAsUser="1000"),
        lambda j: pods_of(j)["gpu"]["spec"]["volumes"][0]["emptyDir"].update(medium="memory"),
    ],
)
def test_the_schema_refuses_a_broken_rayjob(job: dict[str, Any], change: Change) -> None:
    change(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def test_the_rayjob_runs_the_config_it_brings(documents: dict[str, dict[str, Any]]) -> None:
    job, config_map = documents["RayJob"], documents["ConfigMap"]
    module, path = job["spec"]["entrypoint"].removeprefix("python -m ").split()
    assert module == "ray_jobs.select"
    head = pods_of(job)["head"]["spec"]
    (mount,) = (m for m in head["containers"][0]["volumeMounts"] if m["name"] == "job")
    (volume,) = (v for v in head["volumes"] if v["name"] == "job")
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    (name,) = config_map["data"]
    assert path == f"{mount['mountPath']}/{name}", "the entrypoint reads a file that is not there"
    config = parse_config(yaml.safe_load(config_map["data"][name]))
    for url in (config.run, config.cache_url, *config.data.candidates):
        assert url.startswith("s3://"), f"{url}: a pod's own disk is gone with it"
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = container(job, group["groupName"])["resources"]["limits"]
    assert config.replicas.num_cpus <= float(limits["cpu"]), "a replica fits on no worker"
    assert config.replicas.num_gpus <= limits["nvidia.com/gpu"]
    assert config.replicas.max <= group["maxReplicas"], "replicas would wait for ever"


def test_gpu_workers_of_the_rayjob_come_and_go(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"]) == (0, 0)
    assert group["maxReplicas"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True, "the cluster would stay for ever"


def test_ray_pods_have_shared_memory_that_fits(job: dict[str, Any]) -> None:
    for name, pod in pods_of(job).items():
        if name == "submitter":
            continue
        ray = container(job, name)
        mounts = {m["mountPath"]: m["name"] for m in ray["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shm["medium"] == "Memory", f"{name}: the object store would be on a disk"
        limit = ray["resources"]["limits"]["memory"]
        assert float(shm["sizeLimit"].removesuffix("Gi")) < float(limit.removesuffix("Gi")) / 2


def test_no_port_of_the_rayjob_is_public(documents: dict[str, dict[str, Any]]) -> None:
    job, policy = documents["RayJob"], documents["NetworkPolicy"]["spec"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["enableIngress"] is False
    text = RAYJOB.read_text()
    for word in ("hostPort", "hostNetwork", "NodePort", "LoadBalancer", "ipBlock", "privileged"):
        assert word not in text, word
    selected = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    (rule,) = policy["ingress"]
    assert rule["from"], "a rule without a source lets everything in"
    assert all("podSelector" in source and source["podSelector"] for source in rule["from"])
    for name, pod in pods_of(job).items():
        labels = pod["metadata"]["labels"]
        assert selected.items() <= labels.items(), f"{name}: the policy does not cover it"


def test_no_pod_of_the_rayjob_is_roots_or_holds_a_secret(
    documents: dict[str, dict[str, Any]],
) -> None:
    for name, pod in pods_of(documents["RayJob"]).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] == 1000, f"{name}: the image's user is 1000"
        for each in spec["containers"]:
            assert each["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            for variable in each.get("env", []):
                secret = is_secret_key(variable["name"])
                assert not secret or "value" not in variable, f"{name}: {variable['name']}"
        if name != "head":
            assert spec["automountServiceAccountToken"] is False, f"{name}: may start pods"
    account = documents["ServiceAccount"]["metadata"]["name"]
    assert pods_of(documents["RayJob"])["head"]["spec"]["serviceAccountName"] == account
