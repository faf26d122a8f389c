"""Settings: each comes from one place, the nearest one wins, and a misspelt name is told."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from layerkit.linux import configuration as c
from layerkit.model.errors import UsageError
from layerkit.model.limits import Limits


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return the files of the machine and of the user, which do not exist yet, in a clean environment."""
    system, user = tmp_path / "etc/config.toml", tmp_path / "home/layerkit/config.toml"
    for path in (system, user):
        path.parent.mkdir(parents=True)
    monkeypatch.setattr(c, "SYSTEM_FILE", system)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    for setting in c.SETTINGS.values():
        for name in (setting.variable, *setting.others):
            monkeypatch.delenv(name, raising=False)
    return system, user


def test_each_place_gives_way_to_the_nearer_one(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    system, user = files
    assert (c.configured("data"), c.everything()["data"].origin) == ("auto", "default")
    system.write_text('data = "tar"\njobs = 3\n[limits]\nlayers_per_image = 9\n')
    assert c.everything()["data"] == c.Configured("tar", str(system))
    user.write_text('data = "objects"\n')
    assert c.everything()["data"] == c.Configured("objects", str(user))
    monkeypatch.setenv("LAYERKIT_DATA", "auto")
    assert c.everything()["data"] == c.Configured("auto", "LAYERKIT_DATA")
    assert c.configured("jobs") == 3
    assert c.limits().layers_per_image == 9
    monkeypatch.setenv("LAYERKIT_LIMIT_LAYERS_PER_IMAGE", "8")
    assert c.limits() == Limits(layers_per_image=8)


def test_a_file_that_changes_is_read_again(files: tuple[Path, Path]) -> None:
    files[1].write_text("jobs = 2\n")
    assert c.configured("jobs") == 2
    files[1].write_text("jobs = 12\n")
    assert c.configured("jobs") == 12


def test_variables_of_other_tools_come_after_ours(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files[1].write_text('authfile = "/from/file"\n')
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "/theirs")
    assert c.configured("authfile") == Path("/theirs")
    monkeypatch.setenv("LAYERKIT_AUTHFILE", "~/ours")
    assert c.configured("authfile") == Path.home() / "ours"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stroe = '/x'", "there is no setting 'stroe'; did you mean store?"),
        ("tls-verify = false", "there is no setting 'tls-verify'; did you mean tls_verify?"),
        ("[limits]\nlayer_per_image = 1", "did you mean limits.layers_per_image?"),
        ("limits = 3", r"write \[limits\]"),
        ("zzzzzzzz = 1", "there is no setting 'zzzzzzzz'$"),
        ("jobs = 0", "jobs = 0: want a whole number from 1 to 64"),
        ("jobs = true", "want a whole number"),
        ("jobs = 1.5", "want a whole number"),
        ("store = 3", "want a path"),
        ("mirrors = 'perhaps'", "want true or false"),
        ("compression = 'xz'", "want gzip, zstd, zstd:chunked or none"),
        ("data = [", "Invalid"),
    ],
)
def test_what_a_file_may_not_say(files: tuple[Path, Path], text: str, says: str) -> None:
    files[1].write_text(text)
    with pytest.raises(UsageError, match=says) as error:
        c.everything()
    assert str(files[1]) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("JOBS", "many"), ("TLS_VERIFY", "maybe"), ("DATA", "zip"), ("LIMIT_FILE_BYTES", "-1")]
)
def test_what_a_variable_may_not_say(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LAYERKIT_{name}", value)
    with pytest.raises(UsageError, match=f"LAYERKIT_{name}='{value}': want"):
        c.everything()


def test_a_misspelt_variable_is_told_and_those_of_others_are_not(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = c.unknown_variables()
    for name in ("SERVICE_HOST", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP_ADDR", "TEST_ANYTHING", "KEY_PASSWORD"):
        monkeypatch.setenv(f"LAYERKIT_{name}", "x")
    assert c.unknown_variables() == before
    monkeypatch.setenv("LAYERKIT_STROE", "x")
    told = set(c.unknown_variables()) - set(before)
    assert told == {"LAYERKIT_STROE: there is no such variable; did you mean LAYERKIT_STORE?"}


def test_every_bound_has_a_key_and_a_variable() -> None:
    names = {field.name for field in fields(Limits)}
    assert {key.removeprefix("limits.") for key in c.SETTINGS if key.startswith("limits.")} == names
    assert c.SETTINGS["limits.file_bytes"].variable == "LAYERKIT_LIMIT_FILE_BYTES"
    assert c.SETTINGS["tls_verify"].variable == "LAYERKIT_TLS_VERIFY"
