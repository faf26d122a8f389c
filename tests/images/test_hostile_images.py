"""Images that lie: each ends with exit code 3, and nothing is left behind."""

from __future__ import annotations

import gc
import gzip
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_images import CONFIG, INDEX, LAYER, MANIFEST, Layout, below, dump, simple, special, tar
from work import counted

from layerkit.formats.oci import documents as oci
from layerkit.images import transfer
from layerkit.images.oci.layout_sink import LayoutSink
from layerkit.images.open import open_source
from layerkit.model.errors import LayerkitError, UnsafeEntry

SHA = "sha256:" + "ab" * 32


def _use(text: str, target: Path) -> None:
    """Do with an image what a user does: choose it, read it whole, and write it somewhere."""
    source = open_source(text, tmp=target.parent)
    try:
        image = source.image()
        with LayoutSink(str(target)) as sink:
            transfer.copy_image(source, sink, image, "copy")
            sink.commit()
    finally:
        source.close()


def _refused(text: str, tmp_path: Path, why: str) -> LayerkitError:
    gc.collect()  # files that other tests dropped must not close in between
    before, open_files = below(tmp_path), len(os.listdir("/proc/self/fd"))
    with counted() as count, pytest.raises(LayerkitError, match=why) as caught:
        _use(text, tmp_path / "target")
    assert count[0] < 10_000_000, "what is wrong is seen before the rest is worked on"
    assert caught.value.exit_code == 3
    assert below(tmp_path) == before
    assert len(os.listdir("/proc/self/fd")) == open_files
    return caught.value


# -- layouts, as folder and as archive ------------------------------------------------------------------


def _manifest(layout: Layout) -> dict[str, Any]:
    return dict(json.loads(layout.blobs[layout.index["manifests"][0]["digest"]]))


def _rewrite(layout: Layout, **changes: Any) -> None:
    """Replace members of the only image's manifest, and announce the new one truly."""
    layout.index["manifests"] = [layout.put(dump(_manifest(layout) | changes), MANIFEST)]


def wrong_manifest_digest(layout: Layout) -> None:
    layout.blobs[SHA] = layout.blobs[layout.index["manifests"][0]["digest"]]
    layout.index["manifests"][0]["digest"] = SHA


def wrong_config_digest(layout: Layout) -> None:
    name = _manifest(layout)["config"]["digest"]
    layout.blobs[name] = layout.blobs[name].replace(b"amd64", b"arm64")


def wrong_layer_digest(layout: Layout) -> None:
    name = _manifest(layout)["layers"][0]["digest"]
    layout.blobs[name] = layout.blobs[name][:-1] + b"x"


def size_too_large(layout: Layout) -> None:
    layers = _manifest(layout)["layers"]
    _rewrite(layout, layers=[layers[0] | {"size": layers[0]["size"] + 1}, layers[1]])


def size_too_small(layout: Layout) -> None:
    layers = _manifest(layout)["layers"]
    _rewrite(layout, layers=[layers[0] | {"size": 1}, layers[1]])


def manifest_size_lie(layout: Layout) -> None:
    layout.index["manifests"][0]["size"] -= 1


def negative_size(layout: Layout) -> None:
    _rewrite(layout, config=_manifest(layout)["config"] | {"size": -1})


def negative_manifest_size(layout: Layout) -> None:
    layout.index["manifests"][0]["size"] = -1


def monstrous_layer(layout: Layout) -> None:
    layers = _manifest(layout)["layers"]
    _rewrite(layout, layers=[layers[0] | {"size": 1 << 62}, layers[1]])


def monstrous_manifest(layout: Layout) -> None:
    layout.index["manifests"][0]["size"] = 1 << 40


