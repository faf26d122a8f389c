"""``copy`` between references: same digests, attached artifacts, all platforms, archives that others load."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import oci_schemas
import pytest
from made_images import CONFIG, INDEX, MANIFEST, Layout, attach, below, digest, dump, special, tar
from needs import need_tool
from programs import Cli
from registry_server import docker_registry


def multi(path: Path) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """Write a layout with an index for two platforms, things attached to each part, and a stranger."""
    layout = Layout()
    amd, arm = layout.image(tar(("a", b"1"))), layout.image(tar(("a", b"2")), arch="arm64", variant="v8")
    entries = [
        amd | {"platform": {"os": "linux", "architecture": "amd64"}},
        arm | {"platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
    ]
    index = layout.put(dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}), INDEX)
    layout.list(index, "multi")
    stranger = layout.list(layout.image(tar(("b", b"3"))), "other")
    made = {"amd": attach(layout, amd, b"sbom"), "index": attach(layout, index, b"signature")}
    made["deep"] = attach(layout, made["amd"], b"signature of the sbom")
    made["stranger"] = attach(layout, stranger, b"not ours")
    signature = layout.image(tar(("s", b"4")), x=1)
    made["cosign"] = layout.list(signature, amd["digest"].replace(":", "-") + ".sig")
    made |= {"amd image": amd, "arm image": arm}
    layout.folder(path)
    return path, index, made


def listed(layout: Path) -> list[str]:
    return [m["digest"] for m in json.loads((layout / "index.json").read_text())["manifests"]]


def test_one_platform_with_what_is_attached_to_it(cli: Cli, tmp_path: Path) -> None:
    source, _, made = multi(tmp_path / "in")
    out = tmp_path / "out"
    report = cli.json("copy", f"oci:{source}:multi", f"oci:{out}:one", "--platform", "linux/amd64")
    assert report["schema"] == "layerkit.copy.v1"
    assert report["manifest"] == made["amd image"]["digest"]
    want = [made[name]["digest"] for name in ("amd image", "amd", "cosign", "deep")]
    assert sorted(listed(out)) == sorted(want)
    assert sorted(report["attached"]) == sorted(want[1:])
    for name in below(out / "blobs/sha256"):
        assert digest((out / "blobs/sha256" / name).read_bytes()) == f"sha256:{name}"


def test_all_platforms_with_what_is_attached_to_any(cli: Cli, tmp_path: Path) -> None:
    need_tool("skopeo")
    source, index, made = multi(tmp_path / "in")
    out = tmp_path / "out"
    report = cli.json("copy", f"oci:{source}:multi", f"oci:{out}:all", "--all-platforms")
    assert report["manifest"] == index["digest"]
    assert report["images"] == [made["amd image"]["digest"], made["arm image"]["digest"]]
    assert made["stranger"]["digest"] not in listed(out)
    assert {made[n]["digest"] for n in ("amd", "index", "deep", "cosign")} == set(report["attached"])
    subprocess.run(["skopeo", "copy", "--all", "--quiet", f"oci:{out}:all", f"dir:{tmp_path / 'd'}"], check=True)
    again = cli.json("copy", f"oci:{source}:multi", f"oci:{out}:all", "--all-platforms")
    assert again["blobs"] == 0
    cli.json("copy", f"oci:{source}:multi", f"oci-archive:{tmp_path / 'x.tar'}:all", "--all-platforms")
    back = cli.json(
        "copy", f"oci-archive:{tmp_path / 'x.tar'}:all", f"oci:{tmp_path / 'back'}:all", "--all-platforms"
    )
    assert back["manifest"] == index["digest"]
    assert "single images" in cli.refusal(
        "copy", f"oci:{source}:multi", f"docker-archive:{tmp_path / 'no.tar'}:n:t", "--all-platforms", code=2
    )
    assert not (tmp_path / "no.tar").exists()


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_archives_go_there_and_back(cli: Cli, tiny_image: Path, tmp_path: Path, kind: str) -> None:
    need_tool("skopeo")
    archive = f"{kind}:{tmp_path / 'x.tar'}:example.com/a:t"
    first = cli.json("copy", tiny_image, archive)
    back = cli.json("copy", archive, f"oci:{tmp_path / 'back'}:t", "--all-platforms")
    assert (back["manifest"] == first["manifest"]) or kind == "docker-archive"
    before, after = cli.json("inspect", tiny_image), cli.json("inspect", tmp_path / "back")
    assert before["tree_digest"] == after["tree_digest"]
    assert [r["digest"] for r in before["layers"]] == [r["digest"] for r in after["layers"]]
    source = f"docker-archive:{tmp_path / 'x.tar'}" if kind == "docker-archive" else archive
    subprocess.run(["skopeo", "copy", "--quiet", source, f"dir:{tmp_path / 'd'}"], check=True)


def test_a_damaged_or_absent_blob_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    source, _, made = multi(tmp_path / "in")
    manifest = json.loads((source / "blobs" / made["arm image"]["digest"].replace(":", "/")).read_text())
    blob = source / "blobs" / manifest["layers"][0]["digest"].replace(":", "/")
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    cli.refusal("copy", f"oci:{source}:multi", f"oci:{tmp_path / 'out'}:t", "--all-platforms", code=3)
    blob.unlink()
    cli.refusal("copy", f"oci:{source}:multi", f"oci:{tmp_path / 'out'}:t", "--all-platforms", code=3)
    assert not (tmp_path / "out").exists()
    assert cli.json("copy", f"oci:{source}:multi", f"oci:{tmp_path / 'out'}:t", "--platform", "linux/amd64")[
        "blobs"
    ]


def signed(path: Path) -> tuple[Path, dict[str, str]]:
    """Write an image as a registry's tools leave it: signed by cosign, attested by buildkit, an SBOM attached."""
    layout = Layout()
    chown = special("a", b"0", uid=7)
    image = layout.image(tar(("a", b"1" * 5000), ("b", b"2")), tar(("a", b"1" * 5000), ("c", b"3")), tar(chown))
    statement = layout.put(b"{}", "application/vnd.in-toto+json")
    about = {
        "architecture": "unknown",
        "os": "unknown",
        "rootfs": {"type": "layers", "diff_ids": [statement["digest"]]},
    }
    config = layout.put(dump(about), CONFIG)
    attested = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": [statement], "config": config}
    attestation = layout.put(dump(attested), MANIFEST)
    entries = [
        image | {"platform": {"os": "linux", "architecture": "amd64"}},
        attestation
        | {
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {
                "vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": image["digest"],
            },
        },
    ]  # fmt: skip
    index = layout.put(dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}), INDEX)
    layout.list(index, "app")
    payload = layout.put(b"{}", "application/vnd.dev.cosign.simplesigning.v1+json")
    empty = {"architecture": "", "os": "", "rootfs": {"type": "layers", "diff_ids": [payload["digest"]]}}
    config = layout.put(dump(empty), CONFIG)
    signature = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [payload]}
    made = {"image": image["digest"], "index": index["digest"], "attestation": attestation["digest"]}
    for name, subject in (("signature", image), ("signature of the index", index)):
        entry = layout.put(dump(signature | {"annotations": {"of": name}}), MANIFEST)
        made[name] = layout.list(entry, subject["digest"].replace(":", "-") + ".sig")["digest"]
    made["sbom"] = attach(layout, image, b"sbom")["digest"]
    layout.folder(path)
    return path, made


