"""Options that several commands share, declared once; those that go together are fields of a dataclass.

Where a flag is not given, its value is what ``layerkit config`` shows: see :func:`configured_defaults`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_origin

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from layerkit.linux.configuration import configured, everything

if TYPE_CHECKING:
    from layerkit.api.open import OpenImage
    from layerkit.api.rewrite import Route
    from layerkit.idmap import Mapping as IdMapping
    from layerkit.model.ports import Progress
    from layerkit.store.local import LocalStore
    from layerkit.usecases.settings import RewriteOptions, Settings

F = TypeVar("F", bound=Callable[..., object])

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
        "`docker-daemon:NAME[:TAG]`, `docker://HOST/NAME[:TAG]`; `-` is an archive on standard output.",
    ),
]
UidMap = Annotated[
    list[str] | None,
    typer.Option("--uid-map", metavar="C:H:N", help="Container id, host id, size; repeat it, or use commas."),
]
GidMap = Annotated[
    list[str] | None, typer.Option("--gid-map", metavar="C:H:N", help="The same for groups [default: the uid map].")
]
SubuidName = Annotated[
    str | None,
    typer.Option("--subuid-name", metavar="NAME", help="Take NAME's map from /etc/subuid and /etc/subgid."),
]
OverflowId = Annotated[
    int | None,
    typer.Option("--overflow-id", metavar="N", help="Host id for owners outside the map [default: an error]."),
]
Squash = Annotated[
    bool, typer.Option("--squash", help="Allow several container ids to share one host id (many-to-one).")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse overlay xattrs that the image brings, instead of escaping them.")
]
OwnMeta = Annotated[
    bool, typer.Option("--own-meta", help="Write metadata for this map even if an idmapped mount would do.")
]
StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store", metavar="DIR",
        help="The local store [default: /var/lib/layerkit for root, else layerkit in $XDG_DATA_HOME].",
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
                 help="Which image of an image index [default: this host's platform]."),
]  # fmt: skip
AllPlatforms = Annotated[
    bool, typer.Option("--all-platforms", help="Work on the images of all platforms, under one image index.")
]
KeepBase = Annotated[
    str | None,
    typer.Option(
        "--keep-base", metavar="REF|N",
        help="Leave the layers of this image, or the lowest N layers, as they are, so that they stay shared.",
    ),
]  # fmt: skip
StockMediaType = Annotated[
    bool,
    typer.Option(
        "--stock-media-type",
        help="Give layers of stubs the standard media type. DANGEROUS: most runtimes then show zeros.",
    ),
]
Compression = Annotated[
    str, typer.Option("--compression", metavar="gzip|zstd|zstd:chunked|none", help="How new layers are compressed.")
]
Level = Annotated[int | None, typer.Option("--compression-level", metavar="N", help="gzip 1 to 9, zstd 1 to 22.")]
Created = Annotated[
    str | None,
    typer.Option(
        "--created", metavar="TIME",
        help="Time written into the result: RFC 3339, or seconds since 1970 "
        "[default: SOURCE_DATE_EPOCH, else the time in the image].",
    ),
]  # fmt: skip
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, max=64, help="Layers read at the same time.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", min=1, max=64,
        help="Threads that compress; the result is the same with any number [default: all cores].",
    ),
]  # fmt: skip
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write an HTML page that any browser opens from disk.")
]
Undo = Annotated[bool, typer.Option("--undo", help="Undo what this command did.")]
Print = Annotated[bool, typer.Option("--print", help="Print what would be written; change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on standard error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]


class Flat:
    """A command as typer takes it: in place of a parameter that is a dataclass stand the options that it holds.

    Nothing is looked at before typer builds the command: it builds one of thirty in each run.
    """

    def __init__(self, command: Callable[..., object]) -> None:
        """Stand for ``command``."""
        functools.update_wrapper(self, command)
        self._command = command
        self.__annotations__ = {}  # all that typer needs is in the signature

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[Any, list[inspect.Parameter]]]:
        """Return for each parameter the dataclass that it is, if it is one, and what typer is to see of it."""
        own = inspect.signature(self._command, eval_str=True).parameters.values()
        return {
            each.name: (each.annotation, _options(each.annotation))
            if is_dataclass(each.annotation)
            else (None, [each])
            for each in own
        }

    @functools.cached_property
    def __signature__(self) -> inspect.Signature:
        every = [each for _, parts in self._parts.values() for each in parts]
        return inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in every])

    def __call__(self, **values: Any) -> object:
        """Run the command."""
        return self._command(
            **{
                name: kind(**{each.name: values[each.name] for each in parts}) if kind else values[name]
                for name, (kind, parts) in self._parts.items()
            }
        )


def _options(kind: Any) -> list[inspect.Parameter]:
    """Return the fields of a dataclass that are options."""
    fields = inspect.signature(kind, eval_str=True).parameters.values()
    return [each for each in fields if get_origin(each.annotation) is Annotated]


def _setting(name: str) -> Any:
    """Return a callback that sets the variable ``name`` for as long as the command runs."""

    def callback(ctx: Any, _param: Any, value: object) -> None:
        if value is None:
            return
        before = os.environ.get(name)

        def restore() -> None:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before

        ctx.call_on_close(restore)
        os.environ[name] = str(value)

    return callback


_REGISTRIES = {
    "--authfile": ("FILE", "Credentials file, as `podman login` writes it [default: podman's, then docker's]."),
    "--tls-verify": (
        "true|false", "false accepts any certificate, and plain HTTP if the registry has no TLS.",
    ),
    "--cert-dir": ("DIR", "Folder of CA (`*.crt`) and client (`*.cert`, `*.key`) certificates [default: certs.d]."),
}  # fmt: skip
"""They are the environment's variables under another name: a command hands nothing on, the client reads them."""


