"""Hostile images given to the command itself: one clear error, exit code 3, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from programs import Cli
from tar_blocks import END, folder, hardlink, header, member, packed, pax, symlink

F = member(b"f", b"hello")

# A first layer that is sound, and an upper one that is not: what came before it must not stay either.
SOUND = folder(b"etc") + member(b"etc/passwd", b"root")
HOSTILE: dict[str, bytes] = {
    "climbs": member(b"../etc/passwd", b"x"),
    "a parent swapped mid-layer": folder(b"a") + member(b"a/f") + symlink(b"a", b"/etc") + member(b"a/passwd"),
    "a hard link out": hardlink(b"h", b"../../etc/shadow"),
    "a hard link to nothing": hardlink(b"h", b"nowhere"),
    "a whiteout of ..": member(b"a/.wh..."),
    "a whiteout of nothing": member(b"a/.wh."),
    "a PAX size against the header's": pax((b"size", b"9" * 18)) + F,
    "a wrong header checksum": F[:148] + b"0000000\0" + F[156:],
    "a path of 5,000 bytes": pax((b"path", b"/".join([b"x" * 99] * 50))) + F,
    "a name of 300": pax((b"path", b"n" * 300)) + F,
    "a socket": header(b"s", b"s"),
    "truncated": F[:700],
}


def layout(folder: Path, layers: list[bytes], *, form: str = "gzip") -> Path:
    """Write an OCI layout of ``layers``, whatever is in them."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    kind = "application/vnd.oci.image."
    descriptors = [put(packed(tar, form), f"{kind}layer.v1.tar+{form}") for tar in layers]
    diff_ids = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in layers]
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {"architecture": machine, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}manifest.v1+json",
        "config": put(json.dumps(config).encode(), f"{kind}config.v1+json"),
        "layers": descriptors,
    }
    entry = put(json.dumps(manifest).encode(), f"{kind}manifest.v1+json")
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return folder


def run(tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return Cli(tmp_path / "store", TMPDIR=str(tmp_path / "tmp"))(*words, code=None)


def assert_nothing_left(tmp_path: Path) -> None:
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "out").exists()
    store = tmp_path / "store"
    if store.exists():
        assert list((store / "tmp").iterdir()) == []
        assert list((store / "meta").iterdir()) == []


@pytest.mark.parametrize("name", HOSTILE)
def test_remap_refuses(name: str, tmp_path: Path) -> None:
    bad = HOSTILE[name] if name == "truncated" else HOSTILE[name] + END
    image = layout(tmp_path / "image", [SOUND + END, bad])
    for words in (("remap", image), ("remap", image, f"oci:{tmp_path / 'out'}:x", "--uid-map", "0:100000:65536")):
        done = run(tmp_path, *words)
        assert done.returncode == 3, done.stderr
        assert done.stderr.startswith("layerkit: ")
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert_nothing_left(tmp_path)


def test_a_planted_stub_is_refused_when_strict_and_harmless_otherwise(tmp_path: Path) -> None:
    planted = pax((b"SCHILY.xattr.trusted.overlay.redirect", b"/etc/shadow"),
                  (b"SCHILY.xattr.trusted.overlay.metacopy", b"")) + member(b"stub", b"x")  # fmt: skip
    image = layout(tmp_path / "image", [planted + END])
    done = run(tmp_path, "remap", image, "--uid-map", "0:100000:65536", "--strict")
    assert done.returncode == 3
    assert "trusted.overlay" in done.stderr
    assert_nothing_left(tmp_path)
    for form in ((), ("--own-meta",)):
        words = ("remap", image, "--uid-map", "0:100000:65536", *form)
        assert run(tmp_path, *words).returncode == 0
        done = run(tmp_path, *words, "--strict")
        assert done.returncode == 3, "the metadata that the run before kept is refused as well"


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_a_bomb_ends_at_the_limit(form: str, tmp_path: Path) -> None:
    bomb = header(b"zeros", b"0", 3 << 30)
    image = layout(tmp_path / "image", [bomb + bytes(64 << 20)], form=form)
    bounds = {"LAYERKIT_LIMIT_BOMB_FLOOR_BYTES": str(1 << 20), "LAYERKIT_LIMIT_COMPRESSION_RATIO": "100"}
    done = Cli(tmp_path / "none")("inspect", image, code=3, env=bounds)
    assert "LAYERKIT_LIMIT_COMPRESSION_RATIO" in done.stderr


def test_what_an_image_calls_itself_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    evil = "x\x1b[31m\x07\u202e"
    image = layout(tmp_path / "image", [member(b"a", b"x" * 3000) + END, member(b"a", b"x" * 3000, uid=1) + END])
    index = json.loads((image / "index.json").read_text())
    (entry,) = index["manifests"]
    entry["annotations"] = {"org.opencontainers.image.ref.name": evil}
    other = {
        **entry,
        "digest": f"sha256:{'0' * 64}",
        "platform": {"os": evil, "architecture": evil, "variant": evil},
    }

    def write(*entries: dict[str, object]) -> None:
        (image / "index.json").write_text(json.dumps({**index, "manifests": entries}))

    write(entry)
    source = f"oci:{image}"
    for words in (
        ("inspect", source), ("verify", source), ("analyze", source), ("remap", source, "--uid-map", "0:1:9"),
        ("optimize", source, f"oci:{tmp_path / 'small'}"), ("flatten", source, f"oci:{tmp_path / 'flat'}"),
        ("copy", source, f"oci:{tmp_path / 'same'}"), ("store", "ls"), ("store", "df"), ("store", "verify"),
        ("inspect", f"{source}:absent"), ("inspect", "store:absent"),
    ):  # fmt: skip
        done = run(tmp_path, *words)
        assert done.returncode == (1 if "absent" in words[-1] else 0), done.stderr
        assert (done.stdout + done.stderr).replace("\n", "").isprintable(), words
    write({**entry, "annotations": {}}, other)
    done = run(tmp_path, "inspect", f"oci:{image}")
    assert r"\x1b[31m" in done.stderr
    assert done.stderr.replace("\n", "").isprintable()


def test_a_whiteout_device_cannot_be_hidden(tmp_path: Path) -> None:
    image = layout(tmp_path / "image", [header(b"dev/w", b"3", major=0, minor=0) + END])
    done = run(tmp_path, "remap", image, "--uid-map", "0:100000:65536")
    assert done.returncode == 3
    assert "dev/w" in done.stderr
