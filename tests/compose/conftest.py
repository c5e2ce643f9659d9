"""What the tests of docker-compose.yml need of the machine."""

import shutil
import subprocess

import pytest


@pytest.fixture(scope="session")
def engine() -> None:
    """A container engine that has Compose, or a skip that says what is missing."""
    if shutil.which("docker") is None:
        pytest.skip("there is no docker here")
    info = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if info.returncode:
        pytest.skip(f"there is no container engine: {(info.stderr.strip().splitlines() or ['docker info fails'])[-1]}")
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("this docker has no compose command")
