"""``mount --for-podman``: podman itself runs what the printed words say."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import Engine, podman_run
from needs import need_root
from programs import answer, run_layerkit

MAPS = ("0:100000:65536", "0:300000:1000,1000:400000:64536")
SCRIPT = (
    "id -u; cat /proc/self/uid_map; stat -c %u:%g:%a /usr/bin/su /opt/app; echo new > /root/new; "
    "chown 7:8 /root/new; chmod 4711 /usr/bin/su; stat -c %u:%g:%a /root/new /usr/bin/su; "
    "ping -c 1 -W 2 127.0.0.1 > /dev/null && echo pong"
)


@pytest.fixture
def folder(podman_engine: Engine) -> Path:
    # podman and its runtime, as the container's root, have to come in.
    return podman_engine.folder


def test_two_maps_run_in_podman(podman_engine: Engine, app_image: Path, folder: Path, store_dir: Path) -> None:
    need_root()
    for number, uid_map in enumerate(MAPS):
        target = folder / f"m{number}"
        target.mkdir()
        words = run_layerkit(
            "mount", "--for-podman", app_image, target, "--uid-map", uid_map, "--store", store_dir
        ).stdout.split()
        assert words[-2:] == ["--rootfs", f"{target}:O"]
        try:
            out = podman_engine(*podman_run("--cap-add", "NET_RAW", *words, "sh", "-c", SCRIPT)).splitlines()
        finally:
            run_layerkit("umount", target, "--store", store_dir)
        root, *rows, su, app, new, changed, pong = out
        assert root == "0"
        assert [":".join(row.split()) for row in rows] == uid_map.split(",")
        assert (su, app) == ("0:0:4755", "1000:1000:750")
        assert (new, changed, pong) == ("7:8:644", "0:0:4711", "pong")


def test_the_words_and_their_errors(app_image: Path, tmp_path: Path, store_dir: Path) -> None:
    need_root()
    (tmp_path / "m").mkdir()
    facts = answer("mount", "--for-podman", app_image, tmp_path / "m", "--store", store_dir)
    run_layerkit("umount", tmp_path / "m", "--store", store_dir)
    assert facts["podman"] == ["--rootfs", f"{tmp_path}/m:O"]
    said = run_layerkit(
        "mount", "--for-podman", app_image, tmp_path / "m", "--upper", tmp_path / "u", "--store", store_dir, code=2
    ).stderr
    assert "leave --upper out" in said
