"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared folder (measured data, specifications): beside the repository, or where told."""
    told = os.environ.get("MODPRESSURE_SHARED")
    path = Path(told) if told else Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"no shared folder at {path} (MODPRESSURE_SHARED names another)")
    return path
