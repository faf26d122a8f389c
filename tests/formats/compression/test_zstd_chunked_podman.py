"""zstd:chunked layers, judged by podman: pulled file by file from a registry, and as plain zstd."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import judge
from engines import Engine, podman
from made_images import Layout, special, tar
from needs import need_root, need_tool
from programs import run_layerkit
from registry_server import docker_registry

PARTIAL = '[storage.options]\npull_options = {enable_partial_images = "true", use_hard_links = "false"}'


def source(folder: Path) -> Path:
    layout = Layout()
    big = bytes(range(256)) * 40_000  # two and a half chunks of 4 MiB
    parent = special("d", b"5", mode=0o750, uid=3)
    first = tar(
        parent, ("d/big", big), ("d/small", b"small"), ("d/empty", b""),
        special("d/link", b"2", "big"), special("d/hard", b"1", "d/small"), ("gone", b"x" * 100),
    )  # fmt: skip
    own = special("e", b"5", mode=0o711, pax_headers={"mtime": "1700000000.25"})
    second = tar((".wh.gone", b""), parent, own, ("e/new", b"new" * 999), ("d/big", big))
    layout.list(layout.image(first, second), "example.com/chunked:1")
    return layout.archive(folder / "image.tar")


def mounted(engine: Engine, name: str) -> dict[bytes, judge.Shown]:
    try:
        found = judge.snapshot(Path(engine("image", "mount", name).strip()))
    finally:
        engine("image", "umount", name)
    del found[b"."]  # in no layer: its time is that of the pull
    return found


def with_older_keys(layout: Path) -> None:
    """Call the annotations of the layers what they were called before 2023."""
    top = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs/sha256"
    text = (blobs / top["manifests"][0]["digest"][7:]).read_text()
    changed = text.replace("io.github.containers.zstd-chunked", "io.containers.zstd-chunked").encode()
    assert len(changed) < len(text)
    name = hashlib.sha256(changed).hexdigest()
    (blobs / name).write_bytes(changed)
    top["manifests"][0] |= {"digest": f"sha256:{name}", "size": len(changed)}
    (layout / "index.json").write_text(json.dumps(top))


def content(tree: dict[bytes, judge.Shown]) -> dict[bytes, tuple[object, ...]]:
    return {path: (x.mode, x.size, x.target, x.sha256, x.links) for path, x in tree.items()}


def test_podman_pulls_it_whole_and_file_by_file(tmp_path: Path) -> None:
    need_root()
    need_tool("podman", "runc", "docker-registry", "skopeo")
    image, out = source(tmp_path), tmp_path / "out"
    words = ["flatten", image, f"oci:{out}:x", "--compression", "zstd:chunked", "--json"]
    done = run_layerkit(*words)
    assert "chunked" in json.loads(done.stdout)["compressor"]
    with docker_registry(tmp_path / "registry") as registry, podman(storage=PARTIAL) as engine:
        name = engine("load", "-i", image).strip().splitlines()[-1].split(": ", 1)[1]
        want = mounted(engine, name)
        assert want[b"./d/big"].size == 256 * 40_000
        # As any zstd.
        name = engine("pull", "-q", f"oci:{out}:x").strip()
        assert judge.differences(mounted(engine, name), want) == []
        engine("rmi", "--all", "--force")
        version = engine("version", "--format", "{{.Client.Version}}").split(".")
        old = tuple(map(int, version[:2])) < (4, 5)
        if old:
            with_older_keys(out)
        ref = f"{registry.host}/chunked:1"
        copy = ["skopeo", "copy", "-q", "--dest-tls-verify=false", "--preserve-digests"]
        subprocess.run([*copy, f"oci:{out}:x", f"docker://{ref}"], check=True)
        pulled = engine.run("--log-level", "debug", "pull", "--tls-verify=false", ref)
        said = pulled.stderr.decode()
        assert pulled.returncode == 0, said
        # A later podman takes the table only with a tar-split beside it, and else reads the whole blob.
        assert "Retrieved partial blob" in said or not old, said[-3000:]
        got = mounted(engine, ref)
        # containers/storage 1.43 parses the keys "UID", "GID" and "ModTime", which not even it writes.
        assert content(got) == content(want)
        assert old or judge.differences(got, want) == []
