"""What `embedding.kind: auto` chose, and from what: `embedding` in manifest.json."""

from __future__ import annotations

from pydantic import BaseModel, Field

#: Where choices lie in a cache.
CHOICES = "choices"


class EmbeddingOption(BaseModel):
    """One embedding that was considered, by the landmarks of a pilot."""

    label: str
    settings: tuple[str, int, int, str, int] = Field(
        description="kind, blocks, tangents, tangent, dim"
    )
    width: int = Field(description="numbers of a row")
    flops: float = Field(description="operations of a candidate")
    spearman: float | None = Field(description="leave-one-out, mean over the targets")
    recall: float | None = Field(description="of the certificate, mean over the targets")
    look_at: int = Field(description="candidates whose exact scores the recall takes")
    cost: float = Field(description="operations of all embeddings and of those exact scores")


class EmbeddingChoice(BaseModel):
    """The choice: the option with the least cost; of equal ones the first."""

    chosen: str
    settings: tuple[str, int, int, str, int]
    why: str
    options: list[EmbeddingOption]
    candidates: int = Field(description="rows of the pool that can be scored")
    landmarks: int = Field(description="rows with exact scores, which the run draws anyway")
    pilot: int = Field(description="further random rows, whose embeddings alone were taken")
    recall: float = Field(description="asked for")
    share: float = Field(description="of the candidates, which the budget selects")
    gradient_flops: float = Field(description="operations of an exact score")
    count: int = Field(description="landmarks.count")
