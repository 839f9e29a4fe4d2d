"""docker/Dockerfile by hadolint and by what it promises; and where the three files agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from deploy_files import (
    CLUSTER,
    DOCKERFILE,
    PINS,
    PROJECT,
    RAYJOB,
    ROOT,
    pods_of,
    read_cluster,
    read_documents,
)
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from influence.credentials import is_secret_key, is_secret_value


def hadolint(text: str) -> set[str]:
    """The codes of the rules that a Dockerfile breaks."""
    ran = subprocess.run(
        [str(Path(sys.executable).parent / "hadolint"), "--format=json", "--no-fail", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    return {problem["code"] for problem in json.loads(ran.stdout)}


def test_hadolint_finds_nothing() -> None:
    assert hadolint(DOCKERFILE.read_text()) == set()


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("FROM python:3.11-slim-bookworm", "FROM python:latest", "DL3007"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("-c constraints.txt torch", "torch", "DL3013"),
        ("# hadolint ignore=DL3008\n", "", "DL3008"),
        ("ENV HOME=/home/ray", "ENV HUB_TOKEN=x", "DL3064"),
    ],
)
def test_hadolint_finds_what_is_broken(old: str, new: str, code: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert code in hadolint(text.replace(old, new))


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text()))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]


def test_the_image_is_pinned_and_not_roots() -> None:
    steps = instructions()
    users = [arguments for name, arguments in steps if name == "USER"]
    assert users[-1] == "1000:1000", "Kubernetes can tell only a number from root"
    for name, arguments in steps:
        assert name not in ("EXPOSE", "ARG"), "no port is published, nothing secret is passed in"
        if name == "RUN" and "pip install" in arguments:
            assert "-c constraints.txt" in arguments, f"not pinned: {arguments}"
    (base,) = (arguments for name, arguments in steps if name == "FROM")
    version = re.fullmatch(r"python:(\d+\.\d+)-[a-z-]+", base)
    assert version, f"{base}: expected an image of Python with its version"
    assert version[1] in SpecifierSet(PROJECT["requires-python"])


def test_the_image_has_token_authentication_and_no_secret() -> None:
    (text,) = (arguments for name, arguments in instructions() if name == "ENV")
    settings = dict(part.split("=") for part in text.split())
    assert settings["RAY_AUTH_MODE"] == "token"
    assert settings["HOME"] == "/home/ray", "Ray's launcher would mount the token into /root"
    secret = [n for n, v in settings.items() if is_secret_key(n) or is_secret_value(f"{n}={v}")]
    assert not secret


def test_what_the_image_copies_is_there_and_let_through() -> None:
    ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text().split()
    copied = [arguments.split()[:-1] for name, arguments in instructions() if name == "COPY"]
    for source in chain.from_iterable(copied):
        assert (ROOT / source).exists(), f"COPY {source}: no such file"
        assert f"!{source}" in ignored, f"COPY {source}: left out by Dockerfile.dockerignore"


def test_every_dependency_has_its_pin() -> None:
    wanted = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    pins = {re.sub("[-_.]+", "-", name).lower() for name in PINS}
    names = {re.sub("[-_.]+", "-", Requirement(text).name).lower() for text in wanted}
    assert names <= pins, "an image built later would be another one"


def test_the_three_agree_on_versions() -> None:
    cluster, job = read_cluster(), read_documents()["RayJob"]
    images = [cluster["docker"]["image"]]
    images += [pod["spec"]["containers"][0]["image"] for pod in pods_of(job).values()]
    for image in images:
        assert image.endswith(f"/influence:{PROJECT['version']}"), image
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    assert f"influence:{PROJECT['version']}" in DOCKERFILE.read_text()


@pytest.mark.parametrize("file", [CLUSTER, DOCKERFILE, RAYJOB], ids=lambda file: file.name)
def test_no_file_holds_a_credential(file: Path) -> None:
    assert not is_secret_value(file.read_text())
