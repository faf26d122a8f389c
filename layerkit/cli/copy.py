"""``layerkit copy``: between any two references."""

from __future__ import annotations

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human


def copy(
    src: o.Ref,
    dst: o.Dst,
    all_platforms: o.AllPlatforms = False,
    platform: o.Platform = None,
    store: o.StoreDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Copy an image between any two references, byte for byte.

    Manifests keep their digests. Artifacts attached to what is copied (remaps, signatures, attestations) come
    along; those attached to an index come only with `--all-platforms`, none of them into a docker daemon.

    Examples:
    `layerkit copy image.tar oci:images:app`

    `layerkit copy oci:images:app docker-archive:app.tar:example.com/app:1`

    `layerkit copy docker-daemon:app:1 oci:images:app`

    `layerkit copy oci:images:multi oci-archive:all.tar --all-platforms`
    """
    from layerkit.api import rewrite

    out = Output(json, quiet, dst)
    with out.progress() as step:
        report = rewrite.copy(
            src, dst, all_platforms=all_platforms, platform=o.one_platform(platform, all_platforms),
            settings=o.settings(store), progress=step,
        )  # fmt: skip
    if out.told("copy", report.to_dict()):
        return
    if out.holds_archive:
        out.note(f"copied {report.manifest}")
        return
    fields([
        ("image", f"{report.name or dst}  {report.manifest}"),
        ("platforms", len(report.images)),
        ("attached", report.attached or "nothing"),
        *([("left behind", report.left)] if report.left else []),
        ("copied", f"{report.blobs} blobs, {human(report.bytes)}, in {report.seconds:.2f} s"),
    ])  # fmt: skip
