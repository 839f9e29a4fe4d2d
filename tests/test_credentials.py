"""What has the form of a credential is refused and never repeated; ordinary values pass."""

from __future__ import annotations

import pytest

from influence.config_loading import parse_config
from influence.credentials import is_secret_key, is_secret_value, refuse_credentials
from influence.errors import InputError

SMALLEST = {
    "run": "runs/x",
    "model": {"name": "m"},
    "data": {"candidates": ["pool.jsonl"]},
    "targets": {"t": {"path": "t.jsonl"}},
}
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.c2lnbmF0dXJlLWh1bnRlcjI"

#: Every one of these holds the text `hunter2` where the secret is.
SECRET_VALUES = {
    "user and password": "s3://me:hunter2@bucket/pool.parquet",
    "a secret key with slashes": "s3://me:hunter2/x/y@bucket/pool.parquet",
    "an AWS key id": "AKIA" + "HUNTER2HUNTER2AB",
    "a temporary AWS key id": "profile ASIA" + "HUNTER2HUNTER2AB",
    "a hub token": "hf_hunter2hunter2hunter2hunter2",
    "a GitHub token": "ghp_" + "hunter2" * 6,
    "a fine-grained GitHub token": "github_pat_" + "hunter2_" * 4,
    "a Google API key": "AIza" + "hunter2" * 5,
    "a Google access token": "ya29." + "hunter2" * 4,
    "an Azure account key": "AccountName=a;AccountKey=hunter2hunter2==;",
    "a JSON web token": JWT + "hunter2",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\nhunter2",
    "a shell assignment": "AWS_SECRET_ACCESS_KEY=hunter2/hunter2",
    "an assignment in YAML's form": "HF_TOKEN: hunter2",
    "a session token": "export AWS_SESSION_TOKEN = hunter2",
    "a signed URL of S3": "https://b.host/a.parquet?x-amz-signature=hunter2",
    "a signed URL of GCS": "https://b.host/a.parquet?X-Goog-Credential=hunter2",
    "an older signed URL": "https://b.host/a?AWSAccessKeyId=hunter2&Expires=1",
    "a key in a query": "https://host/a.parquet?key=hunter2",
    "a later token in a query": "https://host/a.parquet?version=3&access_token=hunter2",
    "a shared access signature": "https://acc.blob.host/c/a.parquet?sv=2024-01-01&sig=hunter2",
}
ORDINARY_VALUES = (
    "s3://bucket/key=7/token=5/part-0.parquet",
    "s3://bucket/year=202?/part-?.parquet",
    "s3://bucket/a@b/c:d.jsonl",
    "https://host:8080/v1@2/x.jsonl",
    "https://host/a.parquet?version=3&limit=20",
    "pool/secret/passwords/api_key.jsonl",
    "C:/data/pool.jsonl",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "hf_datasets/pool.parquet",
    "eyJ.readme.jsonl",
    "a94a8fe5ccb19ba61c4c0873d391e987982fbbd3",
    "2M tokens",
    "*.key_proj.weight",
    "model.layers.0.mlp.token_mixer=on",
)
SECRET_KEYS = (
    *("password", "model.api_key", "aws_secret_access_key", "hf_token", "token", "x.session_token"),
    *("azure.sas_key", "connection_string", "private_key", "credentials", "PASSPHRASE"),
    "headers.Authorization",
)
ORDINARY_KEYS = (
    *("token_budget", "n_tokens", "max_length", "gguf_file", "seed", "key", "keys", "monkey"),
    *("replicas.rows_per_shard", "tokenizer", "author", "access", "shared"),
)


@pytest.mark.parametrize("kind", sorted(SECRET_VALUES))
def test_a_value_with_the_form_of_a_credential_is_refused_and_not_repeated(kind: str) -> None:
    value = SECRET_VALUES[kind]
    data = {**SMALLEST, "data": {"candidates": ["pool.jsonl", value]}}
    texts = []
    for attempt in (lambda: parse_config(data), lambda: parse_config(SMALLEST, [f"cache={value}"])):
        with pytest.raises(InputError) as caught:
            attempt()
        texts.append(str(caught.value))
    assert "data.candidates[1]" in texts[0], "the key is not named"
    assert "--set cache" in texts[1], "the override is not named"
    for text in texts:
        assert "credential" in text, "refused for another reason"
        assert "environment" in text, "the error does not say where credentials belong"
        assert "hunter2" not in text.lower(), "the secret is echoed"


def test_a_key_that_is_a_credential_itself_is_not_repeated() -> None:
    for data in ({"hf_hunter2hunter2hunter2hunter2": 1}, {"a": {"s3://u:hunter2@b": {"c": 1}}}):
        with pytest.raises(InputError, match=r"a key.*credential") as caught:
            refuse_credentials(data, "my.yaml")
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_a_key_that_names_a_secret_is_refused(key: str) -> None:
    assert is_secret_key(key), "a secret under this key would be written to RUN/config.yaml"


def test_ordinary_keys_and_values_pass() -> None:
    refused = [text for text in ORDINARY_VALUES if is_secret_value(text)]
    refused += [key for key in ORDINARY_KEYS if is_secret_key(key)]
    assert not refused, "users could not give these values"
    data = {**SMALLEST, "data": {"candidates": list(ORDINARY_VALUES)}}
    assert parse_config(data).data.candidates == list(ORDINARY_VALUES)
