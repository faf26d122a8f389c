"""From what an image wants and a caller asks for to an OCI runtime's config.json. Pure.

Rules: runtime-spec, config.md and config-linux.md; image-spec, conversion.md.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from layerkit.formats.runtime.passwd import User
from layerkit.formats.runtime.process import ImageProcess
from layerkit.model.errors import InvalidImage, UsageError

JsonObject = dict[str, object]
Extents = Sequence[tuple[int, int, int]]
"""(container id, host id, size) each."""

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_CAPABILITIES = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
    "CAP_SYS_CHROOT",
)  # fmt: skip
"""What docker and containerd give; podman leaves out three of them that ping, login and mknod ask for."""

_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/dev/block", "/sys/firmware",
    "/sys/devices/virtual/powercap", "/sys/fs/selinux",
)  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_UNSAFE_ANNOTATIONS = (
    "run.oci.", "krun.", "module.wasm.", "org.systemd.property.", "org.criu.", "io.katacontainers.",
)  # fmt: skip
"""What runtimes act on (hooks, handlers, other programs): an image must not choose that."""
_RUNTIMES_OWN = ("/", "/dev", "/proc", "/sys")
_TTY_GROUP = 5


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller wants otherwise than the image has it; empty and None take the image's.

    Attributes:
        command: in place of the image's Cmd.
        entrypoint: in place of its Entrypoint; without ``command`` its Cmd goes too, as podman does it.
        env: ``NAME=value``, or ``NAME`` to leave the image's out.
        user: as ``Config.User``. workdir: absolute. hostname: of the container.
        terminal: give the process a terminal.
        read_only: the root filesystem cannot be written to.
        network: ``none`` (a namespace with nothing but lo) or ``host``.
        cap_add, cap_drop: ``NET_ADMIN`` or ``CAP_NET_ADMIN``, or ``all``.
        binds: ``SOURCE:DESTINATION[:OPTIONS]`` each.
        image_volumes: ``bind`` (a folder of the bundle each), ``tmpfs`` or ``ignore``.
        annotations: added to the image's.
        seccomp: ``auto`` (the profile of the host's container engines), ``unconfined``, or the path of a profile.
    """

    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    user: str | None = None
    workdir: str | None = None
    hostname: str = ""
    terminal: bool = False
    read_only: bool = False
    network: str = "none"
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    binds: tuple[str, ...] = ()
    image_volumes: str = "bind"
    annotations: dict[str, str] = field(default_factory=dict)
    seccomp: str = "auto"

    def __post_init__(self) -> None:
        """Refuse words that mean nothing.

        Raises:
            UsageError: an unknown network or kind of volume, a relative path, a malformed variable.
        """
        if self.network not in ("none", "host"):
            raise UsageError(f"--network {self.network!r}: want none or host; a runtime makes no other")
        if self.image_volumes not in ("bind", "tmpfs", "ignore"):
            raise UsageError(f"--image-volume {self.image_volumes!r}: want bind, tmpfs or ignore")
        if self.workdir is not None and not self.workdir.startswith("/"):
            raise UsageError(f"--workdir {self.workdir!r}: want an absolute path in the container")
        for entry in self.env:
            if not entry or entry.startswith("="):
                raise UsageError(f"--env {entry!r}: want NAME=value, or NAME to leave it out")


def arguments(process: ImageProcess, wishes: Wishes) -> list[str]:
    """Return the command to run.

    Raises:
        UsageError: neither the image nor the caller names one.
    """
    entrypoint, cmd = process.entrypoint, process.cmd
    if wishes.entrypoint is not None:
        entrypoint, cmd = wishes.entrypoint, ()
    found = [*entrypoint, *(wishes.command or cmd)]
    if not found or not found[0]:
        raise UsageError("the image names no command; give one after the folder: layerkit bundle REF DIR … COMMAND")
    return found


