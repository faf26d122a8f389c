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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from layerkit.hosts.podman.storage_conf import storage_conf
from layerkit.linux import userns
from layerkit.linux.probe import Features
from layerkit.model.errors import UsageError
from layerkit.model.reports import Report

IDMAPPED, LAYERKIT, NEITHER, UNKNOWN = "idmapped mounts", "layerkit", "neither", "not known"
_VERSION_SECONDS = 10
Verdict = tuple[str, str, str]
"""(answer, why, how) of a :class:`Runtime`."""
_AS_ROOT = "run `layerkit doctor` as root"


@dataclass(frozen=True, slots=True)
class Runtime(Report):
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


def examine_runtimes(store: Path) -> tuple[Runtime, ...]:
    """Return what is best for each runtime that this host has or could have; ``store`` is for bundles."""
    known: dict[tuple[int, str], Features | None] = {}
    found = []
    for name, program, layers, judge in (
        ("podman, rootful", "podman", storage_root(rootful=True) / "overlay", _podman_rootful),
        ("podman, rootless", "podman", storage_root(rootful=False) / "overlay", _podman_rootless),
        ("containerd", "containerd", Path("/var/lib/containerd"), _containerd),
        ("docker", "dockerd", Path("/var/lib/docker"), _docker),
        ("runc, bundles", "runc", store, _bundle),
        ("crun, bundles", "crun", store, _bundle),
    ):
        version = version_of(program)
        # Features of a filesystem that several use are asked once.
        place = probe_place(layers)
        key = (place.stat().st_dev, "" if os.access(place, os.W_OK) else str(place))
        features = known[key] = known[key] if key in known else _features(place)
        if features is None:
            why, how = (
                f"this user cannot write near {layers}, to try it",
                f"{_AS_ROOT}, or as the user whose runtime it is",
            )
            found.append(Runtime(name, version, str(layers), "", UNKNOWN, why, how, None, ""))
            continue
        verdict, reflink = judge(features, version), features.reflink
        said = (
            "shares blocks: an open for writing copies nothing"
            if reflink
            else "cannot share blocks: an open for writing copies the file (xfs and btrfs would not)"
        )
        clone_why = f"uppers and layers lie on {features.filesystem}, which {said}"
        found.append(Runtime(name, version, str(layers), features.filesystem, *verdict, reflink, clone_why))
    return tuple(found)


def _features(place: Path) -> Features | None:
    """Return the features at ``place``, None if this user cannot try them there."""
    features = Features(place)
    with suppress(UsageError):
        _ = features.reflink
        return features
    return None


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


def _podman_rootful(features: Features, version: str) -> Verdict:
    if not features.privileged:
        return UNKNOWN, "only root can try what root's podman can do", _AS_ROOT
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
    mountable = features.overlay_trusted or features.overlay_classic
    return _if_mountable(mountable, why, "layerkit setup podman (as root)")


def _podman_rootless(features: Features, version: str) -> Verdict:
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


def _containerd(features: Features, version: str) -> Verdict:
    if not features.privileged:
        return UNKNOWN, "only root can try what containerd can do", _AS_ROOT
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


def _docker(features: Features, version: str) -> Verdict:
    return (
        LAYERKIT,
        "dockerd maps no mounts: userns-remap keeps a store for each map; and it takes plain images only",
        "layerkit remap IMAGE docker-archive:OUT --form portable, or optimize and flatten; docker load",
    )


def _bundle(features: Features, version: str) -> Verdict:
    if features.privileged and features.store_idmap:
        return (
            IDMAPPED,
            f"{features.filesystem} and layerkit's own metadata can be mounted idmapped: 0 bytes a map",
            "layerkit bundle IMAGE DIR --uid-map C:H:N does it by itself",
        )
    if not features.privileged:
        mountable = features.overlay_userxattr if features.can_mount else features.overlay_unprivileged
        why = "the kernel lets no ordinary user map a mount"
        return _if_mountable(mountable, why, "layerkit bundle IMAGE DIR --rootless")
    mountable = features.overlay_trusted or features.overlay_classic
    why = f"{features.filesystem} cannot be mounted idmapped"
    return _if_mountable(mountable, why, "layerkit bundle IMAGE DIR --uid-map C:H:N")


def _if_mountable(mountable: bool, why: str, how: str) -> Verdict:
    if mountable:
        return LAYERKIT, why, how
    return (
        NEITHER,
        why + "; and overlayfs refused metadata over data when it was tried",
        "keep the layers on ext4, xfs or btrfs with Linux 4.19 or newer; `layerkit unpack` copies",
    )


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
    system, ours = Path("/etc/containers/storage.conf"), "graphroot"
    if named := os.environ.get("CONTAINERS_STORAGE_CONF"):
        candidates = {Path(named): [ours]}
    elif rootful:
        candidates = {each: [ours] for each in (system, Path("/usr/share/containers/storage.conf"))}
    else:
        # Only a user's own file may name a graphroot for rootless podman.
        keys = ["rootless_storage_path"]
        candidates = {storage_conf(privileged=False): [*keys, ours], system: keys}
    for path, keys in candidates.items():
        try:
            storage = tomllib.loads(path.read_text()).get("storage", {})
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue
        for value in map(storage.get, keys) if isinstance(storage, dict) else ():
            if isinstance(value, str) and value and "$" not in value:
                return Path(value)
        break
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return Path("/var/lib/containers/storage") if rootful else data / "containers/storage"


def _has_subids() -> bool:
    if not userns.in_initial_userns():
        return True  # who is in one has got some
    try:
        return all(Path(name).read_text().strip() for name in ("/etc/subuid", "/etc/subgid"))
    except OSError:
        return False
