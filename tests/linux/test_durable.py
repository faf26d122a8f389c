"""The place beside a target: nobody else can make it, enter it, swap it, or have us remove what is not ours."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_images import below
from needs import need_root

from layerkit.linux import durable
from layerkit.linux.durable import NEW, Staging, staging_beside, whole_file

NAME = re.compile(r"\.x\.([0-9a-f]{32})\.layerkit-tmp")
OTHER = 65534


@contextlib.contextmanager
def killed(folder: Path, token: str) -> Iterator[Path]:
    """Give a staging folder for ``x`` as a killed run leaves it."""
    place = folder / f".x.{token}.layerkit-tmp"
    (place / token / NEW).mkdir(parents=True)
    (place / token / NEW / "f").write_text("half")
    place.chmod(0o700)
    yield place


def put(staging: Staging, text: str) -> None:
    with os.fdopen(os.open(NEW, os.O_WRONLY | os.O_CREAT, dir_fd=staging.fd), "w") as file:
        file.write(text)


def test_it_has_a_name_and_a_mode_of_its_own(tmp_path: Path) -> None:
    seen = set()
    mask = os.umask(0)
    try:
        for _ in range(3):
            with staging_beside(tmp_path / "x"):
                (outer,) = tmp_path.iterdir()
                name = NAME.fullmatch(outer.name)
                assert name is not None and durable.is_staging(outer.name)
                assert os.listdir(outer) == [name[1]]
                for folder in (outer, outer / name[1]):
                    assert folder.stat().st_mode & 0o7777 == 0o700
                seen.add(outer.name)
            assert below(tmp_path) == []
    finally:
        os.umask(mask)
    assert len(seen) == 3


def test_a_name_that_is_taken_is_left_and_another_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(["a" * 32, "b" * 32, "c" * 32])
    monkeypatch.setattr(secrets, "token_hex", lambda size: next(tokens))
    taken, link = tmp_path / f".x.{'a' * 32}.layerkit-tmp", tmp_path / f".x.{'b' * 32}.layerkit-tmp"
    taken.mkdir()
    (taken / "mine").touch()
    link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with staging_beside(tmp_path / "x") as staging:
        put(staging, "whole")
        staging.publish("x")
    assert (tmp_path / "x").read_text() == "whole"
    assert below(tmp_path) == sorted([taken.name, f"{taken.name}/mine", link.name, "elsewhere", "x"])
    monkeypatch.setattr(secrets, "token_hex", lambda size: "a" * 32)
    with pytest.raises(FileExistsError, match="no free name"), staging_beside(tmp_path / "x"):
        pass


def test_a_long_name_fits(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 120)
    with whole_file(target) as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == [target.name]


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    with killed(tmp_path, "a" * 32) as left, staging_beside(tmp_path / "x") as staging:
        assert not left.exists() and not staging.others
    # Killed between the two mkdirs.
    (tmp_path / f".x.{'b' * 32}.layerkit-tmp").mkdir(mode=0o700)
    with staging_beside(tmp_path / "y"):
        assert len(list(tmp_path.iterdir())) == 2, "of another target"
    with staging_beside(tmp_path / "x"):
        assert len(list(tmp_path.iterdir())) == 1
    assert below(tmp_path) == []


def test_what_somebody_is_at_work_in_stays(tmp_path: Path) -> None:
    with staging_beside(tmp_path / "x") as first, staging_beside(tmp_path / "x") as second:
        assert (first.others, second.others) == (False, True)
        for staging in (second, first):
            put(staging, "whole")
    assert below(tmp_path) == []


def test_only_what_such_a_run_made_is_removed(tmp_path: Path) -> None:
    """Who may rename in the folder gives a name of ours to another folder of ours, or to a link."""
    victim = tmp_path / f".x.{'a' * 32}.layerkit-tmp"
    victim.mkdir(mode=0o700)
    (victim / "mine").write_text("mine")
    with killed(tmp_path, "b" * 32) as left:
        elsewhere = left.rename(tmp_path / "elsewhere")
    (tmp_path / f".x.{'b' * 32}.layerkit-tmp").symlink_to(elsewhere)
    (tmp_path / f".x.{'c' * 32}.layerkit-tmp").write_text("mine")
    before = below(tmp_path)
    with staging_beside(tmp_path / "x"):
        pass
    assert below(tmp_path) == before


def test_what_another_user_left_is_theirs(tmp_path: Path) -> None:
    need_root()
    with killed(tmp_path, "a" * 32) as left:
        os.chown(left, OTHER, OTHER)
    before = below(tmp_path)
    with staging_beside(tmp_path / "x") as staging:
        assert not staging.others
    assert below(tmp_path) == before


def test_a_swap_while_it_is_written_leads_nowhere(tmp_path: Path) -> None:
    with staging_beside(tmp_path / "x") as staging:
        (outer,) = tmp_path.iterdir()
        token = os.listdir(outer)[0]
        outer.rename(tmp_path / "moved")
        (outer / token).mkdir(parents=True)
        (outer / token / NEW).write_text("theirs")
        put(staging, "whole")
        staging.publish("x")
    assert (tmp_path / "x").read_text() == "whole"
    assert (outer / token / NEW).read_text() == "theirs", "what lies there is not ours to remove"


def test_a_swap_before_it_is_opened_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    real = os.mkdir
    swapped: list[Path] = []

    def swap(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        if durable.is_staging(str(path)) and len(swapped) < 2:
            place = tmp_path / path
            place.rename(tmp_path / f"moved{len(swapped)}")
            if swapped:
                place.symlink_to(tmp_path / "victim")
            else:
                place.mkdir()
                (place / "theirs").touch()
                os.chown(place, OTHER, OTHER)
            swapped.append(place)

    (tmp_path / "victim").mkdir()
    monkeypatch.setattr(os, "mkdir", swap)
    with staging_beside(tmp_path / "x") as staging:
        put(staging, "whole")
        staging.publish("x")
    assert (tmp_path / "x").read_text() == "whole"
    assert os.listdir(swapped[0]) == ["theirs"]
    assert os.listdir(tmp_path / "victim") == []
    assert sum(durable.is_staging(name) for name in os.listdir(tmp_path)) == 2, "theirs alone are left"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target, victim = tmp_path / "x", tmp_path / "victim"
    victim.write_text("mine")
    for name in ("x", "x.new", ".x.layerkit", ".x.layerkit-tmp"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(ZeroDivisionError), whole_file(target) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert target.is_symlink()
    mask = os.umask(0o027)
    try:
        with whole_file(target) as file:
            file.write(b"whole")
    finally:
        os.umask(mask)
    assert (target.read_text(), target.is_symlink(), target.stat().st_mode & 0o7777) == ("whole", False, 0o640)
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == [".x.layerkit", ".x.layerkit-tmp", "victim", "x", "x.new"]


def test_a_folder_that_denies_writing_is_put_in_its_place(tmp_path: Path) -> None:
    """Of an ordinary user: a rename of a folder to another one asks for write permission on it."""
    user = os.geteuid() or OTHER
    tmp_path.chmod(0o777)
    parent = os.open(tmp_path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setresuid(user, user, user)
            os.fchdir(parent)
            with staging_beside(Path("x")) as staging:
                os.mkdir(NEW, dir_fd=staging.fd)
                os.chmod(NEW, 0o555, dir_fd=staging.fd)
                staging.publish("x")
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    os.close(parent)
    assert below(tmp_path) == ["x"]
    assert (tmp_path / "x").stat().st_mode & 0o7777 == 0o555