def environment(process: ImageProcess, wishes: Wishes, home: str) -> list[str]:
    """Return the variables of the process: the image's, then the caller's over them, and a PATH in any case."""
    found = _variables(process.env)
    for entry in wishes.env:
        if "=" in entry:
            found |= _variables([entry])
        else:
            found.pop(entry, None)
    defaults = (
        _variables([DEFAULT_PATH])
        | ({"TERM": "xterm"} if wishes.terminal else {})
        | ({"HOME": home} if home else {})
    )
    return [f"{name}={value}" for name, value in (defaults | found).items()]


def _variables(entries: Iterable[str]) -> dict[str, str]:
    return dict(entry.partition("=")[::2] for entry in entries)


def working_dir(process: ImageProcess, wishes: Wishes) -> str:
    """Return the folder that the process starts in."""
    return posixpath.normpath(wishes.workdir) if wishes.workdir is not None else process.working_dir or "/"


def volumes(process: ImageProcess, wishes: Wishes) -> tuple[list[str], list[str]]:
    """Return the image's volumes that get a mount, and warnings for those that cannot.

    Raises:
        InvalidImage: a volume at the root.
    """
    taken = {bind_mount(text)["destination"] for text in wishes.binds}
    found, warnings = [], []
    for path in process.volumes if wishes.image_volumes != "ignore" else ():
        if path == "/":
            raise InvalidImage("config.Volumes: '/' would hide the whole image; run with --image-volume ignore")
        if any(path == own or path.startswith(own + "/") for own in _RUNTIMES_OWN[1:]):
            warnings.append(f"the image's volume {path} lies where the runtime has its own mounts: left out")
        elif path not in taken:
            found.append(path)
    return found, warnings


def bind_mount(text: str) -> JsonObject:
    """Return the mount that ``SOURCE:DESTINATION[:OPTIONS]`` asks for.

    Raises:
        UsageError: malformed, or a relative path.
    """
    source, _, rest = text.partition(":")
    destination, _, options = rest.partition(":")
    if not source.startswith("/") or not destination.startswith("/"):
        raise UsageError(f"--volume {text!r}: want SOURCE:DESTINATION[:OPTIONS] with absolute paths")
    words = [word for word in options.split(",") if word]
    unknown = [word for word in words if word not in ("ro", "rw", "nosuid", "nodev", "noexec", "bind", "rbind")]
    if unknown:
        raise UsageError(f"--volume {text!r}: unknown option {unknown[0]!r}; want ro, rw, nosuid, nodev, noexec")
    kind = [] if {"bind", "rbind"} & set(words) else ["rbind"]
    return {
        "destination": posixpath.normpath(destination), "type": "bind", "source": source,
        "options": [*kind, "rprivate", *words],
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostSide:
    """What of config.json the host decides.

    Attributes:
        root: of the root filesystem, as the bundle's folder has it.
        uid_map: of the container's user namespace, seen from the runtime's; none for no namespace.
        gid_map: the same for groups.
        first_mounts: before all others, such as one that makes the root filesystem.
        volume_mounts: of the image's volumes.
        rootless: without what an ordinary user's runtime cannot set: devices and limits of cgroups.
        seccomp: the filter of system calls, as a runtime takes it; None for none.
    """

    root: str
    uid_map: Extents = ()
    gid_map: Extents = ()
    first_mounts: Sequence[JsonObject] = ()
    volume_mounts: Sequence[JsonObject] = ()
    rootless: bool = False
    seccomp: JsonObject | None = None


def runtime_config(
    process: ImageProcess, wishes: Wishes, user: User, host: HostSide
) -> tuple[JsonObject, list[str]]:
    """Return config.json, and warnings about what the image asked for and does not get.

    Raises:
        UsageError: nothing to run, or a wish that means nothing.
    """
    annotations, warnings = _annotations(process, wishes)
    capabilities = bounding(wishes)
    # As the engines do: root starts with what it may have; another user gets it from a program's file
    # capabilities and setuid bits only.
    active = list(capabilities) if user.uid == 0 else []
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    if wishes.network == "none":
        namespaces.append({"type": "network"})
    linux: JsonObject = {"maskedPaths": list(_MASKED), "readonlyPaths": list(_READ_ONLY)}
    if host.uid_map or host.gid_map:
        namespaces.append({"type": "user"})
        for name, extents in (("uidMappings", host.uid_map), ("gidMappings", host.gid_map)):
            linux[name] = [{"containerID": c, "hostID": h, "size": n} for c, h, n in extents]
    linux["namespaces"] = namespaces
    if host.seccomp is not None:
        linux["seccomp"] = host.seccomp
    if not host.rootless:
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    shown: JsonObject = {"uid": user.uid, "gid": user.gid}
    if user.groups:
        shown["additionalGids"] = list(user.groups)
    config: JsonObject = {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": wishes.terminal,
            "user": shown,
            "args": arguments(process, wishes),
            "env": environment(process, wishes, user.home),
            "cwd": working_dir(process, wishes),
            "capabilities": {
                "bounding": list(capabilities), "effective": active, "permitted": active, "inheritable": [],
            },
            # setuid programs and file capabilities are kept by layerkit; they must work, too.
            "noNewPrivileges": False,
            # What the runtime inherits. Raising a limit takes CAP_SYS_RESOURCE, which a runtime may lack.
            "rlimits": [],
        },
        "root": {"path": host.root, "readonly": wishes.read_only},
        "mounts": [
            *host.first_mounts, *_default_mounts(wishes, host.gid_map), *host.volume_mounts,
            *map(bind_mount, wishes.binds),
        ],
        "linux": linux,
    }  # fmt: skip
    if wishes.hostname:
        config["hostname"] = wishes.hostname
    if annotations:
        config["annotations"] = annotations
    return config, warnings


