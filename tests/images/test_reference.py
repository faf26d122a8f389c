"""References: how they are spelled, what a bare path turns out to be, what is said when nothing is there."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_images import below, digest, dump, simple, tar

from layerkit.images import transfer
from layerkit.images.open import open_sink, open_source
from layerkit.images.reference import Reference, parse
from layerkit.model.digest import Digest
from layerkit.model.errors import DaemonError, InvalidImage, NotFound, UsageError

SHA = "sha256:" + "0f" * 32


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("oci:dir", Reference("oci", "dir")),
        ("oci:/a/b:v1", Reference("oci", "/a/b", "v1")),
        ("oci:/a/b:host/n:v1", Reference("oci", "/a/b", "host/n:v1")),
        (f"oci:/a/b@{SHA}", Reference("oci", "/a/b", "", Digest.parse(SHA))),
        ("oci-archive:f.tar:v1", Reference("oci-archive", "f.tar", "v1")),
        ("docker-archive:f.tar:n/x:v1", Reference("docker-archive", "f.tar", "n/x:v1")),
        ("docker-archive:f.tar:@1", Reference("docker-archive", "f.tar", "@1")),
        ("docker-archive:-", Reference("docker-archive", "-")),
        ("docker-daemon:busybox:1", Reference("docker-daemon", "", "busybox:1")),
        ("docker://h:5000/n", Reference("docker", "h:5000/n")),
        ("docker://h:5000/n:v1", Reference("docker", "h:5000/n", "v1")),
        (f"docker://n@{SHA}", Reference("docker", "n", "", Digest.parse(SHA))),
        ("store:app", Reference("store", "", "app")),
        ("-", Reference("path", "-")),
        ("image.tar", Reference("path", "image.tar")),
        ("image.tar:v1", Reference("path", "image.tar:v1")),
        ("./oci:x", Reference("path", "./oci:x")),
    ],
)
def test_parse(text: str, want: Reference) -> None:
    assert parse(text) == want
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "oci:", "oci::x", "oci:a:", "oci-archive:", "docker:x", "docker://", "store:", "docker-daemon:"),
        *("dir:/x", "containers-storage:x", "oci:a@sha256:00", f"oci:a:b@{SHA}", f"docker-archive:a@{SHA}", "a\0b"),
    ],
)
def test_not_a_reference(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@given(st.text(max_size=40))
def test_parse_gives_a_value_or_a_usage_error(text: str) -> None:
    try:
        found = parse(text)
    except UsageError:
        return
    assert parse(str(found)) == found


@pytest.fixture
def places(tmp_path: Path) -> Path:
    layout = simple("one")
    layout.folder(tmp_path / "lay")
    layout.archive(tmp_path / "oci.tar")
    (tmp_path / "oci.tgz").write_bytes(
        subprocess.run(["gzip", "-c", tmp_path / "oci.tar"], capture_output=True).stdout
    )
    config = dump({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}})
    saved = [{"Config": "c.json", "RepoTags": ["app:v1"], "Layers": []}]
    (tmp_path / "docker.tar").write_bytes(tar(("c.json", config), ("manifest.json", dump(saved))))
    (tmp_path / "plain.tar").write_bytes(tar(("etc/passwd", b"x")))
    return tmp_path


def _image(text: str, **more: object) -> str:
    source = open_source(text, **more)  # type: ignore[arg-type]
    try:
        return source.image().name
    finally:
        source.close()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("oci:{}/lay", "one"),
        ("oci:{}/lay:one", "one"),
        ("{}/lay", "one"),
        ("{}/lay:one", "one"),
        ("{}/oci.tar", "one"),
        ("{}/oci.tar:one", "one"),
        ("{}/oci.tgz", "one"),
        ("oci-archive:{}/oci.tar:one", "one"),
        ("docker-archive:{}/docker.tar", "app:v1"),
        ("docker-archive:{}/docker.tar:docker.io/library/app:v1", "docker.io/library/app:v1"),
        ("{}/docker.tar", "app:v1"),
        ("{}/docker.tar:app:v1", "app:v1"),
    ],
)
def test_open(places: Path, text: str, name: str) -> None:
    before = below(places)
    assert _image(text.format(places), tmp=places) == name
    assert below(places) == before


def test_open_by_digest(places: Path) -> None:
    source = open_source(f"{places}/lay")
    wanted = str(source.image().descriptor.digest)
    source.close()
    assert _image(f"oci:{places}/lay@{wanted}") == "one"
    assert _image(f"{places}/oci.tar@{wanted}") == "one"
    with pytest.raises(NotFound, match="there are: one"):
        _image(f"oci:{places}/lay@{SHA}")


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("oci:{}/none", NotFound, "no such folder"),
        ("{}/none", NotFound, "no such file or folder; a reference is one of oci:"),
        ("oci:{}/oci.tar", InvalidImage, "a file, not an OCI layout folder; try oci-archive:"),
        ("oci-archive:{}/lay", InvalidImage, "try oci:"),
        ("oci:{}/lay:two", NotFound, "no image named 'two'; there are: one"),
        ("docker-archive:{}/docker.tar:x", NotFound, "no image named 'x'; there are: app:v1"),
        ("docker-archive:{}/docker.tar:@1", NotFound, "there are: app:v1"),
        ("docker-archive:{}/oci.tar", InvalidImage, "no docker archive"),
        ("oci-archive:{}/docker.tar", InvalidImage, "no OCI image layout: it has no file 'oci-layout'"),
        ("{}/plain.tar", InvalidImage, "a tar, but no image"),
        ("{}", InvalidImage, "no OCI image layout"),
        ("docker://x/Y:v1", UsageError, "want lower-case letters"),
        ("store:x", UsageError, "store: is not a file"),
        ("oci:-", UsageError, "use oci-archive:-"),
    ],
)
def test_open_says_what_is_wrong(places: Path, text: str, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        _image(text.format(places))


def test_no_docker_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    for use in (open_source, open_sink):
        with pytest.raises(DaemonError, match=r"start dockerd or set DOCKER_HOST"):
            use("docker-daemon:x")


def test_standard_input(places: Path) -> None:
    before = below(places)
    for name in ("oci.tar", "oci.tgz"):
        assert _image("-", stdin=io.BytesIO((places / name).read_bytes()), tmp=places) == "one"
    assert (
        _image("docker-archive:-", stdin=io.BytesIO((places / "docker.tar").read_bytes()), tmp=places) == "app:v1"
    )
    assert below(places) == before


def test_pipes_between_processes(places: Path) -> None:
    code = (
        "from layerkit.images import transfer; from layerkit.images.open import open_sink, open_source\n"
        "s = open_source('-'); k = open_sink('-'); i = s.image(); transfer.copy_image(s, k, i, i.name); k.commit()"
    )
    with (places / "oci.tar").open("rb") as data:
        out = subprocess.run([sys.executable, "-c", code], stdin=data, capture_output=True, check=True).stdout
    (places / "copy.tar").write_bytes(out)
    assert _image(f"{places}/copy.tar") == "one"


def test_a_named_pipe_is_spooled(places: Path) -> None:
    os.mkfifo(places / "pipe")
    with subprocess.Popen(["sh", "-c", f"cat {places}/oci.tar > {places}/pipe"]):
        assert _image(f"oci-archive:{places}/pipe", tmp=places) == "one"


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("{}/new", "folder"),
        ("{}/lay:again", None),
        ("{}/new.tar", "file"),
        ("{}/oci.tar", "file"),
        ("oci:{}/new.tar", "folder"),
        ("oci-archive:{}/new", "file"),
        ("docker-archive:{}/new", "file"),
    ],
)
def test_kind_of_a_target(places: Path, target: str, kind: str | None) -> None:
    ref = parse(target.format(places))
    if kind is None:  # a bare target has no tag; it would be a folder called "lay:again"
        ref = parse(f"oci:{places}/lay:again")
    source, sink = open_source(f"{places}/lay:one"), open_sink(ref)
    transfer.copy_image(source, sink, source.image(), ref.name)
    sink.commit()
    source.close()
    path = Path(ref.path)
    assert path.is_dir() if kind != "file" else path.is_file()


@pytest.mark.parametrize(
    ("target", "error", "why"),
    [
        ("oci:{}/none/x", NotFound, "does not exist"),
        ("oci-archive:{}/none/x", NotFound, "does not exist"),
        ("oci-archive:{}/lay", UsageError, "use oci:"),
        ("oci:{}/oci.tar", UsageError, "use oci-archive:"),
        ("oci:{}", UsageError, "no OCI layout; choose an empty or a new folder"),
        ("oci:-", UsageError, "use oci-archive:-"),
        (f"oci:{{}}/x@{SHA}", UsageError, "cannot be chosen"),
        ("docker://x/y:+", UsageError, "want up to 128"),
        ("docker-daemon:UPPER", UsageError, "lower case"),
        ("store:x", UsageError, "store:"),
    ],
)
def test_what_cannot_be_a_target(places: Path, target: str, error: type[Exception], why: str) -> None:
    before = below(places)
    with pytest.raises(error, match=why):
        open_sink(target.format(places))
    assert below(places) == before


def test_a_socket_is_no_image(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises((InvalidImage, NotFound)):
            open_source(f"oci-archive:{tmp_path}/s")


def test_digest_helper_agrees() -> None:
    assert digest(b"x") == str(Digest.of(b"x"))
