"""Indexes as artifacts, tables of contents as indexes, statements and keys: formats without a registry."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import struct
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from made_images import Layout, special, tar
from needs import need_tool

from layerkit.formats import secretbox
from layerkit.formats.index import file as index_file
from layerkit.formats.index import toc
from layerkit.formats.index.check import check_index, is_unproven, mark_unproven
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import index_artifact, intoto
from layerkit.formats.tar.reader import read_tar
from layerkit.images.signing_keys import FileSigner, verifier
from layerkit.model.descriptor import Descriptor
from layerkit.model.digest import Digest
from layerkit.model.entry import Entry, Kind
from layerkit.model.errors import DigestMismatch, InvalidImage, UnsafeEntry, UsageError
from layerkit.model.index import Index
from layerkit.model.limits import DEFAULT
from layerkit.store.unproven import UnprovenIndexes

DIFF_ID = Digest.of(b"layer")


def files(*names: str, size: int = 5000) -> Index:
    """The index of a layer with files of content of their own."""
    return read_tar(tar(*((name, hashlib.sha256(name.encode()).digest() * (size // 32)) for name in names)))


def encoded(index: Index, below: Sequence[Index] = ()) -> bytes:
    return index_artifact.encode(index, below)[1]


def same(a: Index, b: Index) -> bool:
    return list(a.entries()) == list(b.entries()) and a.diff_id == b.diff_id


# Index artifacts


def test_an_index_there_and_back() -> None:
    index = files("a", "b/c", "b/d")
    descriptor, data = index_artifact.encode(index)
    assert descriptor.digest == Digest.of(data) and descriptor.size == len(data)
    assert index_artifact.encode(index)[1] == data
    back = index_artifact.decode(data, index.diff_id, "x", origin="a test")
    assert same(index, back)
    assert is_unproven(back) and not is_unproven(index)
    with pytest.raises(ValueError, match="unproven"):
        index_artifact.encode(back)


def test_a_layer_that_repeats_others_costs_little() -> None:
    names = [f"dir/file{i}" for i in range(500)]
    below = [files(*names[:250]), files(*names[250:])]
    chowned = replace(files(*names), uid=np.full(500, 7, np.uint32))
    alone, (descriptor, data) = encoded(chowned), index_artifact.encode(chowned, below)
    assert len(data) < len(alone) / 2
    assert index_artifact.needs(descriptor, "x") == [each.diff_id for each in below]
    assert same(index_artifact.decode(data, chowned.diff_id, "x", origin="t", below=below), chowned)
    with pytest.raises(InvalidImage):
        index_artifact.decode(data, chowned.diff_id, "x", origin="t")
    with pytest.raises(InvalidImage):
        index_artifact.decode(data, chowned.diff_id, "x", origin="t", below=[files("z"), files("y")])
    # A layer with contents of its own stands alone, and is shared whatever lies below it.
    other = files(*(f"other{i}" for i in range(500)))
    assert index_artifact.encode(other, below) == index_artifact.encode(other)


def test_damaged_and_foreign_indexes() -> None:
    index = files("a")
    data = encoded(index)
    with pytest.raises(InvalidImage, match="announced"):
        index_artifact.decode(data, DIFF_ID, "x", origin="t")
    for at in range(0, len(data), 7):
        broken = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        with pytest.raises(InvalidImage):
            index_artifact.decode(broken, index.diff_id, "x", origin="t")
    for bad in (b"", data[:-1], data[:20], b"\0" * 100):
        with pytest.raises(InvalidImage):
            index_artifact.decode(bad, index.diff_id, "x", origin="t")


def test_an_index_that_is_a_bomb() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(80 << 20))
    with pytest.raises(InvalidImage, match="claim to be an index"):
        index_artifact.decode(bomb, DIFF_ID, "x", origin="t")
    unsized = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    with pytest.raises(InvalidImage, match="claim to be an index"):
        index_artifact.decode(unsized.compress(b"x") + unsized.flush(), DIFF_ID, "x", origin="t")


def _hostile(change: Callable[[dict[str, Any]], None]) -> Index:
    index = read_tar(
        tar(
            special("d", tarfile.DIRTYPE), ("d/f", b"content"), special("d/s", tarfile.SYMTYPE, "f"),
            special("h", tarfile.LNKTYPE, "d/f"), special("z", tarfile.CHRTYPE, devmajor=1, devminor=3),
        )
    )  # fmt: skip
    columns: dict[str, Any] = {
        name: np.array(getattr(index, name)) for name in
        ("kind", "size", "offset", "sha256", "link", "major", "sparse", "uid")
    }  # fmt: skip
    columns |= {"path": index.path.tolist(), "links": index.links.tolist(), "xattr_sets": index.xattr_sets}
    change(columns)
    from layerkit.model.strings import Strings

    columns["path"], columns["links"] = Strings.of(columns["path"]), Strings.of(columns["links"])
    return replace(index, **columns)


def _set(name: str, row: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name][row] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("path", 1, b"../etc/passwd"),
        _set("path", 1, b"/etc"),
        _set("path", 1, b"d//f"),
        _set("path", 1, b"d/.wh.f"),
        _set("path", 1, b"d/f\0"),
        _set("path", 1, b"zz"),
        _set("path", 1, b"d"),
        _set("path", 1, b""),
        _set("path", 1, b"d/" + b"x" * 300),
        _set("links", 1, b"../../x"),
        _set("links", 1, b"h"),
        _set("links", 0, b""),
        _set("size", 0, 5),
        _set("size", 1, 1 << 50),
        _set("offset", 1, 1 << 40),
        _set("offset", 0, 512),
        _set("sha256", 0, 1),
        _set("link", 1, 0),
        _set("link", 2, -1),
        _set("major", 1, 8),
        lambda c: c.update(xattr_sets=((), ((b"", b"x"),))),
        lambda c: c.update(xattr_sets=((), ((b"b", b""), (b"a", b"")))),
        lambda c: c.update(xattr_sets=((), ((b"user." + b"x" * 300, b""),))),
        lambda c: c.update(xattr_sets=((), ((b"user.x", b"x" * 70000),))),
    ],
)
def test_hostile_indexes(change: Callable[[dict[str, Any]], None]) -> None:
    check_index(_hostile(lambda _: None), "x", DEFAULT)
    index = _hostile(change)
    with pytest.raises(InvalidImage):
        check_index(index, "x", DEFAULT)
    data = zstandard.ZstdCompressor().compress(b"".join(index_file.encode(index)))
    with pytest.raises(InvalidImage):
        index_artifact.decode(data, index.diff_id, "x", origin="t")


def test_manifests_of_index_artifacts() -> None:
    layout = Layout()
    layout.list(layout.image(tar(("a", b"a"))))
    blob, _ = index_artifact.encode(files("a"))
    subject = Descriptor(oci.MANIFEST, DIFF_ID, 5)

    def manifest(**more: Any) -> bytes:
        settings: dict[str, Any] = {
            "artifact_type": index_artifact.ARTIFACT_TYPE, "subject": subject,
            "annotations": {index_artifact.VERSION_KEY: str(index_file.VERSION)}, "layers": [blob],
        } | more  # fmt: skip
        layers = settings.pop("layers")
        return oci.manifest_json(oci.EMPTY_DESCRIPTOR, layers, **settings)

    parsed = index_artifact.parse(manifest(), "x")
    assert parsed is not None and list(parsed.blobs.values()) == [blob]
    assert index_artifact.parse(manifest(annotations={index_artifact.VERSION_KEY: "99"}), "x") is None
    for bad in (
        manifest(subject=None),
        manifest(artifact_type="other"),
        manifest(layers=[replace(blob, media_type="x")]),
        manifest(layers=[replace(blob, annotations={})]),
    ):
        with pytest.raises(InvalidImage):
            index_artifact.parse(bad, "x")


def test_the_cache_of_unproven_indexes(tmp_path: Path) -> None:
    cache = UnprovenIndexes(tmp_path)
    index = mark_unproven(files("a"), "a test")
    assert cache.load(index.diff_id) is None
    cache.save(index)
    kept = cache.load(index.diff_id)
    assert kept is not None and same(kept, index) and is_unproven(kept)
    (file,) = (tmp_path / "unproven-indexes").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert cache.load(index.diff_id) is None
    with pytest.raises(AssertionError):
        cache.save(files("a"))


# Tables of contents


def estargz(
    *members: tuple[tarfile.TarInfo, bytes], entries: list[dict[str, Any]] | None = None
) -> tuple[bytes, str]:
    """An eStargz blob as docs/estargz.md describes it, and the digest of its table: for tests, made by hand."""
    blob, listed = b"", []
    kinds = {
        tarfile.REGTYPE: "reg", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink", tarfile.LNKTYPE: "hardlink",
        tarfile.CHRTYPE: "char", tarfile.FIFOTYPE: "fifo",
    }  # fmt: skip
    for info, data in members:
        info.size = len(data)
        head = info.tobuf(tarfile.PAX_FORMAT)
        entry: dict[str, Any] = {
            "name": info.name, "type": kinds[info.type], "mode": info.mode, "uid": info.uid, "gid": info.gid,
            "modtime": "1970-01-01T00:00:00Z" if not info.mtime else "2024-02-29T12:34:56Z", "NumLink": 0,
        }  # fmt: skip
        xattrs = {
            k.removeprefix("SCHILY.xattr."): v for k, v in info.pax_headers.items() if k.startswith("SCHILY.xattr.")
        }
        if xattrs:
            entry["xattrs"] = {k: base64.b64encode(v.encode()).decode() for k, v in xattrs.items()}
        if info.linkname:
            entry["linkName"] = info.linkname
        if info.type == tarfile.CHRTYPE:
            entry |= {"devMajor": info.devmajor, "devMinor": info.devminor}
        blob += gzip.compress(head, mtime=0)
        if data:
            digest = "sha256:" + hashlib.sha256(data).hexdigest()
            entry |= {"size": len(data), "offset": len(blob), "digest": digest, "chunkDigest": digest}
            blob += gzip.compress(data + bytes(-len(data) % 512), mtime=0)
        listed.append(entry)
    document = json.dumps({"version": 1, "entries": listed if entries is None else entries}).encode()
    info = tarfile.TarInfo("stargz.index.json")
    info.size = len(document)
    start = len(blob)
    blob += gzip.compress(info.tobuf() + document + bytes(-len(document) % 512) + bytes(1024), mtime=0)
    extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % start
    footer = b"\x1f\x8b\x08\x04" + bytes(4) + b"\0\xff" + struct.pack("<H", len(extra)) + extra
    footer += b"\x01\0\0\xff\xff" + bytes(8)
    assert len(footer) == 51
    return blob + footer, "sha256:" + hashlib.sha256(document).hexdigest()


def _member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


MEMBERS: tuple[tuple[str, bytes, dict[str, Any]], ...] = (
    ("bin/", b"", {"type": tarfile.DIRTYPE, "mode": 0o2755, "uid": 3}),
    ("bin/tool", os.urandom(3000), {"mode": 0o4755, "uid": 1000, "gid": 7, "mtime": 1709210096}),
    ("bin/link", b"", {"type": tarfile.SYMTYPE, "linkname": "tool", "mode": 0o777}),
    ("bin/hard", b"", {"type": tarfile.LNKTYPE, "linkname": "bin/tool"}),
    ("empty", b"", {"pax_headers": {"SCHILY.xattr.user.x": "wert"}}),
    ("dev", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
    ("pipe", b"", {"type": tarfile.FIFOTYPE}),
    ("gone/.wh.file", b"", {}),
    ("gone/.wh..wh..opq", b"", {}),
)


def _members() -> list[tuple[tarfile.TarInfo, bytes]]:
    return [_member(name, data, **fields) for name, data, fields in MEMBERS]


def _read(blob: bytes, digest: str) -> Index:
    layer = Descriptor(oci.LAYER_GZIP, Digest.of(blob), len(blob), annotations={toc.ESTARGZ_DIGEST: digest})
    place = toc.locate(layer)
    assert place is not None
    return toc.read(lambda start, length: blob[start : start + length], place, layer, DIFF_ID)


def test_estargz() -> None:
    """The table gives what reading the whole layer gives, places in the tar aside."""
    blob, digest = estargz(*_members())
    index = _read(blob, digest)
    with gzip.open(io.BytesIO(blob)) as whole:
        read = read_tar(whole.read())

    def plain(entry: Entry) -> Entry:
        # A hard link's attributes are those of its first name.
        kept = entry._replace(offset=-1)
        return kept._replace(perm=0, uid=0, gid=0, mtime=0) if entry.kind == Kind.HARDLINK else kept

    marks = {Kind.WHITEOUT, Kind.OPAQUE}
    assert [plain(e) for e in index.entries() if e.kind not in marks] == [
        plain(e) for e in read.entries() if e.kind not in marks
    ]
    assert [(e.path, e.kind) for e in index.entries()] == [(e.path, e.kind) for e in read.entries()]
    assert any("eStargz".lower() in text for text in index.warnings) and is_unproven(index)


def test_estargz_reads_little() -> None:
    blob, digest = estargz(*_members(), *[_member(f"big{i}", os.urandom(100_000)) for i in range(20)])
    asked: list[int] = []
    layer = Descriptor(oci.LAYER_GZIP, Digest.of(blob), len(blob), annotations={toc.ESTARGZ_DIGEST: digest})
    place = toc.locate(layer)
    assert place is not None
    toc.read(lambda s, n: asked.append(n) or blob[s : s + n], place, layer, DIFF_ID)  # type: ignore[func-returns-value]
    assert len(asked) == 2 and sum(asked) < len(blob) / 200


def test_tables_that_are_not_what_the_descriptor_names() -> None:
    blob, digest = estargz(*_members())
    with pytest.raises(DigestMismatch):
        _read(blob, f"sha256:{'0' * 64}")
    for bad in (blob[:-1], blob[:-51] + bytes(51), blob[-51:], b"short"):
        with pytest.raises(InvalidImage):
            _read(bad, digest)
    far = blob[:-51] + blob[-51:].replace(blob[-35:-19], b"ffffffffffffffff")
    with pytest.raises(InvalidImage, match="said to be"):
        _read(far, digest)


_ENTRY = {"name": "f", "type": "reg", "size": 5, "digest": f"sha256:{'a' * 64}", "mode": 420}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"name": "../x"},
            {"name": ""},
            {"name": None},
            {"name": "a\ufffdb"},
            {"name": "a\0b"},
            {"name": "x" * 300},
        ),
        *({"type": "door"}, {"type": None}, {"type": "hardlink", "linkName": "../x"}, {"type": "symlink"}),
        *({"size": -1}, {"size": "5"}, {"size": 1 << 63}, {"size": 1.5}, {"digest": ""}, {"digest": "md5:00"}),
        *(
            {"uid": -1},
            {"uid": 1 << 32},
            {"mode": "0755"},
            {"modtime": "yesterday"},
            {"modtime": "2024-13-01T00:00:00Z"},
        ),
        *({"xattrs": {"user.x": "%"}}, {"xattrs": []}, {"xattrs": {"": ""}}, {"type": "char", "devMajor": -2}),
    ],
)
def test_hostile_tables(change: dict[str, Any]) -> None:
    blob, digest = estargz(entries=[{**_ENTRY, **change}])
    with pytest.raises((InvalidImage, UnsafeEntry)):
        _read(blob, digest)


def test_a_table_with_ten_thousand_folders_in_one_name() -> None:
    blob, digest = estargz(entries=[{**_ENTRY, "name": "a/" * 10_000 + "f"}])
    with pytest.raises(InvalidImage):
        _read(blob, digest)


@pytest.mark.parametrize("position", ["0:10:10:1", "5:99999999:10:1", "1:2:3:4", "x", "-1:5:5:1"])
def test_zstd_chunked_positions(position: str) -> None:
    names = "io.github.containers.zstd-chunked."
    annotations = {f"{names}manifest-position": position, f"{names}manifest-checksum": f"sha256:{'0' * 64}"}
    layer = Descriptor(oci.LAYER_ZSTD, DIFF_ID, 1000, annotations=annotations)
    place = toc.locate(layer)
    if place is not None:
        with pytest.raises(InvalidImage):
            toc.read(lambda _s, n: bytes(n), place, layer, DIFF_ID)


def test_layers_without_a_table() -> None:
    assert toc.locate(Descriptor(oci.LAYER_GZIP, DIFF_ID, 5)) is None
    assert toc.locate(Descriptor(oci.LAYER_GZIP, DIFF_ID, 5, annotations={toc.ESTARGZ_DIGEST: "x"})) is None


# Statements and keys


def test_secretbox_against_libsodium() -> None:
    nacl = pytest.importorskip("nacl.secret")
    key = os.urandom(32)
    for size in (0, 1, 31, 32, 33, 64, 500):
        text = os.urandom(size)
        box = nacl.SecretBox(key).encrypt(text)
        assert secretbox.open_box(box.ciphertext, box.nonce, key) == text
        with pytest.raises(ValueError, match="wrong key"):
            secretbox.open_box(box.ciphertext, box.nonce, bytes(32))


def _openssl(folder: Path, algorithm: str = "EC", password: str = "") -> tuple[Path, Path]:
    need_tool("openssl")
    private, public = folder / f"{algorithm}.pem", folder / f"{algorithm}.pub"
    curve = ["-pkeyopt", "ec_paramgen_curve:P-256"] if algorithm == "EC" else []
    cipher = ["-aes256", "-pass", f"pass:{password}"] if password else []
    given = ["-passin", f"pass:{password}"] if password else []
    for command in (
        ["openssl", "genpkey", "-algorithm", algorithm, *curve, *cipher, "-out", str(private)],
        ["openssl", "pkey", "-in", str(private), *given, "-pubout", "-out", str(public)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    return private, public


@pytest.mark.parametrize(("algorithm", "password"), [("EC", ""), ("EC", "geheim"), ("ED25519", "")])
def test_keys_of_openssl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, password: str) -> None:
    private, public = _openssl(tmp_path, algorithm, password)
    if password:
        with pytest.raises(UsageError, match="LAYERKIT_KEY_PASSWORD"):
            FileSigner(private)
        monkeypatch.setenv("LAYERKIT_KEY_PASSWORD", "falsch")
        with pytest.raises(UsageError, match="wrong password"):
            FileSigner(private)
        monkeypatch.setenv("LAYERKIT_KEY_PASSWORD", password)
    signature = FileSigner(private).sign(b"data")
    verify = verifier(public)
    assert verify(b"data", signature)
    assert not verify(b"datb", signature) and not verify(b"data", signature[:-1]) and not verify(b"data", b"")


def test_keys_of_cosign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key file as `cosign generate-key-pair` writes it, sealed here by libsodium."""
    nacl = pytest.importorskip("nacl.secret")
    private, public = _openssl(tmp_path)
    der = subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-nocrypt", "-in", private, "-outform", "DER"],
        check=True,
        capture_output=True,
    ).stdout
    salt = os.urandom(32)
    key = hashlib.scrypt(b"geheim", salt=salt, n=32768, r=8, p=1, maxmem=64 << 20, dklen=32)
    box = nacl.SecretBox(key).encrypt(der)

    def b64(data: bytes) -> str:
        return base64.b64encode(data).decode()

    document = {
        "kdf": {"name": "scrypt", "params": {"N": 32768, "r": 8, "p": 1}, "salt": b64(salt)},
        "cipher": {"name": "nacl/secretbox", "nonce": b64(box.nonce)}, "ciphertext": b64(box.ciphertext),
    }  # fmt: skip
    lines = b64(json.dumps(document).encode())
    body = "\n".join(lines[i : i + 64] for i in range(0, len(lines), 64))
    name = "ENCRYPTED SIGSTORE PRIVATE KEY"
    file = tmp_path / "cosign.key"
    file.write_text(f"-----BEGIN {name}-----\n{body}\n-----END {name}-----\n")
    monkeypatch.setenv("COSIGN_PASSWORD", "geheim")
    assert verifier(public)(b"x", FileSigner(file).sign(b"x"))
    monkeypatch.setenv("COSIGN_PASSWORD", "falsch")
    with pytest.raises(UsageError, match="wrong password"):
        FileSigner(file)


