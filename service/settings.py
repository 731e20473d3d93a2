"""What the service is told from outside: environment variables, or flags of `miss-iwem serve`."""

import os
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings", "processors"]

PREFIX = "MISS_IWEM_"


class Settings(BaseSettings):
    """Read once, at the start; each name is an environment variable MISS_IWEM_<NAME>."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    checkpoints: Path = Field(Path("checkpoints"), description="Folder of the checkpoints.")
    model: str = Field(
        "static-mnist-miss-iwem", description="The model of requests that do not name one."
    )
    http_host: str = Field("127.0.0.1", description="Address to listen on.")
    http_port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks one.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1."
    )
    threads: PositiveInt = Field(
        default_factory=lambda: max(1, int(processors()) - 1),
        description="Threads of the model; by default all processors that may be used but one.",
    )
    max_body: PositiveInt = Field(32 * 2**20, description="Bytes of a request's body.")
    max_request: PositiveInt = Field(
        2_000_000,
        description="Particles of one request: in whole blocks, with what each image adds.",
    )
    max_waiting: PositiveInt = Field(
        4_000_000, description="Particles that may wait; more are refused with 429."
    )
    max_models: PositiveInt = Field(
        2 * 2**30, description="Bytes of weights that are kept; what was used longest ago goes."
    )
    batches: str = Field(
        "batches",
        description="Folder of the batches, or a bucket's address; empty where none are taken.",
    )
    database: str = Field(
        "", description="PostgreSQL's address, for several workers; SQLite in the folder if empty."
    )
    work: bool = Field(default=True, description="Whether this process works on batches itself.")
    max_batch: PositiveInt = Field(16 * 2**30, description="Bytes of a batch's file.")
    quota: PositiveInt = Field(64 * 2**30, description="Bytes of all batches and their results.")
    results_ttl: PositiveFloat = Field(
        7 * 24.0, description="Hours after its end in which a batch and its results are kept."
    )
    timeout: PositiveFloat = Field(
        300.0, description="Seconds that a request gets; X-Timeout-Ms asks for fewer."
    )
    drain: PositiveFloat = Field(20.0, description="Seconds that running requests get at the end.")

    @classmethod
    def read(cls, **flags: Any) -> Self:
        """The settings of the environment, and of flags that are not None in their place.

        Raises:
            ValueError: Values that they cannot have, a line each.
        """
        try:
            return cls(**{name: value for name, value in flags.items() if value is not None})
        except ValidationError as error:
            raise ValueError("\n".join(map(_worded, error.errors()))) from None

    @model_validator(mode="after")
    def _database_for_buckets(self) -> Self:
        if "://" in self.batches and not self.database:
            raise ValueError(
                "expected a database for batches that are not in a folder; got none. "
                "Set MISS_IWEM_DATABASE to PostgreSQL's address"
            )
        return self

    @property
    def database_address(self) -> str:
        """As SQLAlchemy takes it."""
        return self.database or f"sqlite:///{Path(self.batches).absolute() / 'batches.sqlite'}"


def _worded(error: Any) -> str:
    """A setting, what was expected of it, and what came."""
    expected = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    if not error["loc"]:
        return f"{expected[:1].upper()}{expected[1:]}."
    name = error["loc"][0]
    return f"{name} ({PREFIX}{name.upper()}): {expected}; got {error['input']!r}."


def processors() -> float:
    """How many processors this process may use, by affinity and by the control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    allowed = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return min(allowed, quota / period)
    except (OSError, ValueError, ZeroDivisionError):  # no control group, or its quota is "max"
        return allowed