def test_what_speaks_for_a_digest_goes_only_with_that_digest(cli: Cli, tmp_path: Path) -> None:
    source, made = signed(tmp_path / "in")
    src, of_image = f"oci:{source}:app", {made[name] for name in ("signature", "attestation", "sbom")}
    # One platform: what covers the image comes, what covers the index does not and is named.
    for dst in (f"oci:{tmp_path}/one:x", f"oci-archive:{tmp_path}/one.tar:x", f"docker-archive:{tmp_path}/d.tar:x"):
        report = cli.json("copy", src, dst, "--platform", "linux/amd64")
        assert set(report["attached"]) == of_image
        assert report["left"] == [made["signature of the index"]]
        # By its path alone a docker archive is the OCI archive that it is too, with the manifest as it was. From
        # the copy on they go with the image again; only the index that listed the attestation is gone.
        again = cli.json(
            "copy", dst.removeprefix("docker-archive:"), f"oci:{tmp_path}/again-{dst.partition(':')[0]}:y"
        )
        assert again["manifest"] == made["image"]
        assert {made["signature"], made["sbom"]} <= set(again["attached"])
    # All platforms: everything.
    report = cli.json("copy", src, f"oci:{tmp_path}/all:x", "--all-platforms")
    assert report["manifest"] == made["index"]
    assert report["left"] == []
    assert {*report["attached"], made["attestation"]} >= {*of_image, made["signature of the index"]}
    oci_schemas.check(tmp_path / "all")


