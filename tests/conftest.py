"""Fixtures that all tests share: sample images, stores, and a guard against mounts left behind."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import page_cache
import pytest
from kernel_mounts import mounts_below
from needs import need_root, need_tool
from programs import Cli, skopeo

# podman_engine, containerd_engine, docker_engine
pytest_plugins = ("engines",)

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "sample-images"


def _sample(name: str) -> ModuleType:
    """Load a recipe of sample-images/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """Return the recipe of the tiny image: ``tiny.build(dest, kind=…, compression=…, devices=…)``."""
    return _sample("tiny")


@pytest.fixture(scope="session")
def tiny_image(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny image as an OCI layout folder (gzip layers, tag ``latest``). Do not write to it."""
    folder: Path = tmp_path_factory.mktemp("tiny") / "tiny"
    tiny.build(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_archive(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a maker of tiny images: ``tiny_archive("oci-archive", "zstd", devices=False) -> Path``."""
    made: dict[tuple[str, str, bool], Path] = {}

    def make(kind: str = "oci-archive", compression: str = "gzip", *, devices: bool = True) -> Path:
        key = (kind, compression, devices)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny") / ("tiny" if kind == "oci" else "tiny.tar")
            tiny.build(made[key], kind=kind, compression=compression, devices=devices)
        return made[key]

    return make


@pytest.fixture(scope="session")
def app_image() -> Path:
    """Return the real image as an OCI archive, built once and kept (see sample-images/app.py)."""
    need_root()
    need_tool("buildah", "mmdebstrap", "setcap", "setfacl")
    app = _sample("app")
    path: Path = app.cached_path("oci-archive")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several test processes ask at once: the first builds, the others wait.
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        app.ensure("oci-archive")
    return path


@pytest.fixture(scope="session")
def app_layout(app_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the real image as an OCI layout folder with the tag ``latest``. Do not write to it."""
    need_tool("skopeo")
    layout = tmp_path_factory.mktemp("layout") / "app"
    skopeo("copy", "--quiet", f"oci-archive:{app_image}", f"oci:{layout}:latest")
    return layout


@pytest.fixture
def cli(store_dir: Path) -> Cli:
    """Return a runner of ``layerkit`` with a store of the test's own: ``cli("remap", …, code=0)``."""
    return Cli(store_dir)


@pytest.fixture
def as_root() -> None:
    """Skip what needs root where we are not."""
    need_root()


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Fail a test after which more threads run than before."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture
def caches_stay() -> Iterator[None]:
    """Keep other tests from emptying the caches of the machine while this one looks at what is in them."""
    with page_cache.left_alone():
        yield


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    """Return a folder for a store; it does not exist yet."""
    return tmp_path / "store"


def _shared_mounts(folder: Path) -> list[bytes]:
    """Return what is still mounted in the run folders of the stores in ``folder``, which lie below /run."""
    from layerkit.hosts.mounts.mount import default_run

    stores = [path.parent for path in folder.glob("*/version.json")]
    return [target for store in stores for target in mounts_below(default_run(store))]


@pytest.fixture(autouse=True)
def mount_guard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves a mount below this process's temporary folder, and clear it away."""
    base = tmp_path_factory.getbasetemp()
    before = mounts_below(base)
    # Asked for here, so that it outlives this guard.
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    left = [target for target in mounts_below(base) if target not in before]
    if folder is not None:
        left += _shared_mounts(folder)
    # The deepest first: a mount cannot go while another lies on it.
    for target in reversed(left):
        subprocess.run(["umount", "--lazy", target], check=False)
    if left:
        names = "\n  ".join(os.fsdecode(target) for target in left)
        pytest.fail(f"the test left mounts behind:\n  {names}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI everything is installed, so a skip is a check that silently does not run: a failure."""
    if not os.environ.get("CI") or hasattr(session.config, "workerinput"):
        return
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    quiet = sum(len(reporter.stats.get(kind, [])) for kind in ("skipped", "xfailed", "xpassed"))
    if quiet:
        reporter.ensure_newline()
        reporter.write_line(f"{quiet} tests skipped or expected to fail: not accepted in CI", red=True)
        session.exitstatus = max(int(session.exitstatus), int(pytest.ExitCode.TESTS_FAILED))


@pytest.fixture(scope="session")
def pinned_digests() -> dict[str, Any]:
    """Return what the tiny image's recipe must make, byte for byte."""
    pins: dict[str, Any] = json.loads((SAMPLES / "tiny.digests.json").read_text())
    return pins
