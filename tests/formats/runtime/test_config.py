"""From an image's config to an OCI runtime's config.json: image-spec's conversion document, line by line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layerkit.formats.runtime import config as rc
from layerkit.formats.runtime.passwd import User, resolve
from layerkit.formats.runtime.process import ImageProcess, image_process
from layerkit.model.errors import InvalidImage, UsageError

PASSWD = (
    b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n12:x:77:78::/tmp:/bin/sh\n#no:x:5:5\nbad\n"
)
GROUP = b"root:x:0:\nstaff:x:50:app,other\napp:x:1001:\nvideo:x:44: app\nwheel:x:10:root\nbroken:x:abc:app\n"


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("", User(0, 0, (10,), "/root")),
        ("root", User(0, 0, (10,), "/root")),
        ("app", User(1000, 1001, (44, 50), "/home/app")),
        ("app:staff", User(1000, 50, (), "/home/app")),
        ("app:123", User(1000, 123, (), "/home/app")),
        # A number says all: no supplementary groups (conversion.md); the default group is the user's own.
        ("1000", User(1000, 1001, (), "/home/app")),
        ("1000:0", User(1000, 0, (), "/home/app")),
        ("4321", User(4321, 0, (), "")),
        ("4321:video", User(4321, 44, (), "")),
        # A name made of digits is a name first.
        ("12", User(77, 78, (), "/tmp")),
    ],
)
def test_users_are_the_images_own(spec: str, want: User) -> None:
    assert resolve(spec, PASSWD, GROUP) == want


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("nobody-here", InvalidImage), ("app:no-group", InvalidImage), ("4294967295", InvalidImage),
        ("0:4294967295", InvalidImage), ("-1", InvalidImage), ("1 000", InvalidImage), ("٣", InvalidImage),
    ],
)  # fmt: skip
def test_users_that_are_none(spec: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="name one that it has"):
        resolve(spec, PASSWD, GROUP)


def test_an_image_without_accounts() -> None:
    assert resolve("", b"", b"") == User(0, 0)
    assert resolve("7:8", b"", b"") == User(7, 8)
    with pytest.raises(InvalidImage, match="no user 'app'"):
        resolve("app", b"", b"")


def process(config: dict[str, Any] | None = None, **top: Any) -> ImageProcess:
    document = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}, **top}
    if config is not None:
        document["config"] = config
    return image_process(json.dumps(document).encode(), "config")


def made(config: dict[str, Any] | None = None, wishes: rc.Wishes | None = None, **more: Any) -> dict[str, Any]:
    user = more.pop("user", User(0, 0))
    chosen = wishes or rc.Wishes(command=("sh",))
    return rc.runtime_config(process(config), chosen, user, rc.HostSide("rootfs", **more))[0]


def test_verbatim_fields() -> None:
    config = {
        "Env": ["A=1", "B=x=y", "PATH=/only"], "Entrypoint": ["/entry", "-x"], "Cmd": ["one", "two"],
        "WorkingDir": "/srv/./app/",
    }  # fmt: skip
    shown = made(config, rc.Wishes())["process"]
    assert shown["args"] == ["/entry", "-x", "one", "two"]
    assert sorted(shown["env"]) == ["A=1", "B=x=y", "PATH=/only"]
    assert shown["cwd"] == "/srv/app"


def test_an_image_that_says_nothing() -> None:
    shown = made(None)["process"]
    assert (shown["args"], shown["cwd"]) == (["sh"], "/")
    assert shown["env"] == ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    with pytest.raises(UsageError, match="names no command"):
        made(None, rc.Wishes())


def test_annotations_and_their_precedence() -> None:
    image = process(
        {
            "StopSignal": "SIGQUIT", "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
            "Labels": {"org.opencontainers.image.author": "label", "mine": "1", "run.oci.hooks.stdout": "/etc/x",
                       "org.systemd.property.ExecStartPre": "x"},
        },
        author="config", created="2025-01-01T00:00:00Z", variant="v8",
        **{"os.version": "6", "os.features": ["a", "b"]},
    )  # fmt: skip
    shown, warnings = rc.runtime_config(image, rc.Wishes(command=("x",)), User(0, 0), rc.HostSide("rootfs"))
    prefix = "org.opencontainers.image."
    assert shown["annotations"] == {
        f"{prefix}os": "linux", f"{prefix}architecture": "amd64", f"{prefix}variant": "v8",
        f"{prefix}os.version": "6",
        f"{prefix}os.features": "a,b", f"{prefix}author": "label", f"{prefix}created": "2025-01-01T00:00:00Z",
        f"{prefix}stopSignal": "SIGQUIT", f"{prefix}exposedPorts": "53/udp,80/tcp", "mine": "1",
    }  # fmt: skip
    # An image must not choose programs and properties of the host; what is left out is said.
    assert [w.split()[3] for w in warnings] == ["org.systemd.property.ExecStartPre", "run.oci.hooks.stdout"]


def test_what_the_caller_wants_goes_over_the_image() -> None:
    config = {"Env": ["A=1", "B=2"], "Entrypoint": ["/entry"], "Cmd": ["one"], "User": "app", "WorkingDir": "/w"}
    wishes = rc.Wishes(
        command=("two",), env=("A=9", "B", "C=3"), workdir="/other", hostname="h", terminal=True, read_only=True,
        cap_add=("sys_ptrace",), cap_drop=("CAP_MKNOD", "kill"), annotations={"k": "v"},
    )  # fmt: skip
    shown = made(config, wishes)
    assert shown["process"]["args"] == ["/entry", "two"]
    env = dict(entry.split("=", 1) for entry in shown["process"]["env"])
    assert (env["A"], env["C"], env["TERM"], "B" in env) == ("9", "3", "xterm", False)
    assert (shown["process"]["cwd"], shown["hostname"]) == ("/other", "h")
    assert shown["process"]["terminal"] is shown["root"]["readonly"] is True
    caps = set(shown["process"]["capabilities"]["bounding"])
    assert "CAP_SYS_PTRACE" in caps and not caps & {"CAP_MKNOD", "CAP_KILL"}
    # An entrypoint of one's own takes the image's command away, too.
    assert made(config, rc.Wishes(entrypoint=("/mine",)))["process"]["args"] == ["/mine"]
    assert made(config, rc.Wishes(entrypoint=(), command=("x",)))["process"]["args"] == ["x"]
    everything = made(config, rc.Wishes(cap_drop=("all",), cap_add=("chown",)))["process"]["capabilities"]
    assert everything["bounding"] == ["CAP_CHOWN"]


def test_another_user_than_root_starts_without_capabilities() -> None:
    caps = made(None, user=User(1000, 1000, (5, 6)))["process"]
    assert caps["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [5, 6]}
    assert (caps["capabilities"]["effective"], caps["capabilities"]["permitted"]) == ([], [])
    assert "CAP_NET_RAW" in caps["capabilities"]["bounding"]
    assert caps["noNewPrivileges"] is False


def test_namespaces_and_maps() -> None:
    shown = made(None, uid_map=((0, 100000, 10), (10, 300000, 5)), gid_map=((0, 200000, 4),))
    linux = shown["linux"]
    assert {"type": "user"} in linux["namespaces"]
    assert linux["uidMappings"] == [
        {"containerID": 0, "hostID": 100000, "size": 10}, {"containerID": 10, "hostID": 300000, "size": 5},
    ]  # fmt: skip
    assert linux["gidMappings"] == [{"containerID": 0, "hostID": 200000, "size": 4}]
    # A gid that is not in the map would be refused by devpts.
    pts = next(m for m in shown["mounts"] if m["destination"] == "/dev/pts")
    assert not [o for o in pts["options"] if o.startswith("gid")]
    assert {"type": "user"} not in made(None)["linux"]["namespaces"]
    assert "resources" in linux
    assert "resources" not in made(None, rootless=True)["linux"]


def test_the_hosts_network() -> None:
    shown = made(None, rc.Wishes(command=("x",), network="host"))
    assert {"type": "network"} not in shown["linux"]["namespaces"]
    assert next(m for m in shown["mounts"] if m["destination"] == "/sys")["type"] == "bind"


def test_volumes() -> None:
    image = process({"Volumes": {"/data": {}, "cache/": {}, "/dev/shm/x": {}, "/srv": {}, "/a/../b": {}}})
    found, warnings = rc.volumes(image, rc.Wishes(binds=("/host:/srv:ro",)))
    assert found == ["/b", "/cache", "/data"]
    assert "/dev/shm/x" in warnings[0]
    assert rc.volumes(image, rc.Wishes(image_volumes="ignore")) == ([], [])
    with pytest.raises(InvalidImage, match="hide the whole image"):
        rc.volumes(process({"Volumes": {"/": {}}}), rc.Wishes())
    bind = rc.bind_mount("/host:/srv:ro,noexec")
    assert bind["options"] == ["rbind", "rprivate", "ro", "noexec"]


@pytest.mark.parametrize(
    "config",
    [
        {"Env": ["novalue"]}, {"Env": ["=x"]}, {"Env": "A=1"}, {"Cmd": "sh"}, {"Cmd": ["a\0b"]}, {"User": 5},
        {"Volumes": ["/x"]}, {"Labels": {"a": 1}}, {"Entrypoint": [1]}, [],
    ],
)  # fmt: skip
def test_malformed_configs(config: Any) -> None:
    with pytest.raises(InvalidImage, match="config"):
        process(config)


def test_another_systems_image() -> None:
    with pytest.raises(InvalidImage, match="want 'linux', found 'windows'"):
        process({}, os="windows")


@pytest.mark.parametrize(
    "wishes",
    [
        {"network": "bridge"}, {"image_volumes": "x"}, {"workdir": "rel"}, {"env": ("=x",)},
        {"binds": ("rel:/x",)}, {"binds": ("/x",)}, {"binds": ("/a:/b:weird",)}, {"cap_add": ("all",)},
    ],
)  # fmt: skip
def test_wishes_that_mean_nothing(wishes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--"):
        made(None, rc.Wishes(command=("x",), **wishes))
