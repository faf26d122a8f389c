"""containerd and docker pull and run an image of a real docker-registry, before and after we publish beside it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import runnable
from engines import Engine
from hook_service import MAP_A, MAP_B, hook_process, write_config
from made_images import INDEX, MANIFEST, digest
from programs import run_layerkit
from pushed_images import ask
from registry_server import docker_registry

_ID = ("/bin/busybox", "id", "-u")


def use_containerd(ctr: Engine, ref: str, at: str) -> None:
    """Pull by tag and by digest from nothing, run both, and forget all of it."""
    for number, name in enumerate((f"{ref}:v1", f"{ref}@{at}")):
        ctr("images", "pull", "--plain-http", name)
        assert f"{at} " in next(line for line in ctr("images", "ls").splitlines() if line.startswith(name + " "))
        assert ctr("run", "--rm", name, f"lk-pull-{number}", *_ID).strip() == "0"
        ctr("images", "rm", "--sync", name)


def use_docker(docker: Engine, ref: str, at: str) -> None:
    """Pull by tag and by digest from nothing, run both, and forget all of it."""
    for name in (f"{ref}:v1", f"{ref}@{at}"):
        assert f"Digest: {at}" in docker("pull", name)
        assert f"{ref}@{at}" in docker("image", "inspect", "--format", "{{.RepoDigests}}", name)
        assert docker("run", "--rm", "--network", "none", name, *_ID).strip() == "0"
        docker("rmi", "--force", name)


@pytest.mark.parametrize("engine", ["containerd", "docker"])
def test_pulls_before_and_after(
    engine: str, request: pytest.FixtureRequest, tiny: ModuleType, tmp_path: Path
) -> None:
    client: Engine = request.getfixturevalue(f"{engine}_engine")
    use = use_containerd if engine == "containerd" else use_docker
    layout = runnable.build(tiny, tmp_path / "image", sparse=False)
    with docker_registry(tmp_path / "registry") as registry:
        plain, ref = ("--tls-verify=false", "--store", str(tmp_path / "store")), registry.ref("team/run:v1")
        run_layerkit("copy", str(layout), ref, "--tls-verify=false")
        data = ask(registry.host, "team/run/manifests/v1", Accept=f"{MANIFEST}, {INDEX}")[1]
        use(client, f"{registry.host}/team/run", digest(data))

        run_layerkit("remap", ref, ref, "--uid-map", MAP_A, *plain)
        run_layerkit("index", "push", ref, *plain)
        run_layerkit("hook", "run", ref, "--uid-map", MAP_B, "--engine", "threads", *plain)
        status, _, _ = ask(registry.host, f"team/run/manifests/{digest(data).replace(':', '-')}", Accept=INDEX)
        assert status == 200, "nothing was published beside the image"
        assert ask(registry.host, "team/run/manifests/v1", Accept=f"{MANIFEST}, {INDEX}")[1] == data
        use(client, f"{registry.host}/team/run", digest(data))

        config = write_config(tmp_path, registry.host, MAP_A, name="hook-")
        with hook_process(config, "proxy", "main", log=tmp_path / "log") as (_, url):
            use(client, f"{url.removeprefix('http://')}/team/run", digest(data))
