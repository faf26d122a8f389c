"""Options that several commands share, declared once.

Where a flag is not given, its value is what ``layerkit config`` shows: see :func:`configured_defaults`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from layerkit.linux.configuration import configured, everything
from layerkit.model.errors import UsageError

if TYPE_CHECKING:
    from layerkit.idmap import Mapping as IdMapping
    from layerkit.usecases.settings import Settings

Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="An image: a file or folder, or `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, "
        "`docker-archive:FILE[:NAME]`, `docker-daemon:NAME[:TAG]`, `docker://HOST/NAME[:TAG]`, `store:NAME`; "
        "`-` is an archive on standard input.",
    ),
]
Dst = Annotated[
    str,
    typer.Argument(
        metavar="DST",
        help="Where the result goes: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `docker-archive:FILE[:NAME]`, "
        "`docker-daemon:NAME[:TAG]`; `-` is an archive on standard output.",
    ),
]
UidMap = Annotated[
    list[str] | None,
    typer.Option("--uid-map", metavar="C:H:N", help="Container id, host id, count; repeat it or use commas."),
]
GidMap = Annotated[
    list[str] | None,
    typer.Option("--gid-map", metavar="C:H:N", help="The same for groups; without it the uid map is used."),
]
SubuidName = Annotated[
    str | None,
    typer.Option("--subuid-name", metavar="NAME", help="Take the map from /etc/subuid and /etc/subgid for NAME."),
]
OverflowId = Annotated[
    int | None,
    typer.Option("--overflow-id", metavar="N", help="Give owners outside the map this host id, not an error."),
]
Squash = Annotated[
    bool, typer.Option("--squash", help="Allow several container ids to share one host id (many-to-one).")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse overlay xattrs that the image brings, instead of escaping them.")
]
OwnMeta = Annotated[
    bool, typer.Option("--own-meta", help="Write metadata for this map even where an idmapped mount needs none.")
]
StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR",
        help="The local store [default: /var/lib/layerkit for root, else $XDG_DATA_HOME/layerkit].",
    ),
]  # fmt: skip
Data = Annotated[
    str,
    typer.Option(
        "--data", metavar="auto|tar|objects",
        help="How file data is kept: raw layer tars under EROFS, or content-addressed files.",
    ),
]  # fmt: skip
Platform = Annotated[
    str | None,
    typer.Option("--platform", metavar="OS/ARCH[/VARIANT]",
                 help="Which image of a multi-platform one [default: this host's]."),
]  # fmt: skip
AllPlatforms = Annotated[
    bool, typer.Option("--all-platforms", help="Do it to the images of all platforms, under one index.")
]
KeepBase = Annotated[
    str | None,
    typer.Option(
        "--keep-base", metavar="REF|N",
        help="Leave the layers of this image, or the lowest N, as they are: who has the base shares it.",
    ),
]  # fmt: skip
StockMediaType = Annotated[
    bool,
    typer.Option(
        "--stock-media-type",
        help="For layers of stubs: the standard media type. DANGEROUS: most runtimes show files of zeros.",
    ),
]
Compression = Annotated[
    str,
    typer.Option(
        "--compression", metavar="gzip|zstd|zstd:chunked|none", help="Compression of layers that are written."
    ),
]
Level = Annotated[int | None, typer.Option("--compression-level", metavar="N", help="gzip 1 to 9, zstd 1 to 22.")]
Created = Annotated[
    str | None,
    typer.Option(
        "--created", metavar="TIME",
        help="Time written into the result, RFC 3339 or seconds since 1970 "
        "[default: SOURCE_DATE_EPOCH, else that of the image].",
    ),
]  # fmt: skip
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, max=64, help="Layers read at the same time.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", min=1, max=64,
        help="Threads that compress; the result does not depend on it [default: all cores].",
    ),
]  # fmt: skip
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a page that opens in a browser from disk.")
]
Undo = Annotated[bool, typer.Option("--undo", help="Take out what this command put in.")]
Print = Annotated[bool, typer.Option("--print", help="Print what would be written; change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def store_dir(given: Path | None) -> Path:
    """Return the store that the flag names, else the one that is configured, or the default one."""
    from layerkit.usecases.settings import default_store

    return given or default_store()


def settings(store: Path | None, **flags: Any) -> Settings:
    """Return the settings that the shared flags ``--store``, ``--data``, ``--jobs`` and ``--strict`` mean."""
    from layerkit.usecases.settings import Settings

    return Settings(store, **flags)


def mapping(
    uid_map: list[str] | None,
    gid_map: list[str] | None,
    subuid_name: str | None,
    overflow_id: int | None = None,
    squash: bool = False,
) -> IdMapping | None:
    """Return the id map that the shared flags spell, None if there are none."""
    from layerkit.usecases.settings import MapOptions

    return MapOptions(tuple(uid_map or ()), tuple(gid_map or ()), subuid_name, overflow_id, squash).mapping()


def one_platform(platform: str | None, all_platforms: bool) -> str | None:
    """Return the platform that is meant, None for this host's or all.

    Raises:
        UsageError: --all-platforms stands beside --platform.
    """
    # What is configured is a default, which --all-platforms overrides.
    if all_platforms and platform == configured("platform"):
        return None
    if all_platforms and platform is not None:
        raise UsageError("--all-platforms and --platform exclude each other; give one of them")
    return platform


_CONFIGURED = {
    "data": "data", "jobs": "jobs", "strict": "strict", "platform": "platform",
    "compression": "compression", "level": "compression_level",
}  # fmt: skip
"""Parameters whose default is a setting. What else can be set is asked for where it is used."""


def configured_defaults(command: object) -> dict[str, Any]:
    """Return the defaults that settings give to the options of ``command`` and of the commands below it.

    Raises:
        UsageError: something that is set wrong.
    """
    settings = everything()
    given = {name: settings[key].value for name, key in _CONFIGURED.items() if settings[key].origin != "default"}

    def defaults(each: object) -> dict[str, Any]:
        if isinstance(each, TyperGroup):
            return {name: defaults(below) for name, below in each.commands.items()}
        names = [param.name or "" for param in each.params] if isinstance(each, TyperCommand) else []
        return {name: given[name] for name in names if name in given}

    return defaults(command)