@pytest.mark.parametrize(
    "text", ["", "no key", "-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAAAA\n-----END X-----\n"]
)
def test_no_keys(tmp_path: Path, text: str) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    for load in (FileSigner, verifier):
        with pytest.raises(UsageError):
            load(file)
    with pytest.raises(UsageError, match="No such file"):
        FileSigner(tmp_path / "none")


def test_bundles(tmp_path: Path) -> None:
    private, public = _openssl(tmp_path)
    payload = b'{"_type":"x"}'
    data = intoto.bundle(payload, FileSigner(private))
    verify = verifier(public)
    assert intoto.open_bundle(data, verify, "x") == payload
    document = json.loads(data)
    other = base64.b64encode(b'{"_type":"y"}').decode()
    changes: list[dict[str, Any]] = [
        {"payload": other}, {"payloadType": "text/plain"}, {"signatures": []}, {"signatures": [{"sig": "%"}]},
        {"signatures": None}, {"payload": None},
    ]  # fmt: skip
    for change in changes:
        broken = {**document, "dsseEnvelope": {**document["dsseEnvelope"], **change}}
        with pytest.raises(InvalidImage):
            intoto.open_bundle(json.dumps(broken).encode(), verify, "x")


def test_what_dsse_signs() -> None:
    """The example of DSSE's protocol.md, and lengths in bytes rather than characters."""
    want = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert intoto.pre_authentication("http://example.com/HelloWorld", b"hello world") == want
    assert intoto.pre_authentication("ü", "é".encode()) == "DSSEv1 2 ü 2 é".encode()


