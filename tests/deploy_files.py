"""The files of a deployment, parsed, and what they have to agree with."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster.yaml"
DOCKERFILE = ROOT / "docker" / "Dockerfile"
RAYJOB = ROOT / "docker" / "rayjob.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def read_cluster() -> dict[str, Any]:
    """cluster.yaml; every call gives one of its own, to change."""
    return _without_aliases(yaml.safe_load(CLUSTER.read_text()))


def read_documents() -> dict[str, dict[str, Any]]:
    """The documents of rayjob.yaml by their kind."""
    found = yaml.safe_load_all(RAYJOB.read_text())
    return {document["kind"]: _without_aliases(document) for document in found}


def pods_of(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod templates of a RayJob: "submitter", "head", and each group of workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    submitter = job["spec"]["submitterPodTemplate"]
    return {"submitter": submitter, "head": cluster["headGroupSpec"]["template"], **groups}


def _without_aliases(document: dict[str, Any]) -> dict[str, Any]:
    """Aliases become copies: a change to one node or pod would change them all."""
    return json.loads(json.dumps(document))
