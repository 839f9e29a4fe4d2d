"""A credential in a config is refused, wherever it is, and never repeated."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from configs import SMALLEST, changed, refusal

from influence.config_loading import parse_config

SECRETS = [
    ("aws_secret_access_key", "hunter2-key"),
    ("model.api_key", "hunter2-key"),
    ("model.password", "hunter2-key"),
    ("model.hf_token", "hunter2-key"),
    ("model.token", "hunter2-key"),
    ("run", "s3://AKIAhunter2:hunter2/x@bucket/run"),
    ("cache", "s3://user:hunter2@bucket/cache"),
    ("model.name", "hf_hunter2hunter2hunter2hunter2"),
    ("data.candidates", ["a.jsonl", "https://u:hunter2@host/a.jsonl"]),
    ("data.candidates", ["https://b.host/a.parquet?X-Amz-Signature=hunter2"]),
    ("model.revision", "AKIA" + "HUNTER2HUNTER2AB"),
    ("targets.gsm8k.path", "gs://u:hunter2@b/t.jsonl"),
]


@pytest.mark.parametrize(("key", "value"), SECRETS)
def test_a_credential_anywhere_is_refused_and_not_repeated(key: str, value: Any):
    shown = value if isinstance(value, str) else value[-1]
    texts = [refusal(changed(key, value))]
    texts.append(refusal(SMALLEST, f"{key}={yaml.safe_dump(value, default_flow_style=True)}"))
    texts.append(refusal(changed(key, value), "run.below=1", f"{key}.below=1"))
    for text in texts:
        assert "credential" in text, "let through, or refused for another reason"
        assert "environment" in text, "the error does not say where credentials belong"
        assert "hunter2" not in text.lower(), "the secret is echoed"
        assert shown not in text


def test_a_credential_without_a_key_is_not_repeated_either():
    for override in ("hf_hunter2hunter2hunter2hunter2", "s3://u:hunter2@b=x"):
        assert "hunter2" not in refusal(SMALLEST, override)


def test_what_only_looks_like_a_credential_passes():
    data = changed("selection.per_source", {"password_reset": {"max": 0.5}})
    data["targets"]["secrets"] = {"path": "t.jsonl"}
    data["data"]["candidates"] = ["s3://bucket/a@b/c:d.jsonl", "https://host:8080/v1@2/x.jsonl"]
    data["replicas"] = {"token_budget": 128}
    assert parse_config(data).replicas.token_budget == 128
