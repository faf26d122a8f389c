"""``layerkit config``, and that commands and API follow what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import layerkit
from layerkit.formats.compression.decompress import Compression
from layerkit.usecases.settings import RewriteOptions


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return what runs a command with the settings file ``home/layerkit/config.toml`` of ``tmp_path``."""
    (tmp_path / "home/layerkit").mkdir(parents=True)

    def call(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LAYERKIT_")}
        return subprocess.run(
            [sys.executable, "-m", "layerkit.cli.main", *map(str, words)], capture_output=True, text=True,
            env={**clean, "XDG_CONFIG_HOME": str(tmp_path / "home"), "COLUMNS": "200", **more}, timeout=120,
            check=False,
        )  # fmt: skip

    return call


def test_each_value_with_where_it_comes_from(
    tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    file = tmp_path / "home/layerkit/config.toml"
    file.write_text(f'store = "{tmp_path}/store"\n[limits]\nfile_bytes = 5\n')
    found = json.loads(run("config", "--json", LAYERKIT_JOBS="3").stdout)
    assert found["schema"] == "layerkit.config.v1"
    assert found["settings"]["store"] == {
        "value": f"{tmp_path}/store", "origin": str(file), "variable": "LAYERKIT_STORE",
    }  # fmt: skip
    assert (found["settings"]["jobs"]["value"], found["settings"]["jobs"]["origin"]) == (3, "LAYERKIT_JOBS")
    assert found["settings"]["limits.file_bytes"]["value"] == 5
    assert (found["settings"]["platform"]["value"], found["settings"]["platform"]["origin"]) == (None, "default")
    text = run("config").stdout
    assert "limits.file_bytes" in text
    assert "limits.path_bytes" not in text
    assert "limits.path_bytes" in run("config", "--all").stdout


def test_commands_follow_the_file_and_the_flag_wins(
    tmp_path: Path, tiny_image: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    file = tmp_path / "home/layerkit/config.toml"
    file.write_text(f'store = "{tmp_path}/store"\ncompression = "zstd"\n')

    def media_type(*flags: str) -> str:
        out = tmp_path / f"out{len(flags)}"
        done = run("flatten", f"oci:{tiny_image}:latest", f"oci:{out}:flat", *flags)
        assert done.returncode == 0, done.stderr
        top = json.loads((out / "index.json").read_text())["manifests"][0]["digest"].split(":")[1]
        kind: str = json.loads((out / "blobs/sha256" / top).read_text())["layers"][0]["mediaType"]
        return kind

    assert media_type().endswith("+zstd")
    assert media_type("--compression", "gzip").endswith("+gzip")
    assert run("store", "ls").returncode == 1  # nothing was kept, and that is looked for where the file says
    assert str(tmp_path / "store") in run("store", "ls").stderr
    file.write_text("[limits]\nlayers_per_image = 1\n")
    bounded = run("inspect", f"oci:{tiny_image}:latest", "--store", tmp_path / "store")
    assert (bounded.returncode, "LAYERKIT_LIMIT_LAYERS_PER_IMAGE" in bounded.stderr) == (3, True)


def test_mistakes_are_told(tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    once = run("config", LAYERKIT_STROE="/x")
    assert once.returncode == 0
    assert once.stderr.count("LAYERKIT_STROE: there is no such variable; did you mean LAYERKIT_STORE?") == 1
    assert not run("config", LAYERKIT_SERVICE_HOST="10.0.0.1", LAYERKIT_PORT="tcp://x").stderr
    (tmp_path / "home/layerkit/config.toml").write_text("compresion = 'zstd'\n")
    done = run("doctor", "--store", tmp_path / "store")
    assert done.returncode == 2
    assert "there is no setting 'compresion'; did you mean compression?" in done.stderr


def test_the_python_api_follows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("LAYERKIT_STORE", raising=False)
    (tmp_path / "layerkit").mkdir()
    (tmp_path / "layerkit/config.toml").write_text(
        f'store = "{tmp_path}/s"\ndata = "objects"\njobs = 2\nstrict = true\ncompression = "none"\n'
    )
    settings = layerkit.Settings()
    assert (settings.store_path, settings.data, settings.jobs, settings.strict) == (
        tmp_path / "s", "objects", 2, True,
    )  # fmt: skip
    assert layerkit.default_store() == tmp_path / "s"
    assert RewriteOptions.of().packing.compression is Compression.NONE
    monkeypatch.setenv("LAYERKIT_STORE", str(tmp_path / "t"))
    assert layerkit.Settings(data="tar").store_path == tmp_path / "t"
    assert layerkit.Settings(tmp_path / "u").store_path == tmp_path / "u"
