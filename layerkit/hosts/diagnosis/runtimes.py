"""Per container runtime of this host: who changes owners best, and how to have it so.

What a kernel and a filesystem can do is tried, where the runtime keeps its layers. Only what a runtime itself can
do is taken from its version, because there is nothing to try: podman maps its layers with idmapped mounts from
4.3 on, containerd from 2.1 on (``remap-ids``), dockerd never does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerkit.linux import userns
from layerkit.linux.probe import Features
from layerkit.model.errors import UsageError

IDMAPPED, LAYERKIT, NEITHER, UNKNOWN = "idmapped mounts", "layerkit", "neither", "not known"
_VERSION_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Runtime:
    """What is best for one runtime.

    Attributes:
        name: of the runtime and its way of running.
        version: as it says itself, "" if it is not installed.
        layers: the folder of its layers. filesystem: what that lies on.
        answer: ``idmapped mounts``, ``layerkit``, ``neither`` or ``not known``.
        why: the reason.
        how: what to run or to write, "" where there is nothing to do.
        clone: whether copy-up shares blocks there; None where it could not be tried.
        clone_why: what that hangs on.
    """

    name: str
    version: str
    layers: str
    filesystem: str
    answer: str
    why: str
    how: str
    clone: bool | None
    clone_why: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def examine_runtimes(store: Path) -> tuple[Runtime, ...]:
    """Return what is best for each runtime that this host has or could have; ``store`` is for bundles."""
    places = _Places()
    return (
        _podman_rootful(places),
        _podman_rootless(places),
        _containerd(places),
        _docker(places),
        *(_bundle(places, name, store) for name in ("runc", "crun")),
    )


class _Places:
    """Features of the filesystems that runtimes use, each asked once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], Features | None] = {}

    def at(self, folder: Path) -> Features | None:
        """Return the features where ``folder`` is or would be, None if this user cannot try them there."""
        place = probe_place(folder)
        key = (place.stat().st_dev, "" if os.access(place, os.W_OK) else str(place))
        if key not in self._known:
            features: Features | None = Features(place)
            with suppress(UsageError):
                assert features is not None
                _ = features.reflink
                self._known[key] = features
                return features
            self._known[key] = None
        return self._known[key]


def probe_place(folder: Path) -> Path:
    """Return the highest folder above ``folder`` on its filesystem that can be written to.

    A probe makes a folder for a moment; it need not be among the runtime's own.
    """
    place = Path(os.path.realpath(folder))
    # Not Path.is_dir, which raises where a folder of root's is closed to us.
    while not os.path.isdir(place):
        place = place.parent
    best = place
    with suppress(OSError):
        while place != place.parent and place.parent.stat().st_dev == best.stat().st_dev:
            place = place.parent
            if os.access(place, os.W_OK):
                best = place
    return best


def _podman_rootful(places: _Places) -> Runtime:
    version = version_of("podman")
    layers = storage_root(rootful=True) / "overlay"

    def judge(features: Features) -> tuple[str, str, str]:
        if not features.privileged:
            return UNKNOWN, "only root can try what root's podman can do", "run `layerkit doctor` as root"
        if features.store_idmap and (not version or _at_least(version, 4, 3)):
            return (
                IDMAPPED,
                f"podman 4.3 and later idmaps its layers on {features.filesystem}: free, and one page cache",
                "nothing to set up: `podman run --uidmap 0:100000:65536 ...`, --userns=auto",
            )
        why = (
            f"podman {version or 'before 4.3'} copies each image for each map"
            if features.store_idmap
            else f"{features.filesystem} cannot be mounted idmapped, so podman copies each image for each map"
        )
        return _if_mountable(
            features.overlay_trusted or features.overlay_classic, why, "layerkit setup podman (as root)"
        )

    return _runtime(places, "podman, rootful", version, layers, judge)


def _podman_rootless(places: _Places) -> Runtime:
    version = version_of("podman")
    layers = storage_root(rootful=False) / "overlay"

    def judge(features: Features) -> tuple[str, str, str]:
        why = "the kernel lets no ordinary user map a mount, so podman copies each image for each map"
        if not _has_subids():
            return NEITHER, "no user of this host has subordinate ids", "add lines to /etc/subuid and /etc/subgid"
        if features.overlay_unprivileged:
            return LAYERKIT, why, "layerkit setup podman (as the user)"
        return (
            NEITHER,
            why + "; and an unprivileged overlay over data-only layers was refused when it was tried",
            "Linux 6.16 or newer with user namespaces allowed (user.max_user_namespaces, AppArmor); until then "
            "layerkit remap --form portable makes an image for one map",
        )

    return _runtime(places, "podman, rootless", version, layers, judge)