def huge_config(layout: Layout) -> None:
    data = dump({"os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}) + b" " * (33 << 20)
    _rewrite(layout, config=layout.put(data, CONFIG), layers=[])


def deep_index(layout: Layout) -> None:
    layout.index_bytes = b'{"schemaVersion":2,"manifests":' + b"[" * 1_000_000


def deep_manifest(layout: Layout) -> None:
    layout.index["manifests"] = [layout.put(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, MANIFEST)]


def deep_config(layout: Layout) -> None:
    _rewrite(layout, config=layout.put(b"[" * 5_000_000, CONFIG))


def duplicate_keys_in_index(layout: Layout) -> None:
    layout.index_bytes = dump(layout.index)[:-1] + b', "manifests": []}'


def duplicate_keys_in_manifest(layout: Layout) -> None:
    data = dump(_manifest(layout))[:-1] + b', "layers": []}'
    layout.index["manifests"] = [layout.put(data, MANIFEST)]


def duplicate_keys_in_descriptor(layout: Layout) -> None:
    data = dump(_manifest(layout)).replace(b'"size":', b'"size": 1, "size":', 1)
    layout.index["manifests"] = [layout.put(data, MANIFEST)]


def key_in_another_case(layout: Layout) -> None:
    _rewrite(layout, Layers=[])


def manifest_that_is_also_an_index(layout: Layout) -> None:
    _rewrite(layout, manifests=[])


def index_pointing_at_itself(layout: Layout) -> None:
    # No sha256 can be in its own preimage, so the blob's digest is a lie; it must not matter which is found first.
    entry = {"mediaType": INDEX, "digest": SHA, "size": 0}
    while entry["size"] != len(data := dump({"schemaVersion": 2, "manifests": [entry]})):
        entry["size"] = len(data)
    layout.blobs[SHA] = data
    layout.index["manifests"] = [entry]


def a_million_manifests(layout: Layout) -> None:
    layout.index_bytes = b'{"schemaVersion":2,"manifests":[' + b"{}," * 999_999 + b"{}]}"


def a_million_whole_manifests(layout: Layout) -> None:
    entry = dump({"mediaType": MANIFEST, "digest": SHA, "size": 1})
    layout.index_bytes = b'{"schemaVersion":2,"manifests":[' + b",".join([entry] * 1_000_000) + b"]}"


def indexes_nested_too_deep(layout: Layout) -> None:
    for _ in range(9):
        inner = layout.index["manifests"][0]
        layout.index["manifests"] = [layout.put(dump({"schemaVersion": 2, "manifests": [inner]}), INDEX)]


def too_many_layers(layout: Layout) -> None:
    _rewrite(layout, layers=_manifest(layout)["layers"] * 300)


def diff_ids_fewer_than_layers(layout: Layout) -> None:
    _rewrite(layout, layers=_manifest(layout)["layers"] * 2)


def diff_id_of_no_form(layout: Layout) -> None:
    config = {"os": "linux", "rootfs": {"type": "layers", "diff_ids": ["sha256:../../etc/passwd", SHA]}}
    _rewrite(layout, config=layout.put(dump(config), CONFIG))


def digest_that_climbs(layout: Layout) -> None:
    layout.index["manifests"][0]["digest"] = "sha256:../../../../etc/passwd"


def missing_manifest(layout: Layout) -> None:
    del layout.blobs[layout.index["manifests"][0]["digest"]]


def missing_config(layout: Layout) -> None:
    del layout.blobs[_manifest(layout)["config"]["digest"]]


def missing_layer(layout: Layout) -> None:
    del layout.blobs[_manifest(layout)["layers"][1]["digest"]]


def missing_foreign_layer(layout: Layout) -> None:
    foreign = {"mediaType": LAYER.replace("v1.tar", "nondistributable.v1.tar"), "digest": SHA, "size": 3}
    _rewrite(layout, layers=[foreign | {"urls": ["https://example.com/x"]}, _manifest(layout)["layers"][1]])


def schema_1(layout: Layout) -> None:
    layout.index["manifests"] = [layout.put(b'{"schemaVersion": 1, "fsLayers": []}', MANIFEST)]


def not_json(layout: Layout) -> None:
    layout.index_bytes = os.urandom(1000)


def layout_of_another_version(layout: Layout) -> None:
    layout.layout_bytes = b'{"imageLayoutVersion": "9"}'


LAYOUTS: dict[Callable[[Layout], None], str] = {
    wrong_manifest_digest: "manifest sha256:abab.*got sha256:",
    wrong_config_digest: "config sha256:.*got sha256:",
    wrong_layer_digest: "blob sha256:.*got sha256:",
    size_too_large: "got .* bytes, want",
    size_too_small: "got .* bytes, want 1 bytes",
    manifest_size_lie: "got .* bytes, want",
    negative_size: "config.size: ",
    negative_manifest_size: r"index.json: manifests\[0\].size: ",
    monstrous_layer: "layer_blob_bytes",
    monstrous_manifest: "manifest_bytes",
    huge_config: "config_bytes",
    deep_index: "index.json: .*json_depth",
    deep_manifest: "manifest .*json_depth",
    deep_config: "config .*json_depth",
    duplicate_keys_in_index: "index.json: the name 'manifests' occurs twice",
    duplicate_keys_in_manifest: "manifest .*'layers' occurs twice",
    duplicate_keys_in_descriptor: "manifest .*'size' occurs twice",
    key_in_another_case: "'Layers' does not belong",
    manifest_that_is_also_an_index: "'manifests' does not belong in a manifest",
    index_pointing_at_itself: "got sha256:.*, want sha256:abab",
    a_million_manifests: "1000000 is above the limit of 10000 .manifests_per_index",
    a_million_whole_manifests: "manifest_bytes",
    indexes_nested_too_deep: "index_depth",
    too_many_layers: "layers_per_image",
    diff_ids_fewer_than_layers: "4 layers, but its config .* lists 2 rootfs.diff_ids",
    diff_id_of_no_form: r"rootfs.diff_ids\[0\]: not a digest",
    digest_that_climbs: "digest: not a digest",
    missing_manifest: "blob .* is missing",
    missing_config: "blob .* is missing",
    missing_layer: "blob .* is missing",
    missing_foreign_layer: "blob .* is missing; it is to be had from .*example.com",
    schema_1: "docker schema 1",
    not_json: "index.json: not valid JSON",
    layout_of_another_version: "imageLayoutVersion",
}


@pytest.mark.parametrize("form", ["folder", "archive"])
@pytest.mark.parametrize(("damage", "why"), LAYOUTS.items(), ids=[damage.__name__ for damage in LAYOUTS])
def test_layout(damage: Callable[[Layout], None], why: str, form: str, tmp_path: Path) -> None:
    layout = simple()
    damage(layout)
    place = layout.folder(tmp_path / "lay") if form == "folder" else layout.archive(tmp_path / "lay.tar")
    _refused(str(place), tmp_path, why)


def test_index_in_a_circle_by_digest() -> None:
    """A circle cannot be made with true digests, so the walk is shown one by a fetch that skips the check."""
    from layerkit.formats.oci import images as oci_images

    entry = oci.descriptor({"mediaType": INDEX, "digest": SHA, "size": 1}, "x", "")
    data = oci.index_json([entry])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oci_images.Reading, "manifest", lambda *_: data)
        with pytest.raises(LayerkitError, match=f"index {SHA} contains itself"):
            oci_images.Reading(lambda *_: data, "x").select([entry], "", None)


# -- folders: links and special files --------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["manifest", "config", "layer"])
def test_blob_that_is_a_link_to_outside(victim: str, tmp_path: Path) -> None:
    layout = simple()
    manifest = _manifest(layout)
    name = {
        "manifest": layout.index["manifests"][0]["digest"],
        "config": manifest["config"]["digest"],
        "layer": manifest["layers"][0]["digest"],
    }[victim]
    (tmp_path / "outside").write_bytes(layout.blobs[name])  # even with the right content
    blob = layout.folder(tmp_path / "lay") / "blobs" / name.replace(":", "/")
    blob.unlink()
    blob.symlink_to(tmp_path / "outside")
    _refused(f"oci:{tmp_path}/lay", tmp_path, "symbolic link")


@pytest.mark.parametrize("victim", ["blobs", "blobs/sha256", "index.json", "oci-layout"])
def test_part_of_a_layout_that_is_a_link(victim: str, tmp_path: Path) -> None:
    place = simple().folder(tmp_path / "lay") / victim
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    _refused(f"oci:{tmp_path}/lay", tmp_path, "symbolic link")


def test_blob_that_is_a_fifo_does_not_hang(tmp_path: Path) -> None:
    layout = simple()
    name = layout.index["manifests"][0]["digest"]
    blob = layout.folder(tmp_path / "lay") / "blobs" / name.replace(":", "/")
    blob.unlink()
    os.mkfifo(blob)
    worker = threading.Thread(
        target=_refused, args=(f"oci:{tmp_path}/lay", tmp_path, "not a regular file"), daemon=True
    )
    worker.start()
    worker.join(10)
    assert not worker.is_alive()


def test_blob_that_is_a_folder(tmp_path: Path) -> None:
    layout = simple()
    blob = layout.folder(tmp_path / "lay") / "blobs" / layout.index["manifests"][0]["digest"].replace(":", "/")
    blob.unlink()
    blob.mkdir()
    _refused(f"oci:{tmp_path}/lay", tmp_path, "not a regular file|special file")


# -- archives: what their members are called and where they lead -------------------------------------------

MEMBERS = simple().members()
CONFIG_BYTES = dump({"os": "linux", "rootfs": {"type": "layers", "diff_ids": []}})
LISTED = ("manifest.json", dump([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": []}]))

ARCHIVES: dict[str, tuple[bytes, str]] = {
    "name_that_climbs": (tar(*MEMBERS, ("../evil", b"x")), "leads outside"),
    "name_that_climbs_inside": (tar(*MEMBERS, ("a/../../evil", b"x")), "leads outside"),
    "absolute_name": (tar(*MEMBERS, ("/etc/evil", b"x")), "absolute path"),
    "symlink_to_outside": (tar(*MEMBERS, special("x", tarfile.SYMTYPE, "../../etc/passwd")), "leads outside"),
    "absolute_symlink": (tar(*MEMBERS, special("x", tarfile.SYMTYPE, "/etc/passwd")), "absolute path"),
    "hard_link_to_outside": (tar(*MEMBERS, special("x", tarfile.LNKTYPE, "../etc/passwd")), "leads outside"),
    "absolute_hard_link": (tar(*MEMBERS, special("x", tarfile.LNKTYPE, "/etc/passwd")), "absolute path"),
    "hard_link_to_nothing": (tar(*MEMBERS, special("x", tarfile.LNKTYPE, "none")), "hard link to 'none'"),
    "character_device": (tar(*MEMBERS, special("x", tarfile.CHRTYPE, devmajor=1)), "neither file, folder nor link"),
    "block_device": (tar(*MEMBERS, special("x", tarfile.BLKTYPE)), "neither file, folder nor link"),
    "fifo": (tar(*MEMBERS, special("x", tarfile.FIFOTYPE)), "neither file, folder nor link"),
    "root_that_is_a_file": (tar(*MEMBERS, ("./", b"")), "cannot be the archive's root"),
    "config_by_link_to_outside": (
        tar(special("c.json", tarfile.SYMTYPE, "../etc/passwd"), LISTED),
        "leads outside",
    ),
    "config_by_links_in_a_circle": (
        tar(special("c.json", tarfile.SYMTYPE, "d"), special("d", tarfile.SYMTYPE, "c.json"), LISTED),
        "links that lead in a circle",
    ),
    "config_by_dangling_link": (tar(special("c.json", tarfile.SYMTYPE, "d"), LISTED), "its link leads to nothing"),
    "config_below_a_linked_folder": (
        tar(
            special("d", tarfile.SYMTYPE, "e"),
            ("e/c.json", CONFIG_BYTES),
            (LISTED[0], LISTED[1].replace(b"c.", b"d/c.")),
        ),
        "which is not in the archive",
    ),
    "name_twice": (tar(*MEMBERS, MEMBERS[1]), "'index.json' occurs twice"),
    "name_twice_by_another_spelling": (tar(*MEMBERS, ("./index.json", b"{}")), "'index.json' occurs twice"),
    "name_twice_by_a_link": (tar(*MEMBERS, special("index.json", tarfile.SYMTYPE, "x")), "occurs twice"),
    "cut_off_in_a_member": (tar(*MEMBERS)[: 512 * 3 + 100], "cut off|not a readable tar|no file"),
    "not_a_tar": (b"x" * 10000, "not a readable tar"),
    "empty": (b"", "not a readable tar"),
    "zeros": (bytes(10240), "no image|no OCI"),
    "bad_checksum": (bytes([tar(*MEMBERS)[0] ^ 1]) + tar(*MEMBERS)[1:], "not a readable tar"),
    "damaged_gzip": (gzip.compress(tar(*MEMBERS))[:-20], "gzip"),
    "garbage_after_gzip": (gzip.compress(b"x") + b"garbage", "gzip|not a readable tar"),
    "device_as_config": (tar(special("c.json", tarfile.CHRTYPE), LISTED), "neither file"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archive(name: str, tmp_path: Path) -> None:
    data, why = ARCHIVES[name]
    (tmp_path / "x.tar").write_bytes(data)
    _refused(f"{tmp_path}/x.tar", tmp_path, why)


def _header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header whose size field is the given 12 bytes, with a true checksum."""
    head = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.USTAR_FORMAT))
    head[124:136], head[156:157] = size, kind
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def _base256(value: int) -> bytes:
    return (b"\xff" if value < 0 else b"\x80") + (value % (1 << 88)).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        *((-512, b"0"), (-1 << 40, b"0"), (1 << 62, b"0"), (1 << 40, b"x"), (1 << 40, b"L")),
        *((-1024, b"x"), (-512, b"g"), (1 << 80, b"0"), (1 << 80, b"x")),
    ],
)
def test_member_size_that_lies(size: int, kind: bytes, tmp_path: Path) -> None:
    data = _header(b"oci-layout", _base256(size), kind) + bytes(512) + tar(*MEMBERS)
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(data)
        file.truncate(1 << 41)  # sparse: what the header claims is there, if anybody would read it
    _refused(
        f"{tmp_path}/x.tar",
        tmp_path,
        "negative|cut off|pax_header_bytes|not a readable tar|above the limit|no image",
    )


def test_member_stored_sparse(tmp_path: Path) -> None:
    simple().folder(tmp_path / "lay")
    with (tmp_path / "lay/index.json").open("ab") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", "-C", tmp_path / "lay", "-cSf", tmp_path / "x.tar", "."], check=True)
    _refused(f"{tmp_path}/x.tar", tmp_path, "'index.json' is stored sparse")


def test_more_members_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerkit.model.limits import Limits

    (tmp_path / "x.tar").write_bytes(tar(*MEMBERS, *((f"x{i}", b"") for i in range(20))))
    with pytest.raises(LayerkitError, match="archive_members"):
        open_source(f"{tmp_path}/x.tar", limits=Limits(archive_members=10))


def test_archive_of_zeros_that_expands_without_end(tmp_path: Path) -> None:
    from layerkit.model.limits import Limits

    member = gzip.compress(bytes(1 << 20))
    (tmp_path / "x.tgz").write_bytes(member * 64)
    with pytest.raises(LayerkitError, match="compression_ratio"):
        open_source(f"{tmp_path}/x.tgz", limits=Limits(bomb_floor_bytes=8 << 20), tmp=tmp_path)
    assert below(tmp_path) == ["x.tgz"]


def test_harmless_links_and_dots_are_read(tmp_path: Path) -> None:
    members = [special("./", tarfile.DIRTYPE), special("./blobs/", tarfile.DIRTYPE)]
    named = [(f"./{name}", data) for name, data in MEMBERS[1:]]
    link = special("oci-layout", tarfile.SYMTYPE, "blobs/../real")
    (tmp_path / "x.tar").write_bytes(tar(*members, *named, link, ("real", MEMBERS[0][1])))
    _use(f"{tmp_path}/x.tar", tmp_path / "target")
    assert (tmp_path / "target/index.json").exists()


def test_tarsafe_has_its_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own rules come first and are stricter; without them tarsafe still refuses what climbs."""
    from layerkit.images.oci import outer_tar

    monkeypatch.setattr(
        outer_tar.OuterTar, "_inside", lambda self, path, folder, member: path.replace("..", "dots")
    )
    (tmp_path / "x.tar").write_bytes(tar(*MEMBERS, ("../evil", b"x")))
    error = _refused(f"{tmp_path}/x.tar", tmp_path, "unsafe archive")
    assert not isinstance(error, UnsafeEntry)


# -- hostile targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["blobs", "blobs/sha256"])
def test_target_layout_with_a_link_is_not_written_through(victim: str, tmp_path: Path) -> None:
    simple().folder(tmp_path / "source")
    target = simple("two").folder(tmp_path / "target") / victim
    target.rename(tmp_path / "victim")
    target.symlink_to(tmp_path / "victim")
    before = below(tmp_path)
    with pytest.raises(LayerkitError, match="link") as caught:
        _use(f"oci:{tmp_path}/source", tmp_path / "target")
    assert caught.value.exit_code == 3
    assert below(tmp_path) == before


def test_memory_does_not_grow_with_a_header_that_lies(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(_header(b"x", _base256(1 << 32), b"x"))
        file.truncate(1 << 33)
    # VmHWM and not ru_maxrss, which a child inherits from the process that started it.
    code = (
        "import sys; from layerkit.images.open import open_source\n"
        "from layerkit.model.errors import InvalidImage\n"
        "try: open_source(sys.argv[1])\n"
        "except InvalidImage: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.tar"], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 100_000  # KiB