def _annotations(process: ImageProcess, wishes: Wishes) -> tuple[dict[str, str], list[str]]:
    unsafe = sorted(key for key in process.annotations if key.startswith(_UNSAFE_ANNOTATIONS))
    kept = {key: value for key, value in process.annotations.items() if key not in unsafe}
    warnings = [f"the image's label {key} would make a runtime act on it: left out" for key in unsafe]
    return kept | wishes.annotations, warnings


def bounding(wishes: Wishes) -> tuple[str, ...]:
    """Return the capabilities that the container may have.

    Raises:
        UsageError: all of them are asked for.
    """

    def full(name: str) -> str:
        return name if name == "ALL" or name.startswith("CAP_") else f"CAP_{name}"

    dropped, added = ({full(name.upper()) for name in names} for names in (wishes.cap_drop, wishes.cap_add))
    if "ALL" in added:
        raise UsageError("--cap-add all: name the capabilities one by one, such as --cap-add SYS_PTRACE")
    kept = set() if "ALL" in dropped else set(DEFAULT_CAPABILITIES) - dropped
    return tuple(sorted(kept | added))


def _default_mounts(wishes: Wishes, gid_map: Extents) -> list[JsonObject]:
    tty = not gid_map or any(c <= _TTY_GROUP < c + n for c, _, n in gid_map)
    pts = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *([f"gid={_TTY_GROUP}"] if tty else [])]
    still = ["nosuid", "noexec", "nodev", "ro"]
    mounts: list[tuple[str, str, str, list[str]]] = [
        ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ("/dev/pts", "devpts", "devpts", pts),
        ("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        ("/dev/mqueue", "mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
    ]
    if wishes.network == "none":
        mounts.append(("/sys", "sysfs", "sysfs", still))
        mounts.append(("/sys/fs/cgroup", "cgroup", "cgroup", [*still, "relatime"]))
    else:
        # sysfs belongs to a network namespace: the host's can be shown, not mounted.
        mounts.append(("/sys", "bind", "/sys", ["rbind", "rprivate", *still]))
    return [{"destination": d, "type": t, "source": s, "options": o} for d, t, s, o in mounts]