@pytest.mark.parametrize("algorithm", ["EC", "ED25519"])
def test_bundles_are_what_others_read(tmp_path: Path, algorithm: str) -> None:
    """The envelope verifies in secure-systems-lab's library, and theirs here; the bundle is sigstore's v0.3."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import CryptoSigner, SSlibKey

    private, public = _openssl(tmp_path, algorithm)
    payload = b'{"_type":"https://in-toto.io/Statement/v1"}'
    document = json.loads(intoto.bundle(payload, FileSigner(private)))
    key = load_pem_public_key(public.read_bytes())
    theirs = SSlibKey.from_crypto(key)
    envelope = document["dsseEnvelope"]
    named = {**envelope, "signatures": [{**envelope["signatures"][0], "keyid": theirs.keyid}]}
    assert list(Envelope.from_dict(deepcopy(named)).verify([theirs], 1)) == [theirs.keyid]
    forged = {**named, "payload": base64.b64encode(b"{}").decode()}
    with pytest.raises(VerificationError):
        Envelope.from_dict(deepcopy(forged)).verify([theirs], 1)
    # The other way round.
    made = Envelope(payload, intoto.STATEMENT, {})
    made.sign(CryptoSigner(load_pem_private_key(private.read_bytes(), None)))
    wrapped = {**document, "dsseEnvelope": made.to_dict()}
    assert intoto.open_bundle(json.dumps(wrapped).encode(), verifier(public), "x") == payload
    # sigstore's protobuf-specs: one signature, a key by its hint and no certificate, nothing of a log.
    assert document["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    der = subprocess.run(["openssl", "pkey", "-pubin", "-in", public, "-outform", "DER"], check=True,
                         capture_output=True).stdout  # fmt: skip
    hint = base64.b64encode(hashlib.sha256(der).digest()).decode()
    assert document["verificationMaterial"] == {"publicKey": {"hint": hint}}
    assert len(envelope["signatures"]) == 1 and envelope["payloadType"] == "application/vnd.in-toto+json"
    assert document.keys() == {"mediaType", "verificationMaterial", "dsseEnvelope"}


def test_attestations_are_found_as_cosign_looks_for_them(tmp_path: Path) -> None:
    """A referrer with the bundle's media type as its artifactType and layer, and what is in it in annotations."""
    private, _ = _openssl(tmp_path)
    subject = Descriptor(oci.MANIFEST, Digest.of(b"s"), 1, artifact_type="application/vnd.layerkit.remap.v1")
    said = intoto.attestation(b"{}", subject, FileSigner(private))
    manifest = json.loads(said.manifest)
    bundle = "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert manifest["artifactType"] == bundle and manifest["subject"]["digest"] == str(subject.digest)
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert [each["mediaType"] for each in manifest["layers"]] == [bundle]
    assert manifest["annotations"] == {
        "dev.sigstore.bundle.content": "dsse-envelope",
        "dev.sigstore.bundle.predicateType": "https://slsa.dev/provenance/v1",
    }