def test_what_is_attached_goes_through_a_registry(cli: Cli, tmp_path: Path) -> None:
    """A real registry without the referrers API: cosign's names, the fallback tag, the index, and back."""
    source, made = signed(tmp_path / "in")
    with docker_registry(tmp_path / "registry") as registry:
        ref = registry.ref("team/app:v1")
        there = cli.json("copy", f"oci:{source}:app", ref, "--all-platforms", "--tls-verify=false")
        back = cli.json("copy", ref, f"oci:{tmp_path}/back:v1", "--all-platforms", "--tls-verify=false")
        for report in (there, back):
            assert report["manifest"] == made["index"]
            assert {made[name] for name in ("signature", "signature of the index", "sbom")} <= set(
                report["attached"]
            )
        one = cli.json("copy", ref, f"oci:{tmp_path}/one:v1", "--platform", "linux/amd64", "--tls-verify=false")
        assert set(one["attached"]) == {made[name] for name in ("signature", "attestation", "sbom")}
        assert one["left"] == [made["signature of the index"]]
    oci_schemas.check(tmp_path / "back")
    names = {m.get("annotations", {}).get("org.opencontainers.image.ref.name") for m in
             json.loads((tmp_path / "back/index.json").read_text())["manifests"]}  # fmt: skip
    assert {made["image"].replace(":", "-") + ".sig", made["index"].replace(":", "-") + ".sig"} <= names


@pytest.mark.parametrize(
    "words", [("flatten",), ("optimize",), ("remap", "--form", "portable", "--uid-map", "0:1000:10")], ids=" ".join
)
def test_what_is_written_anew_carries_nothing_that_covers_the_original(
    cli: Cli, tmp_path: Path, words: tuple[str, ...]
) -> None:
    source, made = signed(tmp_path / "in")
    report = cli.json(
        words[0], f"oci:{source}:app", f"oci:{tmp_path}/out:x", *words[1:], "--platform", "linux/amd64"
    )
    assert report["manifest"] != made["image"]
    assert listed(tmp_path / "out") == [report["manifest"]]
    (warning,) = (text for text in report["warnings"] if "attached" in text)
    assert all(made[name] in warning for name in ("signature", "signature of the index", "attestation", "sbom"))
    blobs = {path.name for path in (tmp_path / "out/blobs/sha256").iterdir()}
    assert not blobs & {digest.removeprefix("sha256:") for digest in made.values()}
    # Into the layout where the signature lies: its name still says the old digest, and nobody took it over.
    again = cli.json(words[0], f"oci:{source}:app", f"oci:{source}:new", *words[1:], "--platform", "linux/amd64")
    assert again["manifest"] == report["manifest"]
    assert cli.json("copy", f"oci:{source}:new", f"oci:{tmp_path}/3:z")["attached"] == []
