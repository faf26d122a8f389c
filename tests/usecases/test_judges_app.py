"""The real sample image, made smaller, before judges that nobody here wrote; see test_judges.py."""

from __future__ import annotations

import json
from pathlib import Path

import oci_schemas
import optimizing
import pytest
import runc
from engines import Engine, podman_run
from judge import Shown, differences, snapshot
from needs import need_root, need_tool
from programs import run

from layerkit.api import rewrite as rewrites

# As the image's own user, who may not look into everything.
LOOK = ("/bin/sh", "-c", "find /opt /home /usr/bin -printf '%p %y %m %U %G %s %Ts\\n' 2>&-; id -u")


def _sorted(text: str) -> list[str]:
    return sorted(text.splitlines())


def umoci(layout: str, work: Path) -> dict[bytes, Shown]:
    """Return the tree that umoci unpacks, which is removed again."""
    run("umoci", "unpack", "--image", layout, work)
    found = snapshot(work / "rootfs")
    run("rm", "-rf", work)
    return found


@pytest.fixture(scope="module")
def source(app_image: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[bytes, Shown], list[str]]:
    """Return the image as a layout, umoci's tree of it, and what ``find`` sees in that."""
    need_root()
    need_tool("skopeo", "umoci", "chroot")
    work = tmp_path_factory.mktemp("app")
    rewrites.copy(str(app_image), f"oci:{work}/image:app")
    run("umoci", "unpack", "--image", f"{work}/image:app", work / "bundle")
    tree = snapshot(work / "bundle/rootfs")
    seen = _sorted(run("chroot", "--userspec=1000:1000", work / "bundle/rootfs", *LOOK).stdout)
    run("rm", "-rf", work / "bundle")
    return f"oci:{work}/image:app", tree, seen


def test_the_real_image(
    source: tuple[str, dict[bytes, Shown], list[str]],
    podman_engine: Engine,
    docker_engine: Engine,
    containerd_engine: Engine,
    tmp_path: Path,
) -> None:
    image, tree, seen = source
    assert len(seen) > 1000 and "1000" in seen
    archive, name = tmp_path / "out.tar", "judge.example/app:v1"
    report = optimizing.optimize_to(image, f"docker-archive:{archive}:{name}")
    assert report.saved_percent >= 40
    oci_schemas.check(archive)
    before = json.loads(run("skopeo", "inspect", "--config", image).stdout)
    for transport in ("docker-archive", "oci-archive"):
        after = json.loads(run("skopeo", "inspect", "--config", f"{transport}:{archive}:{name}").stdout)
        assert after["config"] == before["config"]
    # The same bytes are an OCI archive, which skopeo copies without compressing anything again.
    run("skopeo", "copy", "--insecure-policy", "-q", f"oci-archive:{archive}:{name}", f"oci:{tmp_path}/again:v1")
    assert differences(umoci(f"{tmp_path}/again:v1", tmp_path / "bundle"), tree, skip=frozenset({b"."})) == []
    podman_engine("load", "-q", "-i", archive)
    assert _sorted(podman_engine(*podman_run("--entrypoint", "", name, *LOOK))) == seen
    docker_engine("load", "-q", "-i", archive)
    words = ("run", "--rm", "--network", "none", "--entrypoint", "", name, *LOOK)
    assert _sorted(docker_engine(*words)) == seen
    containerd_engine("image", "import", archive)
    assert _sorted(containerd_engine("run", "--rm", name, runc.name(), *LOOK)) == seen
