"""Credentials in a config or in `--set`: found by key or by form, refused, never repeated.

A run writes its config to `config.yaml`, Ray keeps the command line of a submitted job, and both
end up in logs: a secret there is public. So secrets come from the environment or the node's role.

Only what has the form of a credential is refused, so that no ordinary path, glob, name or commit
is. A bare secret (forty letters under some other key) has no form, and is not found.
"""

from __future__ import annotations

import re

from influence.errors import InputError

ADVICE = (
    "credentials are never read from a config: set them in the environment "
    "(AWS_ACCESS_KEY_ID, ..., HF_TOKEN) or use the node's role"
)

_SECRET_KEY = re.compile(
    r"(secret|password|passwd|passphrase|credential|(api|access|account|private|sas|shared)_?key"
    r"|connection_?string|(^|[._])authorization$|(^|[._])(\w+_)?token$)",
    re.I,
)
_SECRET_FORMS = (
    # A secret key may itself hold slashes: whatever stands between a colon (that no port number
    # follows) and an "@" in a URL.
    r"://[^/@\s]*:(?!\d+/)[^@\s]+@",
    # AWS key ids, and the keys and tokens of Hugging Face, GitHub, Google and Azure.
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    r"\bhf_[A-Za-z0-9]{20,}",
    r"\bgh[pousr]_[A-Za-z0-9]{36,}",
    r"\bgithub_pat_[A-Za-z0-9_]{22,}",
    r"\bAIza[0-9A-Za-z_-]{35}",
    r"\bya29\.[0-9A-Za-z_-]{20,}",
    r"\bAccountKey=[^;\s]",
    # A JSON web token, and a key in PEM form.
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    # An assignment as a shell would have it: AWS_SECRET_ACCESS_KEY=..., HF_TOKEN: ...
    r"\b(AWS|AZURE|GCP|GCS|GOOGLE|HF|HUGGING_?FACE(HUB)?|RAY|WANDB)_([A-Z0-9]+_)*"
    r"(SECRET|TOKEN|KEY|PASSWORD)(_[A-Z0-9]+)*\s*[=:]\s*\S",
    # A signed URL on S3 or GCS; for other names the "?" or "&" tells a query from a path such as
    # s3://bucket/key=7/part.parquet.
    r"(?i:X-(Amz|Goog)-(Signature|Credential|Security-Token)=)",
    r"(?i:://\S*[?&](sig|signature|key|api_?key|access_?key|(aws)?access_?key_?id|token"
    r"|access_?token|auth|password|passwd|secret|client_?secret)=[^&\s])",
)
_SECRET_VALUE = re.compile("|".join(_SECRET_FORMS))


def refuse_credentials(node: object, name: str, key: str = "") -> None:
    """Walk a parsed config (mappings, lists, texts); `name` is what errors call its file.

    Raises:
        InputError: a key that names a secret, or a text that has the form of one; it names the
            key (the key above it, where the key itself is the secret) and never the value.
    """
    if isinstance(node, dict):
        for child, value in node.items():
            if is_secret_value(str(child)):
                below = f"a key below {key}" if key else "a key"
                raise InputError(f"{name}: {below}: holds a credential; {ADVICE}")
            where = f"{key}.{child}" if key else str(child)
            # A section of that name (a source, a target) is no credential; what it holds may be.
            if is_secret_key(str(child)) and not isinstance(value, dict):
                raise InputError(f"{name}: {where}: looks like a credential; {ADVICE}")
            refuse_credentials(value, name, where)
    elif isinstance(node, list):
        for position, value in enumerate(node):
            refuse_credentials(value, name, f"{key}[{position}]")
    elif isinstance(node, str) and is_secret_value(node):
        raise InputError(f"{name}: {key}: holds a credential; {ADVICE}")


def refuse_in_override(override: str) -> None:
    """The same for one `--set KEY=VALUE`, before anything else is said about it."""
    key, _, _ = override.partition("=")
    if is_secret_value(override):
        shown = "" if is_secret_value(key) else f" {key}"
        raise InputError(f"--set{shown}: holds a credential; {ADVICE}")
    if is_secret_key(key):
        raise InputError(f"--set {key}: looks like a credential; {ADVICE}")


def is_secret_key(key: str) -> bool:
    """Whether a key names a secret: `api_key`, `hf_token`, `password`, ..."""
    return _SECRET_KEY.search(key) is not None


def is_secret_value(text: str) -> bool:
    """Whether a text holds something with the form of a credential."""
    return _SECRET_VALUE.search(text) is not None
