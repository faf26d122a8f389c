"""The hook's settings file: what is taken, and what is refused with the name of the place."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hook_service import settings

from layerkit.formats.toml_settings import Table
from layerkit.hook.config import INDEX_REPOSITORY, Config, Registry, read_token
from layerkit.model.errors import UsageError

WHOLE = """
listen = "[::1]:9000"
state = "state"
token_file = "token"
platforms = ["linux/amd64"]
workers = 4
engine = "threads"
hold_seconds = 3

[[registry]]
name = "main"
host = "registry.example:5000"
aliases = ["mirror.example"]
repositories = ["library/*", "team/**"]
authfile = "auth.json"

[[map]]
name = "alice"
uid_map = ["0:100000:65536"]

[[map]]
uid_map = ["0:1:65535"]
gid_map = ["0:5:1000"]
overflow_id = 7
rendering = "tar"

[limits]
body_bytes = 4096
rate = 5

[retry]
attempts = 3
first_seconds = 0.5

[tls]
certificate = "c.pem"
key = "k.pem"
client_ca = "ca.pem"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "hook.toml"
    path.write_text(text)
    return path


def load(path: Path) -> Config:
    return Config.read(Table.load(path))


def test_a_whole_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, WHOLE))
    assert (config.host, config.port, config.workers, config.hold_seconds) == ("::1", 9000, 4, 3.0)
    assert config.state == tmp_path / "state"
    assert config.registries["main"].options.authfile == tmp_path / "auth.json"
    assert [remap.mapping for remap in config.remaps] == [
        "uid=0:100000:65536;gid=0:100000:65536", "uid=0:1:65535;gid=0:5:1000;overflow=7",
    ]  # fmt: skip
    assert config.remaps[1].rendering == "tar"
    assert config.bounds.body_bytes == 4096 and config.bounds.rate == 5.0
    assert config.policy.attempts == 3 and config.policy.first_seconds == 0.5
    assert config.tls is not None and config.tls.client_ca == tmp_path / "ca.pem"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("workers = 4", "wrokers = 4", "unknown name 'wrokers'; did you mean workers"),
        ("workers = 4", "workers = 0", "workers = 0: want 1 to 256"),
        ("workers = 4", "workers = true", "workers = True"),
        ("workers = 4", 'workers = "4"', "workers = '4'"),
        ('host = "registry.example:5000"', "", "host is missing"),
        ('host = "registry.example:5000"', 'host = "http://registry"', "is not a registry"),
        ('name = "main"', 'name = "Main Street"', "lower-case"),
        ('uid_map = ["0:1:65535"]', 'uid_map = ["0:1"]', "0:1"),
        ('uid_map = ["0:1:65535"]', "", "give uid_map|without --uid-map"),
        ('rendering = "tar"', 'rendering = "squashfs"', "erofs or tar"),
        ('engine = "threads"', 'engine = "magic"', "dask://"),
        ('listen = "[::1]:9000"', 'listen = "9000"', "ADDRESS:PORT"),
        ("rate = 5", "rate = -1", "above 0"),
        ("rate = 5", "rate = 5\nspeed = 1", "unknown name 'speed'; did you mean "),
        ('key = "k.pem"\n', "", "belong together"),
        ("[limits]", "[limits", "hook.toml"),
        ('aliases = ["mirror.example"]', "aliases = [1]", "list of texts"),
        ('[[map]]\nname = "alice"', '[[map]]\nname = "uid=0:1:65535;gid=0:5:1000;overflow=7"', "two .*map"),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in WHOLE
    with pytest.raises(UsageError, match=says):
        load(write(tmp_path, WHOLE.replace(old, new)))


def test_nothing_to_serve(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="registry"):
        load(write(tmp_path, ""))
    with pytest.raises(UsageError, match="map"):
        load(write(tmp_path, '[[registry]]\nhost = "a.example"\n'))
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "absent")


def test_patterns_of_repositories() -> None:
    registry = Registry("h", "r", repositories=("library/*", "team/**", "exact", "v*/x"))
    yes = ("library/app", "team/a", "team/a/b/c", "exact", "v1/x")
    no = ("library", "library/a/b", "team", "exactly", "xlibrary/app", "v1/y", "v/1/x", "library/app\n", "")
    assert all(registry.serves(name) for name in yes)
    assert not any(registry.serves(name) for name in no)


def test_the_token_is_made_private_or_must_be(tmp_path: Path) -> None:
    config = load(write(tmp_path, WHOLE.replace('token_file = "token"', "")))
    token, path = read_token(config)
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(config) == (token, path)
    config = load(write(tmp_path, WHOLE))
    with pytest.raises(UsageError, match="No such file"):
        read_token(config)
    for text, mode, says in (
        ("x" * 40, 0o644, "chmod 600"), ("short", 0o600, "16 printable"),
        ("with blanks in it, many", 0o600, "printable"),
    ):  # fmt: skip
        (tmp_path / "token").write_text(text)
        (tmp_path / "token").chmod(mode)
        with pytest.raises(UsageError, match=says):
            read_token(config)


def test_where_indexes_are_shared(tmp_path: Path) -> None:
    """By itself only among those who have no store in common; never served as images; a name and nothing else."""
    plain = settings(tmp_path)
    registry = plain.registries["main"]
    assert plain.index_repository(registry) == ""
    assert replace(plain, apart=True).index_repository(registry) == INDEX_REPOSITORY
    assert settings(tmp_path, engine="dask://h:1").index_repository(registry) == INDEX_REPOSITORY
    assert registry.serves("team/app") and not registry.serves(INDEX_REPOSITORY)
    named = settings(tmp_path, registry={"index_repository": "infra/indexes"})
    chosen = named.registries["main"]
    assert named.index_repository(chosen) == "infra/indexes"
    assert not chosen.serves("infra/indexes") and chosen.serves(INDEX_REPOSITORY)
    off = replace(plain, apart=True).with_index_repository("")
    assert off.index_repository(off.registries["main"]) == ""
    for wrong in ("UPPER", "a:b", "a@sha256:" + "0" * 64, "host:5000/a b", "../x"):
        with pytest.raises(UsageError):
            settings(tmp_path, registry={"index_repository": wrong})
        with pytest.raises(UsageError):
            plain.with_index_repository(wrong)
