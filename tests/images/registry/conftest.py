"""A registry in memory, and clients of it that wait no time between attempts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry_fake import Fake, fake_registry

from layerkit.images.registry.client import RegistryClient, Repository
from layerkit.images.registry.options import RegistryOptions, Retry


@pytest.fixture
def fake() -> Iterator[Fake]:
    """Give an empty registry."""
    with fake_registry() as registry:
        yield registry


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., RegistryClient]]:
    """Return a maker of clients: ``make({host: auth}, **options)``; it knows no password but what it is given."""
    made: list[RegistryClient] = []

    def client(auths: dict[str, object] | None = None, **options: Any) -> RegistryClient:
        file = tmp_path / f"auth{len(made)}.json"
        file.write_text(json.dumps({"auths": auths or {}}))
        settings = {"authfile": file, "tls_verify": False, "retry": Retry(4, 0.001, 0.01), "chunk_bytes": 1 << 20}
        made.append(RegistryClient(RegistryOptions(**{**settings, **options})))
        return made[-1]

    yield client
    for each in made:
        each.close()


@pytest.fixture
def repo(fake: Fake, make: Callable[..., RegistryClient]) -> Repository:
    """Return a repository of the registry."""
    return make().repository(f"{fake.host}/team/app")
