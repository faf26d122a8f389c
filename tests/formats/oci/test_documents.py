"""OCI and docker schema 2 documents: what is read, what is refused and how it is said, what is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_images import INDEX, MANIFEST, Layout, digest, dump, simple, tar

from layerkit.formats import strict_json
from layerkit.formats.oci import documents as oci
from layerkit.formats.oci import images as oci_images
from layerkit.model.descriptor import Descriptor, Platform
from layerkit.model.digest import Digest
from layerkit.model.errors import DigestMismatch, InvalidImage, LimitExceeded, NotFound
from layerkit.model.limits import DEFAULT, Limits

SHA = "sha256:" + "ab" * 32
ENTRY: dict[str, Any] = {"mediaType": MANIFEST, "digest": SHA, "size": 7}
MANIFEST_DOC: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": MANIFEST,
    "config": {"mediaType": oci.CONFIG, "digest": SHA, "size": 2},
    "layers": [{"mediaType": oci.LAYER_GZIP, "digest": SHA, "size": 9}],
}


def select(layout: Layout, platform: str | None = None, name: str = "", limits: Limits = DEFAULT) -> Any:
    entries = [oci.descriptor(e, "index.json", "") for e in layout.index["manifests"]]
    reading = oci_images.Reading(lambda entry, _: layout.blobs[str(entry.digest)], "here", limits)
    return reading.select(entries, name, Platform.parse(platform) if platform else None)


# -- JSON -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'[{"x": {"b": 1, "c": 2, "b": 3}}]', "'b' occurs twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": 1}}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_readers_disagree_about(text: bytes, why: str) -> None:
    with pytest.raises(InvalidImage, match=f"^doc: .*{why}"):
        strict_json.loads(text, "doc")


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_is_bounded_before_parsing(opening: bytes, closing: bytes) -> None:
    deepest = opening * 64 + b"1" + closing * 64
    strict_json.loads(deepest, "doc")
    with pytest.raises(LimitExceeded, match="65 is above the limit of 64"):
        strict_json.loads(opening * 65 + b"1" + closing * 65, "doc")
    for n in (10**6, 65):
        with pytest.raises(LimitExceeded, match="json_depth"):
            strict_json.loads(opening * n, "doc")


def test_brackets_in_strings_and_breadth_do_not_count_as_depth() -> None:
    strict_json.loads(dump({"a": "[" * 1000 + '\\"{{' * 100, "b": [[]] * 1000}), "doc")
    strict_json.loads(b'["a\\\\", "' + b"[" * 100 + b'"]', "doc")


def test_unterminated_strings_cost_linear_time() -> None:
    for text in (b'"' + b'\\"' * 2_000_000, b'["' + b'a\\"[' * 1_000_000):
        with pytest.raises(InvalidImage):
            strict_json.loads(text, "doc")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_json_round_trip(value: object) -> None:
    written = strict_json.dumps(value)
    assert strict_json.loads(written, "doc") == value
    assert strict_json.loads(json.dumps(value).encode(), "doc") == value
    assert strict_json.dumps(strict_json.loads(written, "doc")) == written


# -- documents ------------------------------------------------------------------------------------------


def test_unknown_members_are_kept() -> None:
    entry = ENTRY | {"data": "e30=", "x-new": {"deep": [1, None]}, "annotations": {"a": "b"}}
    entry |= {"platform": {"architecture": "arm", "os": "linux", "variant": "v7", "os.features": ["x"]}}
    parsed = oci.descriptor(entry, "doc", "manifests[0]")
    assert parsed.platform == Platform("linux", "arm", "v7")
    assert oci.descriptor_json(parsed) == entry
    index = {"schemaVersion": 2, "manifests": [entry], "x-top": 1, "annotations": {"k": "v"}}
    read = oci.parse_index(dump(index), "doc")
    assert json.loads(oci.index_json(read.manifests, read.document)) == index


def _with(path: str, value: object) -> bytes:
    """Return the manifest with the member at ``path`` replaced, or taken out where ``value`` is ``...``."""
    document = json.loads(json.dumps(MANIFEST_DOC))
    place: Any = document
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return dump(document)


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("config", ..., "config: missing"),
        ("config", [], "config: "),
        ("config", None, "config: "),
        ("config.size", -1, "config.size: .*>= 0"),
        ("config.size", 1 << 63, "config.size"),
        ("config.size", "2", "config.size: .*`int`"),
        ("config.size", 2.0, "config.size"),
        ("config.size", True, "config.size"),
        ("config.digest", "md5:00", "config.digest: not a digest"),
        ("config.digest", SHA.upper(), "config.digest"),
        ("config.digest", SHA[:-1], "config.digest"),
        ("config.digest", SHA + "\n", "config.digest"),
        ("config.digest", "sha256:../../../etc/passwd", "config.digest"),
        ("config.mediaType", ..., "config: .*mediaType"),
        ("layers.0", 7, r"layers\[0\]: "),
        ("layers.0.size", -5, r"layers\[0\].size: "),
        ("layers.0.Size", 5, r"layers\[0\]: the name 'Size' can be taken for 'size'"),
        ("layers.0.annotations", {"a": 1}, r"layers\[0\].annotations"),
        ("layers.0.urls", "x", r"layers\[0\].urls"),
        ("layers", {}, "layers: Expected `array`"),
        ("layers", "x", "layers: Expected `array`"),
        ("Layers", [], "top level: 'Layers' does not belong"),
        ("layerſ", [], "top level: 'layerſ' does not belong"),
        ("manifests", [], "top level: 'manifests' does not belong in a manifest"),
        ("fsLayers", [], "top level: 'fsLayers' does not belong"),
        ("subject", {"digest": SHA}, "subject: "),
        ("schemaVersion", 3, "schemaVersion: want 2, found 3"),
        ("schemaVersion", "2", "schemaVersion"),
        ("schemaVersion", ..., "schemaVersion: want 2, found None"),
        ("mediaType", "text/plain", "mediaType: want one of"),
        ("mediaType", INDEX, "mediaType: want one of"),
        ("mediaType", 5, "mediaType: Expected"),
        ("annotations", [], "annotations"),
    ],
)
def test_malformed_manifest_names_document_and_field(path: str, value: object, where: str) -> None:
    with pytest.raises(InvalidImage, match=f"^this manifest: {where}"):
        oci.parse_manifest(_with(path, value), "this manifest")


def test_what_is_not_a_manifest_at_all() -> None:
    for text in (b"[]", b"7", b"null", b'"x"'):
        with pytest.raises(InvalidImage, match=r"^doc: want a JSON object"):
            oci.parse_manifest(text, "doc")


def test_nulls_of_go_are_absent_members() -> None:
    document = MANIFEST_DOC | {"layers": None, "annotations": None, "subject": None, "artifactType": ""}
    assert oci.parse_manifest(dump(document), "doc").layers == ()
    assert oci.parse_index(b'{"schemaVersion":2,"manifests":null}', "doc").manifests == ()


def test_docker_schema_1_says_what_to_do() -> None:
    text = b'{"schemaVersion": 1, "name": "x", "fsLayers": [{"blobSum": "x"}], "signatures": []}'
    with pytest.raises(InvalidImage, match=r"docker schema 1.*skopeo copy"):
        oci.parse_manifest(text, "doc")
    layout = Layout()
    layout.list(layout.put(text, "application/vnd.docker.distribution.manifest.v1+prettyjws"))
    with pytest.raises(InvalidImage, match="docker schema 1"):
        select(layout)


def test_docker_schema_2_is_read() -> None:
    document = MANIFEST_DOC | {"mediaType": oci.DOCKER_MANIFEST}
    parsed = oci.parse_manifest(dump(document), "doc", media_type=oci.DOCKER_MANIFEST)
    assert parsed.media_type == oci.DOCKER_MANIFEST


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "rootfs"),
        ({"rootfs": None}, "rootfs"),
        ({"rootfs": {"type": "layers+base"}}, "rootfs.type: want 'layers'"),
        ({"rootfs": {"type": "layers", "diff_ids": [SHA, "x"]}}, r"rootfs.diff_ids\[1\]: not a digest"),
        ({"rootfs": {"type": "layers", "diff_ids": "x"}}, "rootfs.diff_ids"),
        ({"rootfs": {"type": "layers", "Diff_IDs": []}}, "'Diff_IDs' can be taken for 'diff_ids'"),
        ({"rootfs": {"type": "layers"}, "OS": "x"}, "'OS' can be taken for 'os'"),
        ({"rootfs": {"type": "layers"}, "os": 1}, "os: "),
    ],
)
def test_malformed_config(config: object, why: str) -> None:
    with pytest.raises(InvalidImage, match=f"^doc: .*{why}"):
        oci.parse_config(dump(config), "doc")


def test_config_keeps_the_labels_of_any_case() -> None:
    config = {"rootfs": {"type": "layers", "diff_ids": None}, "config": {"Labels": {"a": "1", "A": "2"}}}
    parsed = oci.parse_config(dump(config), "doc")
    assert (parsed.document, parsed.diff_ids, str(parsed.platform)) == (config, (), "unknown/unknown")


def test_limits() -> None:
    few = replace(DEFAULT, layers_per_image=1, manifests_per_index=1, manifest_bytes=2000, config_bytes=10)
    two = MANIFEST_DOC | {"layers": MANIFEST_DOC["layers"] * 2}
    with pytest.raises(LimitExceeded, match="layers_per_image"):
        oci.parse_manifest(dump(two), "doc", limits=few)
    with pytest.raises(LimitExceeded, match="manifests_per_index"):
        oci.parse_index(dump({"schemaVersion": 2, "manifests": [ENTRY] * 2}), "doc", limits=few)
    with pytest.raises(LimitExceeded, match="manifest_bytes"):
        oci.parse_manifest(dump(MANIFEST_DOC) + b" " * 2000, "doc", limits=few)
    with pytest.raises(LimitExceeded, match="config_bytes"):
        oci.parse_config(b" " * 11, "doc", limits=few)
    with pytest.raises(LimitExceeded, match="layer_blob_bytes"):
        select(simple(), limits=replace(DEFAULT, layer_blob_bytes=5))


def test_layout_file() -> None:
    oci.check_layout(oci.LAYOUT_FILE, "doc")
    for text in (b"{}", b'{"imageLayoutVersion":"2.0.0"}', b'{"imageLayoutVersion":1}'):
        with pytest.raises(InvalidImage, match="imageLayoutVersion"):
            oci.check_layout(text, "doc")


# -- images ---------------------------------------------------------------------------------------------


def test_image_is_verified_and_kept_to_the_byte() -> None:
    layout = simple()
    image = select(layout, name="n")
    entry = layout.index["manifests"][0]
    assert image.name == "n"
    assert image.manifest == layout.blobs[entry["digest"]]
    assert digest(image.config) == str(image.config_descriptor.digest)
    assert [str(d) for d in image.diff_ids] == json.loads(image.config)["rootfs"]["diff_ids"]
    assert str(image.platform) == "linux/amd64"


def test_damaged_manifest_and_config() -> None:
    for victim in (0, 1):
        layout = simple()
        manifest = layout.index["manifests"][0]
        name = (manifest, json.loads(layout.blobs[manifest["digest"]])["config"])[victim]["digest"]
        good = layout.blobs[name]
        layout.blobs[name] = good.replace(b"a", b"b", 1)
        with pytest.raises(DigestMismatch, match=name):
            select(layout)
        layout.blobs[name] = good + b" "
        with pytest.raises(DigestMismatch, match="bytes"):
            select(layout)


def test_as_many_diff_ids_as_layers() -> None:
    layout = Layout()
    layout.list(layout.image(tar(("a", b"")), rootfs={"type": "layers", "diff_ids": [SHA, SHA]}))
    with pytest.raises(InvalidImage, match=r"1 layers.*2 rootfs\.diff_ids"):
        select(layout)


def test_media_type_must_be_the_announced_one() -> None:
    layout = simple()
    layout.index["manifests"][0]["mediaType"] = oci.DOCKER_MANIFEST
    with pytest.raises(InvalidImage, match="announced as"):
        select(layout)


def test_artifact_is_no_image() -> None:
    layout = Layout()
    config = layout.put(b"{}", oci.EMPTY)
    document = {"schemaVersion": 2, "artifactType": "application/x.y", "config": config, "layers": [config]}
    layout.list(layout.put(dump(document), MANIFEST))
    with pytest.raises(InvalidImage, match=r"artifact \(application/x.y\)"):
        select(layout)


def _multi(*kinds: str, nest: bool = False, known: bool = True) -> tuple[Layout, dict[str, str]]:
    """An index of one image per ``arch[/variant]``; returns also the platform of each manifest digest."""
    layout, by_digest = Layout(), {}
    entries = []
    for kind in kinds:
        arch, _, variant = kind.partition("/")
        entry = layout.image(tar((kind, kind.encode())), arch=arch, variant=variant)
        by_digest[entry["digest"]] = kind
        platform = {"architecture": arch, "os": "linux"} | ({"variant": variant} if variant else {})
        entries.append(entry | ({"platform": platform} if known else {}))
    attestation = {
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        "platform": {"architecture": "unknown", "os": "unknown"},
    }
    entries.append(layout.image() | attestation)
    index = layout.put(dump({"schemaVersion": 2, "manifests": entries}), INDEX)
    if nest:
        index = layout.put(dump({"schemaVersion": 2, "manifests": [index]}), INDEX)
    layout.list(index, "multi")
    return layout, by_digest


@pytest.mark.parametrize(
    ("there", "want", "chosen"),
    [
        ("amd64 arm64", "linux/arm64", "arm64"),
        ("arm/v5 arm/v7 arm/v6", "linux/arm/v7", "arm/v7"),
        ("arm/v5 arm/v6", "linux/arm/v7", "arm/v6"),
        ("arm/v6 arm/v8", "linux/arm", "arm/v6"),
        ("arm/v8", "linux/arm", "arm/v8"),
        ("arm/v8", "linux/arm/v7", None),
        ("arm/v5 arm", "linux/arm/v7", "arm"),
        ("arm64/v8 arm64", "linux/arm64", "arm64"),
        ("arm64/v8", "linux/arm64", "arm64/v8"),
        ("arm64", "linux/arm64/v8", "arm64"),
        ("amd64/v3 amd64", "linux/amd64", "amd64"),
        ("amd64/v4 amd64/v3", "linux/amd64", "amd64/v3"),
        ("amd64/v2 amd64", "linux/amd64/v3", "amd64/v2"),
        ("ppc64le", "linux/s390x", None),
        ("amd64", "windows/amd64", None),
        ("mips/softfloat", "linux/mips", "mips/softfloat"),
        ("mips/softfloat", "linux/mips/hardfloat", None),
    ],
)
@pytest.mark.parametrize("form", ["plain", "nested", "unsaid"])
def test_platform(there: str, want: str, chosen: str | None, form: str) -> None:
    layout, by_digest = _multi(*there.split(), nest=form == "nested", known=form != "unsaid")
    if chosen is None:
        with pytest.raises(NotFound, match=f"no image for {want}.*linux/{there.split()[0]}.*--platform"):
            select(layout, want)
    else:
        assert by_digest[str(select(layout, want).descriptor.digest)] == chosen


def test_default_platform_is_the_hosts() -> None:
    host = oci_images.host_platform()
    layout, by_digest = _multi("s390x", host.architecture, "ppc64le")
    assert by_digest[str(select(layout).descriptor.digest)] == host.architecture


def test_image_without_an_index_is_taken_for_what_it_is() -> None:
    layout = Layout()
    layout.list(layout.image(arch="s390x"))
    assert str(select(layout).platform) == "linux/s390x"
    assert str(select(layout, "linux/s390x").platform) == "linux/s390x"
    with pytest.raises(NotFound, match="no image for linux/arm64; there are images for: linux/s390x"):
        select(layout, "linux/arm64")


def test_index_depth() -> None:
    layout = Layout()
    inner = layout.image()
    for depth in range(1, 10):
        inner = layout.put(dump({"schemaVersion": 2, "manifests": [inner]}), INDEX)
        layout.index["manifests"] = [inner]
        if depth <= 8:
            select(layout, "linux/amd64")
    with pytest.raises(LimitExceeded, match="index_depth"):
        select(layout, "linux/amd64")


def test_few_indexes_that_spell_out_billions_of_entries() -> None:
    layout = Layout()
    inner = layout.image()
    for _ in range(8):
        inner = layout.put(dump({"schemaVersion": 2, "manifests": [inner] * 1000}), INDEX)
    layout.list(inner)
    assert str(select(layout, "linux/amd64").platform) == "linux/amd64"


# -- writing --------------------------------------------------------------------------------------------


def test_written_documents_are_compact_and_constant() -> None:
    config = Descriptor(oci.CONFIG, Digest.parse(SHA), 3)
    layer = Descriptor(oci.LAYER_GZIP, Digest.parse(SHA), 4, annotations={"ä": "b"}, extra={"urls": ["u"]})
    data = oci.manifest_json(config, [layer], annotations={"z": "1", "a": "2"})
    assert b" " not in data
    assert "ä".encode() in data
    assert list(json.loads(data)) == ["schemaVersion", "mediaType", "config", "layers", "annotations"]
    parsed = oci.parse_manifest(data, "doc")
    assert (parsed.config, parsed.layers) == (config, (layer,))
    assert oci.manifest_json(parsed.config, parsed.layers, annotations=parsed.annotations) == data


def _names(entries: list[Descriptor]) -> list[tuple[str, str]]:
    return [(e.digest.hex[:1], e.annotations.get(oci.REF_NAME, "")) for e in entries]


def test_entries_of_a_layout_are_named_as_skopeo_does() -> None:
    a, b = (Descriptor(MANIFEST, Digest("sha256", letter * 64), 1, annotations={"k": letter}) for letter in "ab")
    entries: list[Descriptor] = []
    oci.add_entry(entries, a, "x")
    oci.add_entry(entries, a, "y")
    oci.add_entry(entries, b, "x")
    assert _names(entries) == [("a", ""), ("a", "y"), ("b", "x")]
    oci.add_entry(entries, b, "x")
    oci.add_entry(entries, b, "")
    assert _names(entries) == [("a", ""), ("a", "y"), ("b", "x")]
    oci.add_entry(entries, a, "z")
    assert _names(entries) == [("a", "z"), ("a", "y"), ("b", "x")]
    assert all(e.annotations["k"] == e.digest.hex[0] for e in entries)


def test_messages_are_printable() -> None:
    with pytest.raises(InvalidImage) as caught:
        oci.parse_manifest(_with("mediaType", "\x1b[31m"), "doc")
    assert re.search(r"\x1b", str(caught.value)) is None
