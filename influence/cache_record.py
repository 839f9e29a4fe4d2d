"""What `influence cache list --json` writes: the fingerprints of a cache, and who uses them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field


class CachedFingerprint(BaseModel):
    """The shards of one stage and fingerprint in a cache."""

    stage: str
    fingerprint: str
    shards: int
    rows: int | None = Field(description="null where the shards' names do not tell")
    bytes: int
    newest: datetime
    used_by: list[str] = Field(default_factory=list, description="of the configs and runs given")
    values: dict[str, Any] | None = Field(
        default=None, description="what the fingerprint covers, if one of those uses it"
    )
    made: dict[str, Any] = Field(
        default_factory=dict, description="else: vectors, device, torch of one shard's footer"
    )


class OtherObjects(BaseModel):
    """Objects in a cache directory that are no shards."""

    objects: int = 0
    bytes: int = 0
    examples: list[str] = Field(default_factory=list, description="the first names")


class CacheListing(BaseModel):
    """What `influence cache list --json` writes."""

    cache: str
    fingerprints: list[CachedFingerprint] = Field(default_factory=list)
    empty: OtherObjects = Field(default_factory=OtherObjects, description="no bytes: damaged")
    foreign: OtherObjects = Field(default_factory=OtherObjects, description="no shard's name")