def _containerd(places: _Places) -> Runtime:
    version = version_of("containerd")
    layers = Path("/var/lib/containerd")

    def judge(features: Features) -> tuple[str, str, str]:
        if not features.privileged:
            return UNKNOWN, "only root can try what containerd can do", "run `layerkit doctor` as root"
        if features.store_idmap and version and _at_least(version, 2, 1):
            return (
                IDMAPPED,
                f"containerd 2.1 and later maps snapshots on {features.filesystem} with idmapped mounts",
                'in config.toml: [plugins."io.containerd.snapshotter.v1.overlayfs"] and capabilities '
                '["remap-ids"]; pods with hostUsers: false',
            )
        old = f"containerd {version or 'before 2.1'} copies the image for each map (1.6 loses setuid by it)"
        why = old if features.store_idmap else f"{features.filesystem} cannot be mounted idmapped"
        return _if_mountable(features.overlay_trusted, why, "layerkit setup containerd")

    return _runtime(places, "containerd", version, layers, judge)


def _docker(places: _Places) -> Runtime:
    version = version_of("dockerd")

    def judge(features: Features) -> tuple[str, str, str]:
        return (
            LAYERKIT,
            "dockerd maps no mounts: userns-remap keeps a store for each map; and it takes plain images only",
            "layerkit remap IMAGE docker-archive:OUT --form portable, or optimize and flatten; docker load",
        )

    return _runtime(places, "docker", version, Path("/var/lib/docker"), judge)


def _bundle(places: _Places, name: str, store: Path) -> Runtime:
    def judge(features: Features) -> tuple[str, str, str]:
        if features.privileged and features.store_idmap:
            return (
                IDMAPPED,
                f"{features.filesystem} and layerkit's own metadata can be mounted idmapped: 0 bytes a map",
                "layerkit bundle IMAGE DIR --uid-map C:H:N does it by itself",
            )
        if not features.privileged:
            return _if_mountable(
                features.overlay_userxattr if features.can_mount else features.overlay_unprivileged,
                "the kernel lets no ordinary user map a mount",
                "layerkit bundle IMAGE DIR --rootless",
            )
        return _if_mountable(
            features.overlay_trusted or features.overlay_classic,
            f"{features.filesystem} cannot be mounted idmapped",
            "layerkit bundle IMAGE DIR --uid-map C:H:N",
        )

    return _runtime(places, f"{name}, bundles", version_of(name), store, judge)


def _if_mountable(mountable: bool, why: str, how: str) -> tuple[str, str, str]:
    if mountable:
        return LAYERKIT, why, how
    return (
        NEITHER,
        why + "; and overlayfs refused metadata over data when it was tried",
        "keep the layers on ext4, xfs or btrfs with Linux 4.19 or newer; `layerkit unpack` copies",
    )


def _runtime(
    places: _Places, name: str, version: str, layers: Path, judge: Callable[[Features], tuple[str, str, str]]
) -> Runtime:
    features = places.at(layers)
    if features is None:
        return Runtime(
            name, version, str(layers), "", UNKNOWN, f"this user cannot write near {layers}, to try it",
            "run `layerkit doctor` as root, or as the user whose runtime it is", None, "",
        )  # fmt: skip
    answer, why, how = judge(features)
    where = f"uppers and layers lie on {features.filesystem}"
    clone_why = (
        f"{where}, which shares blocks: an open for writing copies nothing"
        if features.reflink
        else f"{where}, which cannot share blocks: an open for writing copies the file (xfs and btrfs would not)"
    )
    return Runtime(name, version, str(layers), features.filesystem, answer, why, how, features.reflink, clone_why)


def version_of(program: str) -> str:
    """Return the version that a program tells, "" if it is not installed or does not say."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)", done.stdout)
    return found[1] if found else ""


def _at_least(version: str, *wanted: int) -> bool:
    return tuple(int(part) for part in version.split(".")) >= wanted


def storage_root(*, rootful: bool) -> Path:
    """Return the graph root of containers-storage that storage.conf names, or the default one."""
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "containers/storage.conf"
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "containers/storage"
    if rootful:
        candidates = [Path("/etc/containers/storage.conf"), Path("/usr/share/containers/storage.conf")]
        root, keys = Path("/var/lib/containers/storage"), ["graphroot"]
    else:
        candidates = [own, *(Path(p) for p in ("/etc/containers/storage.conf",))]
        # Only a user's own file may name a graphroot for rootless podman.
        root, keys = data, ["rootless_storage_path"]
    if named := os.environ.get("CONTAINERS_STORAGE_CONF"):
        candidates, keys = [Path(named)], ["graphroot"]
    for path in candidates:
        try:
            storage = tomllib.loads(path.read_text()).get("storage", {})
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue
        for key in (*keys, *(["graphroot"] if path == own else [])):
            value = storage.get(key) if isinstance(storage, dict) else None
            if isinstance(value, str) and value and "$" not in value:
                return Path(value)
        break
    return root


def _has_subids() -> bool:
    if not userns.in_initial_userns():
        return True  # who is in one has got some
    try:
        return all(Path(name).read_text().strip() for name in ("/etc/subuid", "/etc/subgid"))
    except OSError:
        return False


__all__ = [
    "IDMAPPED",
    "LAYERKIT",
    "NEITHER",
    "UNKNOWN",
    "Runtime",
    "examine_runtimes",
    "probe_place",
    "storage_root",
]
