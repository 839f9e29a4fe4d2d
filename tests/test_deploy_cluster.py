"""cluster.yaml: Ray and AWS would take it, spot comes first, and nothing is open to the outside.

Each checker is also shown broken copies, so that one that accepts everything is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import botocore.session
import jsonschema
import pytest
from botocore.validate import ParamValidator
from deploy_files import CLUSTER, read_cluster
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def cluster() -> dict[str, Any]:
    """cluster.yaml, parsed."""
    return read_cluster()


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The node types that are not the head's."""
    types = cluster["available_node_types"]
    return {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}


def launch_problems(node_config: dict[str, Any]) -> str:
    """What botocore has against launching a node with it, as Ray does; empty for nothing."""
    request = {"MinCount": 1, "MaxCount": 1, **node_config}
    request["SubnetId"] = request.pop("SubnetIds")[0]  # not a parameter of AWS: Ray takes one
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    problems = [ParamValidator().validate(request, shape).generate_report()]
    return "\n".join([*filter(None, problems), *_unknown_choices(request, shape)])


def _unknown_choices(value: Any, shape: Any) -> Iterator[str]:
    """Texts outside their enumeration, which botocore's validator leaves to the service."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for key, inner in value.items():
            if key in shape.members:
                yield from _unknown_choices(inner, shape.members[key])
    elif shape.type_name == "list" and isinstance(value, list):
        for inner in value:
            yield from _unknown_choices(inner, shape.member)
    elif shape.type_name == "string" and shape.enum and value not in shape.enum:
        yield f"{value!r} is no {shape.name}"


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[commands] == [], "Ray's defaults would install another Ray into the image"


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(max_worker=3),
        lambda c: c["docker"].update(imag="x"),
        lambda c: c["available_node_types"]["gpu_spot"].pop("resources"),
        lambda c: c.update(head_node_type="no such type"),
        lambda c: c["available_node_types"]["gpu_spot"].update(min_workers=9),
    ],
)
def test_ray_refuses_a_broken_cluster_file(cluster: dict[str, Any], change: Change) -> None:
    change(cluster)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepare_config(cluster))


def test_aws_would_take_every_node(cluster: dict[str, Any]) -> None:
    for name, kind in cluster["available_node_types"].items():
        assert launch_problems(kind["node_config"]) == "", name


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda n: n.update(InstanceTyp="g5.2xlarge"), "InstanceTyp"),
        (lambda n: n.update(InstanceType="g5.2xlarg"), "is no InstanceType"),
        (lambda n: n["InstanceMarketOptions"].update(MarketType="spott"), "is no MarketType"),
        (lambda n: n["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="200"), "VolumeSize"),
        (lambda n: n.update(IamInstanceProfile="influence-worker"), "IamInstanceProfile"),
    ],
)
def test_aws_would_refuse_a_broken_node(
    cluster: dict[str, Any], change: Change, problem: str
) -> None:
    node = cluster["available_node_types"]["gpu_spot"]["node_config"]
    change(node)
    assert problem in launch_problems(node)


def test_head_without_gpu_and_gpu_workers_from_none(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}, "replicas would run on the head"
    spot = {
        name: "InstanceMarketOptions" in kind["node_config"]
        for name, kind in workers(cluster).items()
    }
    assert sorted(spot.values()) == [False, True], "one spot type and one on-demand type beside it"
    for name, kind in workers(cluster).items():
        assert kind["min_workers"] == 0, f"{name} would stay when there is nothing to do"
        assert 0 < kind["max_workers"] <= cluster["max_workers"]
        assert kind["resources"]["GPU"] >= 1
    assert 0 < cluster["idle_timeout_minutes"] <= 15, "idle GPU nodes cost money"


def test_spot_is_asked_for_first_and_on_demand_where_spot_has_just_failed(
    cluster: dict[str, Any],
) -> None:
    config = AutoscalingConfig(cluster, skip_content_hash=True)
    demand = ResourceRequestUtil.make({"CPU": 4, "GPU": 1})

    def launched(availabilities: dict[str, float]) -> dict[str, int]:
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([demand]),
            recoverable_resource_availabilities=availabilities,
        )
        reply = ResourceDemandScheduler().schedule(request)
        return {each.instance_type: each.count for each in reply.to_launch}

    assert launched({}) == {"gpu_spot": 1}, "the dear type is taken first"
    after = launched({"gpu_spot": 0.0})
    assert after == {"gpu_on_demand": 1}, "no node where there is no spot capacity"


def test_no_port_of_the_cluster_is_public(cluster: dict[str, Any]) -> None:
    provider = cluster["provider"]
    assert provider["use_internal_ips"] is True, "nodes would have public addresses"
    assert "security_group" not in provider, "Ray opens port 22 of a group of its own to the world"
    for name, kind in cluster["available_node_types"].items():
        node = kind["node_config"]
        assert node["SecurityGroupIds"], f"{name}: Ray would make a group open to the world"
        assert node["SubnetIds"], f"{name}: Ray would choose any subnet, public ones included"
        assert "NetworkInterfaces" not in node, f"{name}: may ask for a public address"
        assert node["MetadataOptions"]["HttpTokens"] == "required", f"{name}: role open to SSRF"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    head_start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head_start
    assert "0.0.0.0" not in CLUSTER.read_text()
    options = cluster["docker"]["run_options"] + cluster["docker"]["worker_run_options"]
    assert not re.findall(r"(?:^|\s)(?:-p|--publish|--privileged)\b", " ".join(options))


def test_every_node_of_the_cluster_has_token_and_region(cluster: dict[str, Any]) -> None:
    options = cluster["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options, "Ray would run whatever anyone sends it"
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert f"-e AWS_REGION={cluster['provider']['region']}" in options, "S3 clients need it"
    regions = set(re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", CLUSTER.read_text()))
    assert regions == {cluster["provider"]["region"]}, "one of the regions was forgotten"
