"""``finalize``: an upper that was chowned under metacopy stands for itself; the kernel is the judge."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuse_counter import counting_mount
from judge import Shown, differences, snapshot
from kernel_mounts import overlay, wait_gone
from programs import run_layerkit

import layerkit
from layerkit.hosts.finalize import finalize as fz
from layerkit.hosts.finalize.plan import Lowers
from layerkit.metaonly import Namespace
from layerkit.model.errors import LossyResult, NotFound, StoreError, UsageError

pytestmark = pytest.mark.usefixtures("as_root")
COUNT = 20_000


class Case:
    """Two lowers, an upper over them, and what a mount of the three shows."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.lower1, self.lower2, self.upper = work / "l1", work / "l2", work / "upper"
        self.target = work / "m"
        for folder in (self.lower1, self.lower2, self.upper, work / "wk"):
            folder.mkdir()

    @property
    def lower(self) -> str:
        return f"{self.lower1}:{self.lower2}"

    def classic(self, **more: str) -> dict[str, str]:
        return {
            "lowerdir": self.lower,
            "upperdir": str(self.upper),
            "workdir": f"{self.work}/wk",
            "metacopy": "on",
        } | more

    def change(self, script: str, **more: str) -> dict[bytes, Shown]:
        """Mount, run ``script`` inside, and return what the mount shows then."""
        with overlay(self.target, **self.classic(**more)):
            subprocess.run(["sh", "-ec", script], cwd=self.target, check=True)
            return snapshot(self.target)

    def shown(self, **options: str) -> dict[bytes, Shown]:
        with overlay(self.target, **options):
            return snapshot(self.target)

    def data_only(self) -> dict[str, str]:
        return {"lowerdir": f"{self.upper}::{self.lower1}::{self.lower2}", "ro": ""}

    def as_lower(self) -> dict[str, str]:
        return {"lowerdir": f"{self.upper}:{self.lower}", "metacopy": "on", "ro": ""}

    def finalize(self, stacking: str = "classic", check: bool = False) -> fz.FinalizeReport:
        return fz.finalize(self.upper, self.lower, check=check, keep_root_whiteouts=stacking == "classic")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    made = Case(tmp_path)
    one, two = made.lower1, made.lower2
    (one / "app/bin").mkdir(parents=True)
    (two / "app/lib/deep/er").mkdir(parents=True)
    (one / "app/bin/tool").write_bytes(b"#!/bin/sh\necho tool\n")
    (one / "app/bin/tool").chmod(0o4755)
    os.link(one / "app/bin/tool", one / "app/bin/tool2")
    (one / "app/empty").touch()
    (one / "app/link").symlink_to("bin/tool")
    os.mkfifo(one / "app/fifo", 0o640)
    os.mknod(one / "app/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (two / "app/lib/big").write_bytes(os.urandom(300_000))
    (two / "app/lib/deep/er/file").write_bytes(b"deep")
    (two / "app/lib/hidden").write_bytes(b"seen no more")
    os.mknod(one / "app/lib-gone", stat.S_IFCHR, 0)
    (two / "app/lib-gone").write_bytes(b"whited out by a lower layer")
    os.setxattr(two / "app/lib/big", "user.note", b"kept")
    subprocess.run(["setcap", "cap_net_raw+ep", one / "app/bin/tool2"], check=False)
    subprocess.run(["setfacl", "-m", "u:1234:rwx", two / "app/lib/deep"], check=False)
    (two / "etc").mkdir()
    (two / "etc/conf").write_bytes(b"a=b\n")
    (two / "etc/other").write_bytes(b"c=d\n")
    (one / "var").mkdir()
    (one / "var/log").write_bytes(b"log\n" * 50)
    (two / "top").write_bytes(b"in the root")
    return made


PARTLY = "chown -R 1000:1000 app/bin etc/conf; rm etc/other; echo new > etc/new"
WHOLE = "chown -R -h 1000:1000 ."
MOVED = """chown -R 1000:1000 .; mv app/lib moved; mv moved/deep app/deep; mv app/bin/tool app/renamed
mv etc/conf var/conf; ln app/renamed app/again; chmod 600 var/log; echo more >> var/conf; rm -r app/zero"""
MIXED = "chown -R 1000:1000 app/bin etc/conf; mv app/lib moved; rm etc/other; mv etc/conf var/conf; chmod 1777 var"
OPAQUE = "rm -r app/lib; mkdir app/lib; echo x > app/lib/x; chown -R 7:8 app/lib"
DELETED = "chown -R 1:1 .; rm top; rm -r var"
SCRIPTS = {"mixed": MIXED, "partly": PARTLY, "whole": WHOLE, "moved": MOVED, "opaque": OPAQUE}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_mount_shows_the_same_tree(case: Case, name: str) -> None:
    before = case.change(SCRIPTS[name])
    report = case.finalize("data-only" if "mv" not in SCRIPTS[name] else "classic")
    assert not report.final
    assert report.opaque >= 1
    for options in (case.data_only(), case.as_lower(), case.classic()):
        if "mv" in SCRIPTS[name] and options == case.data_only():
            continue  # see test_whiteouts_in_the_root
        assert differences(case.shown(**options), before) == [], options
    again = case.finalize(check=True)
    assert again.final, again.examples


def test_writable_over_data_only_layers(case: Case) -> None:
    before = case.change(WHOLE)
    case.finalize("data-only")
    (case.work / "up2").mkdir()
    (case.work / "wk2").mkdir()
    options = {
        "lowerdir": f"{case.upper}::{case.lower1}::{case.lower2}", "upperdir": f"{case.work}/up2",
        "workdir": f"{case.work}/wk2", "metacopy": "on",
    }  # fmt: skip
    with overlay(case.target, **options):
        # The root is shown from the new upper.
        assert differences(snapshot(case.target), before, skip=frozenset({b"."})) == []
        os.chown(case.target / "app/lib/big", 9, 9)
        assert (case.target / "app/lib/big").read_bytes() == (case.lower2 / "app/lib/big").read_bytes()
    assert (case.work / "up2/app/lib/big").stat().st_blocks * 512 <= 4096  # xattrs, no data


def test_the_upper_of_a_writable_mount_of_ours(tiny_image: Path, tmp_path: Path) -> None:
    """Over META::DATA: what was chowned, and what was not, points straight at the data; META is needed no more."""
    settings = layerkit.Settings(store=tmp_path / "store", data="objects")
    (tmp_path / "m").mkdir()
    with layerkit.open_image(str(tiny_image), settings=settings) as image:
        mapping = layerkit.mapping(["0:100000:65536"])
        upper = tmp_path / "upper"
        with image.mount(tmp_path / "m", mapping, upper=upper, rendering="directory", own_meta=True):
            subprocess.run(["sh", "-ec", "chown -R 4242 usr; echo new > made"], cwd=tmp_path / "m", check=True)
            before = snapshot(tmp_path / "m")
    wait_gone(tmp_path / "m")
    (meta,) = (tmp_path / "store/meta").glob("*/root")
    objects = tmp_path / "store/objects"
    report = fz.finalize(upper, f"{meta}::{objects}", keep_root_whiteouts=False)
    assert report.made > 10
    assert report.redirects > 0
    with overlay(tmp_path / "m", lowerdir=f"{upper}::{objects}", ro=""):
        assert differences(snapshot(tmp_path / "m"), before) == []
    assert fz.finalize(upper, f"{meta}::{objects}", keep_root_whiteouts=False, check=True).final


def test_whiteouts_in_the_root(case: Case) -> None:
    before = case.change(DELETED)
    report = case.finalize("classic")
    assert report.root_whiteouts == 2
    # The kernel merges the roots of normal layers whatever they say: there a whiteout must stay …
    for options in (case.as_lower(), case.classic()):
        assert differences(case.shown(**options), before) == []
    report = fz.finalize(case.upper, case.lower, keep_root_whiteouts=False, check=True)
    assert report.whiteouts == 2
    fz.undo(case.upper, fz.undo_file(case.upper))
    # … and over data-only ones there must be none.
    assert case.finalize("data-only").root_whiteouts == 0
    assert differences(case.shown(**case.data_only()), before) == []
    assert not [p for p in case.upper.rglob("*") if p.is_char_device() and p.stat().st_rdev == 0]


def raw(folder: Path) -> dict[bytes, Shown]:
    """The upper as it lies on disk, overlay xattrs and all."""
    return snapshot(folder)


@pytest.mark.parametrize("name", [*SCRIPTS, "deleted"])
def test_undo_gives_back_what_was(case: Case, name: str) -> None:
    case.change(SCRIPTS.get(name, DELETED))
    before = raw(case.upper)
    report = case.finalize("data-only")
    assert differences(raw(case.upper), before) != []
    fz.undo(case.upper, Path(report.undo_file))
    assert differences(lasting(raw(case.upper)), lasting(before)) == []
    assert sorted(p.name for p in case.work.iterdir()) == ["l1", "l2", "m", "upper", "wk"]


def test_check_changes_nothing_and_says_what(case: Case) -> None:
    case.change(PARTLY)
    before = raw(case.upper)
    done = run_layerkit("finalize", case.upper, "--lower", case.lower, "--check", "--json", code=None)
    facts = json.loads(done.stdout)
    assert done.returncode == 1
    assert (facts["final"], facts["schema"]) == (False, "layerkit.finalize.v1")
    assert facts["made"] > 0 and facts["opaque"] > 0 and facts["redirects"] > 0
    assert differences(raw(case.upper), before) == []
    assert run_layerkit("finalize", case.upper, "--lower", case.lower, code=None).returncode == 0
    assert run_layerkit("finalize", case.upper, "--lower", case.lower, "--check", code=None).returncode == 0
    assert run_layerkit("finalize", case.upper, "--undo", fz.undo_file(case.upper), code=None).returncode == 0
    assert differences(raw(case.upper), before) == []


@pytest.mark.parametrize("relative", [False, True])
def test_a_mounted_upper_is_refused(case: Case, relative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case.change(PARTLY)
    before = raw(case.upper)
    monkeypatch.chdir(case.work)
    options = case.classic() | ({"upperdir": "upper"} if relative else {})
    with overlay(case.target, **options), pytest.raises(UsageError, match="unmount it first"):
        case.finalize()
    with (
        overlay(case.target, lowerdir=f"{case.upper}:{case.lower1}"),
        pytest.raises(UsageError, match="mounted at"),
    ):
        case.finalize()
    assert differences(raw(case.upper), before) == []


def test_a_mount_in_another_namespace_is_refused(case: Case) -> None:
    case.change(PARTLY)
    options = ",".join(f"{k}={v}" for k, v in case.classic().items())
    script = f"mount --make-rprivate /; mount -t overlay -o {options} overlay {case.target}; echo ready; read x"
    other = subprocess.Popen(
        ["unshare", "-m", "sh", "-ec", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match="unmount it first"):
            case.finalize()
    finally:
        other.communicate("\n", timeout=120)
    case.finalize()


KILLED = """
import os, sys, signal
from pathlib import Path
from layerkit.hosts.finalize import finalize as fz
real = {"count": 0}
def dying(function):
    def call(*a, **k):
        real["count"] += 1
        if real["count"] == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*a, **k)
    return call
for name in ("rename", "link", "unlink", "setxattr", "removexattr", "utime", "mkdir", "truncate", "chown"):
    setattr(os, name, dying(getattr(os, name)))
fz.finalize(Path(sys.argv[1]), sys.argv[2])
"""


def killed_at(case: Case, call: int) -> bool:
    """Run finalize until its ``call``-th change of the disk, and kill -9 there; return whether it came so far."""
    done = subprocess.run([sys.executable, "-c", KILLED, case.upper, case.lower, str(call)], timeout=60)
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


@pytest.mark.parametrize("then", ["again", "undo"])
def test_killed_at_any_moment(case: Case, then: str) -> None:
    shown = case.change(MIXED)
    before = raw(case.upper)
    step = int(os.environ.get("LAYERKIT_KILLS_STEP", "9"))
    call, kills = 1, 0
    while killed_at(case, call):
        kills += 1
        resumable = running(case).exists()
        # Cut short, it still shows the same, but for the times of folders where something was put.
        assert differences(untimed(case.shown(**case.classic())), untimed(shown)) == [], call
        if then == "again":
            assert case.finalize().resumed == resumable
            assert differences(case.shown(**case.as_lower()), shown) == [], call
        if fz.undo_file(case.upper).exists() or running(case).exists():
            # As the version before left it, which made entries under this name.
            (case.work / ".upper.layerkit-new").mkdir(exist_ok=True)
            (case.work / ".upper.layerkit-new/new").touch()
            fz.undo(case.upper, fz.undo_file(case.upper))
            assert sorted(p.name for p in case.work.iterdir()) == ["l1", "l2", "m", "upper", "wk"], call
        assert differences(lasting(raw(case.upper)), lasting(before)) == [], call
        call += step
    assert kills > 3
    assert not running(case).exists()


def untimed(tree: dict[bytes, Shown]) -> dict[bytes, Shown]:
    return {p: each._replace(mtime_ns=0) if stat.S_ISDIR(each.mode) else each for p, each in tree.items()}


def lasting(tree: dict[bytes, Shown]) -> dict[bytes, Shown]:
    """Leave out what the mounts in between mark, and that the kernel's whiteouts are links of one inode."""
    impure = (b"trusted.overlay.impure", b"y")
    return {
        path: each._replace(
            xattrs=tuple(pair for pair in each.xattrs if pair != impure),
            links=() if stat.S_ISCHR(each.mode) else each.links,
        )
        for path, each in tree.items()
    }


def running(case: Case) -> Path:
    file = fz.undo_file(case.upper)
    return file.with_name(file.name + ".running")


def test_a_failure_takes_everything_back(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.change(WHOLE)
    before = raw(case.upper)
    seen = 0

    def failing(*words: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise OSError(28, "No space left on device")
        real(*words)  # type: ignore[arg-type]

    real = fz._set
    monkeypatch.setattr(fz, "_set", failing)
    with pytest.raises(OSError, match="No space"):
        case.finalize()
    assert differences(raw(case.upper), before) == []
    assert sorted(p.name for p in case.work.iterdir()) == ["l1", "l2", "m", "upper", "wk"]


def test_undo_refuses_what_was_built_upon(case: Case) -> None:
    case.change(PARTLY)
    case.finalize()
    with overlay(case.target, **case.classic()):
        (case.target / "app/lib/deep/er/mine").write_text("mine")
    with pytest.raises(StoreError, match="mine in it"):
        fz.undo(case.upper, fz.undo_file(case.upper))
    assert (case.upper / "app/lib/deep/er/mine").read_text() == "mine"


def test_errors(case: Case, tmp_path: Path) -> None:
    case.change(WHOLE)
    with pytest.raises(LossyResult, match="without its data"):
        fz.finalize(case.upper, str(case.lower1))
    with pytest.raises(UsageError, match="no such folder"):
        fz.finalize(case.upper, f"{case.lower1}:/nonexistent")
    with pytest.raises(UsageError, match="overlap"):
        fz.finalize(case.upper, str(case.upper))
    with pytest.raises(NotFound, match="no such file"):
        fz.undo(case.upper, tmp_path / "nothing")
    (tmp_path / "junk").write_text("{}\n")
    with pytest.raises(StoreError, match="not the undo data"):
        fz.undo(case.upper, tmp_path / "junk")
    case.finalize()
    shutil.move(fz.undo_file(case.upper), tmp_path / "elsewhere.layerkit-undo")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(StoreError, match="undo data of"):
        fz.undo(other, tmp_path / "elsewhere.layerkit-undo")
    assert run_layerkit("finalize", case.upper, code=None).returncode == 2
    assert Lowers.parse("/usr:/etc::/var", Namespace.TRUSTED).data == (os.fsencode(os.path.realpath("/var")),)


def test_what_another_user_put_beside_it_is_not_used(case: Case, tmp_path: Path) -> None:
    case.change(PARTLY)
    victim, journal = tmp_path / "victim", fz.undo_file(case.upper)
    victim.write_text("mine")
    beside, aside = case.work / f"{journal.name}.running.new", case.work / ".upper.layerkit-new"
    beside.symlink_to(victim)
    aside.mkdir(mode=0o777)
    os.chown(aside, 65534, 65534)
    planned = case.work / f"{journal.name}.running"
    planned.write_text("{}\n")
    os.chown(planned, 65534, 65534)
    before = raw(case.upper)
    with pytest.raises(StoreError, match="another user's file"):
        case.finalize()
    assert differences(raw(case.upper), before) == []
    planned.unlink()
    case.finalize()
    assert victim.read_text() == "mine" and beside.is_symlink() and aside.stat().st_uid == 65534


def test_negative_lookups_never_reach_the_lower(tmp_path: Path) -> None:
    """Requests counted on a FUSE lower: none of 20,000 names that are not there; before, each of them."""
    case = Case(tmp_path)
    for number in range(20):
        folder = case.lower1 / "d" / str(number)
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 10)
    case.change("chown -R 1000:1000 d")
    (tmp_path / "fuse").mkdir()

    def lookups(options: Callable[[Path], dict[str, str]]) -> int:
        with counting_mount(case.lower1, tmp_path / "fuse") as server:
            with overlay(case.target, **options(tmp_path / "fuse")):
                for folder in range(20):
                    os.stat(case.target / "d" / str(folder) / "file")
                server.requests.clear()
                for number in range(COUNT):
                    with pytest.raises(FileNotFoundError) if number < 20 else missing():
                        os.stat(f"{case.target}/d/{number % 20}/no-{number}")
                count = server.requests["LOOKUP"]
                assert (case.target / "d/3/file").read_bytes() == b"x" * 10
            return count

    def stacked(fuse: Path) -> dict[str, str]:
        return {"lowerdir": f"{case.upper}:{fuse}", "metacopy": "on", "ro": ""}

    assert lookups(stacked) >= COUNT
    fz.finalize(case.upper, str(case.lower1))
    assert lookups(stacked) == 0
    assert lookups(lambda fuse: {"lowerdir": f"{case.upper}::{fuse}", "ro": ""}) == 0


@contextmanager
def missing() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        return
    raise AssertionError("the name is there")


def test_many_entries(tmp_path: Path) -> None:
    entries = int(os.environ.get("LAYERKIT_FINALIZE_ENTRIES", "2000"))
    case = Case(tmp_path)
    for number in range(entries):
        if number % 100 == 0:
            (case.lower1 / f"d{number}").mkdir()
        (case.lower1 / f"d{number - number % 100}/f{number}").write_bytes(b"1")
    before = case.change("chown -R 5:5 .")
    case.finalize("data-only")
    assert differences(case.shown(**case.data_only()), before) == []
