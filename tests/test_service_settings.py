"""The settings: every one from the environment, and a wrong one is an error that names it."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings, processors

OTHERS: dict[str, Any] = {
    "checkpoints": Path("elsewhere"),
    "model": "mine",
    "http_host": "0.0.0.0",
    "http_port": 0,
    "device": "cuda:1",
    "threads": 3,
    "max_body": 1000,
    "max_request": 2000,
    "max_waiting": 3000,
    "max_models": 4000,
    "batches": "elsewhere",
    "database": "postgresql://database/batches",
    "work": False,
    "max_batch": 5000,
    "quota": 6000,
    "results_ttl": 1.5,
    "timeout": 2.5,
    "drain": 1.5,
}


def _settings(**given: Any) -> Settings:
    return Settings(**given)


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MISS_IWEM_")]:
        monkeypatch.delenv(name)


def test_every_setting_is_tried_here():
    """The table above has them all, with another value than the default."""
    assert set(OTHERS) == set(Settings.model_fields)
    assert all(getattr(_settings(), name) != value for name, value in OTHERS.items())


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_comes_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch):
    """MISS_IWEM_<NAME> sets it; an argument, which is a flag, goes before it."""
    monkeypatch.setenv(f"MISS_IWEM_{name.upper()}", str(OTHERS[name]))
    assert getattr(_settings(), name) == OTHERS[name]

    default = Settings.model_fields[name].get_default(call_default_factory=True, validated_data={})
    assert getattr(_settings(**{name: default}), name) == default


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http_port", "eighty"),
        ("http_port", "65536"),
        ("http_port", "-1"),
        ("threads", "0"),
        ("threads", "1.5"),
        ("max_body", "0"),
        ("max_request", "many"),
        ("max_waiting", "-5"),
        ("max_models", "none"),
        ("timeout", "-1"),
        ("drain", "0"),
        ("device", "gpu"),
        ("device", "cuda:"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    """The error is a line that says which setting cannot have which value."""
    monkeypatch.setenv(f"MISS_IWEM_{name.upper()}", value)
    with pytest.raises(ValueError, match=r"^[a-z_]+ \([A-Z_]+\): .*; got .*\.$") as failure:
        Settings.read()

    assert str(failure.value).startswith(f"{name} (MISS_IWEM_{name.upper()}): ")
    assert str(failure.value).endswith(f"; got '{value}'.")


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch):
    """A line each; what is wrong of several settings together has no name before it."""
    monkeypatch.setenv("MISS_IWEM_THREADS", "0")
    with pytest.raises(ValueError, match="threads") as failure:
        Settings.read(drain=-1.0)
    assert str(failure.value).splitlines() == [
        "threads (MISS_IWEM_THREADS): expected greater than 0; got '0'.",
        "drain (MISS_IWEM_DRAIN): expected greater than 0; got -1.0.",
    ]
    with pytest.raises(ValueError, match=r"^Expected a database for batches .* address\.$"):
        Settings.read(threads=1, batches="s3://bucket/batches")


def test_an_unknown_setting_is_an_error():
    """A misspelt argument does not pass for the default."""
    with pytest.raises(ValidationError, match="thread"):
        _settings(thread=2)


def test_settings_do_not_change():
    """They are read once, at the start."""
    with pytest.raises(ValidationError, match="frozen"):
        _settings().threads = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of so many processors with such a quota in its control group."""

    def made(allowed: int, quota: str | None) -> None:
        def read(path: Path, *_arguments: Any, **_options: Any) -> str:
            assert path == Path("/sys/fs/cgroup/cpu.max")
            if quota is None:
                raise FileNotFoundError(path)
            return quota

        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(allowed)))
        monkeypatch.setattr(Path, "read_text", read)

    return made


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [
        (8, None, 8),
        (8, "max 100000\n", 8),
        (8, "150000 100000\n", 1.5),
        (8, "1600000 100000\n", 8),
        (1, "50000 100000\n", 0.5),
        (4, "nonsense", 4),
        (4, "a b", 4),
        (4, "100000 0", 4),
    ],
)
def test_processors_are_what_this_process_may_use(
    machine: Any, allowed: int, quota: str | None, expected: float
):
    """The smaller of affinity and quota; a quota that cannot be read is none."""
    machine(allowed, quota)

    assert processors() == expected
    assert _settings().threads == max(1, int(expected) - 1)


def test_processors_without_affinity(machine: Any, monkeypatch: pytest.MonkeyPatch):
    """Where the system does not know of affinity, all processors may be used."""
    machine(1, None)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)

    assert processors() == 6