class RegistryCommand(TyperCommand):
    """A command that takes a reference, with the options about registries."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **kwargs: Any) -> None:
        """As :class:`TyperCommand`."""
        more = [
            TyperOption(
                param_decls=[flag], metavar=metavar, expose_value=False, rich_help_panel="Registries",
                callback=_setting("LAYERKIT" + flag[1:].replace("-", "_").upper()), show_default=False, help=text,
            )
            for flag, (metavar, text) in _REGISTRIES.items()
        ]  # fmt: skip
        super().__init__(*args, params=[*(params or ()), *more], **kwargs)


def command(group: typer.Typer, name: str = "", panel: str | None = None) -> Callable[[F], F]:
    """Return what makes a function a command of ``group``, under its own name if none is given."""

    def add(function: F) -> F:
        takes_reference = "o.Ref" in function.__annotations__.values()
        group.command(
            name or function.__name__.replace("_", "-"), cls=RegistryCommand if takes_reference else None,
            rich_help_panel=panel,
        )(Flat(function))  # fmt: skip
        return function

    return add


def store_dir(given: Path | None) -> Path:
    """Return the store that the flag names, else the one that is configured, or the default one."""
    from layerkit.usecases.settings import default_store

    return given or default_store()


def settings(store: Path | None, **flags: Any) -> Settings:
    """Return the settings that the shared flags ``--store``, ``--data``, ``--jobs`` and ``--strict`` mean."""
    from layerkit.usecases.settings import Settings

    return Settings(store, **flags)


def open_store(given: Path | None) -> LocalStore:
    """Open the store that the flag means, which must exist."""
    from layerkit.usecases import settings

    return settings.open_store(given)


@dataclass(frozen=True)
class PlainMap:
    """An id map of the kind that a user namespace can have."""

    uid_map: UidMap = None
    gid_map: GidMap = None
    subuid_name: SubuidName = None

    def mapping(self) -> IdMapping | None:
        """Return the id map that is meant, None if none is."""
        from layerkit.api.open import mapping

        return mapping(**asdict(self))


@dataclass(frozen=True)
class Map(PlainMap):
    """An id map."""

    overflow_id: OverflowId = None
    squash: Squash = False


class _Reads:
    """Flags that say how images are read: a platform, and what :class:`Settings` takes under the same names."""

    platform: str | None

    @property
    def settings(self) -> Settings:
        """Return the settings that are meant."""
        return settings(**{name: value for name, value in vars(self).items() if name != "platform"})

    def open(self, ref: str) -> OpenImage:
        """Open the image that ``ref`` names."""
        from layerkit.api.open import open_image

        return open_image(ref, platform=self.platform, settings=self.settings)


@dataclass(frozen=True)
class Reading(_Reads):
    """How images are looked at."""

    platform: Platform = None
    store: StoreDir = None


@dataclass(frozen=True)
class Bringing(_Reads):
    """How images are brought into the store."""

    data: Data = "auto"
    platform: Platform = None
    store: StoreDir = None
    jobs: Jobs = 1


@dataclass(frozen=True)
class Rewriting:
    """How an image, or that of every platform, becomes another one."""

    compression: Compression = "gzip"
    level: Level = None
    jobs: Threads = None
    created: Created = None
    platform: Platform = None
    all_platforms: AllPlatforms = False
    store: StoreDir = None

    def options(self) -> RewriteOptions:
        """Return how the result is to be written."""
        from layerkit.usecases.settings import RewriteOptions

        return RewriteOptions.of(self.compression, self.level, self.jobs, self.created)

    def route(self, src: str, dst: str | None, step: Progress | None) -> Route:
        """Return the way from ``src`` to ``dst``."""
        from layerkit.api.rewrite import Route

        platform = one_platform(self.platform, self.all_platforms)
        return Route(src, dst, settings(self.store), platform, self.all_platforms, step)


def one_platform(platform: str | None, all_platforms: bool) -> str | None:
    """Return the platform that was asked for: what is configured is a default, which --all-platforms overrides."""
    return None if all_platforms and platform == configured("platform") else platform


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
