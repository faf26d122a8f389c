"""``finalize``: an upper that was written under metacopy becomes a layer that needs its lower for data only.

The plan is written to a file beside the upper, and to disk, before the first change. A kill at any moment leaves
an upper that shows the same tree as before (see :class:`~layerkit.hosts.finalize.plan.Plan`) and a file by which
the next run goes on, or takes all of it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from layerkit.formats.overlay_options import OverlayOptions
from layerkit.hosts.finalize import plan as fp
from layerkit.hosts.finalize.plan import Lowers, Plan, Step, raw
from layerkit.linux import mounts
from layerkit.linux.durable import remove, staging_beside, sync_filesystem, sync_path, whole_file
from layerkit.linux.folders.walk import TOP_FOLDER
from layerkit.linux.syscalls import FOLDER, opened
from layerkit.metaonly import METACOPY, Namespace, own_mark
from layerkit.model.errors import Cancelled, LayerkitError, NotFound, StoreError, UsageError, show_path
from layerkit.model.reports import Report

_FORMAT = "layerkit.finalize.v1"
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class FinalizeReport(Report):
    """What was, or would be, changed.

    Attributes:
        upper: the folder.
        final: whether it was final already.
        made: entries of the lower layers that the upper lacked.
        redirects: stubs that got an absolute redirect.
        opaque: folders that hide what is below.
        whiteouts: whiteouts removed.
        root_whiteouts: whiteouts that stay in the root, see ``keep_root_whiteouts``.
        undo_file: what takes it back, "" where nothing was done.
        resumed: an interrupted run was carried on.
        examples: the first paths concerned.
    """

    upper: str
    final: bool
    made: int
    redirects: int
    opaque: int
    whiteouts: int
    root_whiteouts: int
    undo_file: str
    resumed: bool
    examples: tuple[str, ...]


def undo_file(upper: Path) -> Path:
    """Return where the undo data of ``upper`` lies: beside it, since in it a mount would show it."""
    return upper.with_name(f"{upper.name}.layerkit-undo")


def finalize(
    upper: Path,
    lower: str,
    *,
    check: bool = False,
    keep_root_whiteouts: bool = True,
    namespace: Namespace = Namespace.TRUSTED,
) -> FinalizeReport:
    """Make ``upper`` opaque to ``lower``: complete, each folder opaque, each stub with an absolute redirect.

    The overlay is not mounted; ``lower`` is what it was mounted over, ``DIR[:DIR…][::DATA…]``, top first. ``check``
    changes nothing. ``keep_root_whiteouts`` is for mounts over the lowers as normal layers, not as data-only ones.

    Raises:
        UsageError: mounted, or no folder.
        LossyResult: the lowers do not fit, or hold what a finalized layer cannot say. Nothing was changed.
        OSError: a failure of the system; all that was changed is taken back.
    """
    place = _checked(upper)
    lowers = Lowers.parse(lower, namespace)
    for root in (Path(os.fsdecode(path)) for path in (*lowers.roots, *lowers.data)):
        if root.is_relative_to(place) or place.is_relative_to(root):
            raise UsageError(f"{upper} and the lower layer {root} overlap; they must lie apart")
    journal = undo_file(place)
    running = journal.with_name(journal.name + ".running")
    resumed = running.exists()
    if resumed and not check:
        if running.lstat().st_uid != os.geteuid():
            raise StoreError(f"{running}: another user's file, not of an interrupted run of yours; remove it")
        plan = _load(running, place)
    else:
        plan = fp.plan(os.fsencode(place), lowers, keep_root_whiteouts=keep_root_whiteouts)
        if plan.steps and not check:
            if journal.exists():
                raise StoreError(
                    f"{journal} has the undo data of an earlier run: if that is not wanted any more, remove the "
                    f"file; to go back, use layerkit finalize {upper} --undo {journal}"
                )
            _save(plan, running)
    if plan.steps and not check:
        try:
            _apply(plan, place)
        except (OSError, LayerkitError, Cancelled):
            _revert(plan, place)
            running.unlink()
            raise
        running.replace(journal)
        sync_path(place.parent)
    counts = plan.counts()
    return FinalizeReport(
        upper=str(place), final=not plan.steps, made=counts["made"], redirects=counts["redirects"],
        opaque=counts["opaque"], whiteouts=counts["whiteouts"],
        root_whiteouts=_root_whiteouts(os.fsencode(place), lowers) if keep_root_whiteouts else 0,
        undo_file=str(journal) if plan.steps and not check else "", resumed=resumed and not check,
        examples=tuple(
            f"{s['do']} /{show_path(raw(s['path']))}" for s in plan.steps[:_SHOWN] if s["do"] != fp.TIMES
        ),
    )  # fmt: skip


def undo(upper: Path, file: Path) -> int:
    """Take back what ``file`` says was done to ``upper``, also half of it; return the number of steps.

    Raises:
        NotFound: no such file.
        StoreError: it is not of this upper, or the upper was changed since.
    """
    place = _checked(upper)
    # After a kill the plan still has the name of a running one.
    source = file if file.exists() else file.with_name(file.name + ".running")
    plan = _load(source, place)
    _refuse_changed(plan, place, finished=source == file and not file.name.endswith(".running"))
    # What a killed run left beside them goes first.
    with staging_beside(place), staging_beside(file.with_name(file.name.removesuffix(".running") + ".running")):
        _revert(plan, place)
    _clear_aside(place)
    source.unlink()
    sync_path(place.parent)
    return len(plan.steps)


def _clear_aside(place: Path) -> None:
    """Remove the folder in which the version before made one entry after the other, where a killed run left it."""
    aside = place.with_name(f".{place.name[:200]}.layerkit-new")
    with contextlib.suppress(OSError), opened(aside, FOLDER) as fd:
        if os.fstat(fd).st_uid == os.geteuid() and os.listdir(fd) in ([], ["new"]):
            remove("new", fd)
            aside.rmdir()


def _checked(upper: Path) -> Path:
    place = Path(os.path.realpath(upper))
    if not place.is_dir():
        raise UsageError(f"{upper}: no such folder; name the upperdir of an overlay")
    if place.stat().st_dev != place.parent.stat().st_dev:
        raise UsageError(f"{upper} is a mount point: its undo data has no place beside it; use a folder in it")
    where = _mounted(place)
    if where:
        raise UsageError(f"{upper} is a layer of the overlay mounted at {where}; unmount it first")
    return place


def _mounted(place: Path) -> str:
    """Return where an overlay with ``place`` as upper or lower is mounted, in any mount namespace; else ""."""
    seen: set[int] = set()
    for namespace, process in mounts.namespaces():
        if namespace in seen:
            continue
        with contextlib.suppress(OSError):
            table = mounts.mount_table(process)
            seen.add(namespace)
            for mount in table:
                if mount.fstype == "overlay" and _uses(OverlayOptions.shown(mount.super_options), str(place)):
                    return mount.point
    return ""


def _uses(shown: OverlayOptions, own: str) -> bool:
    # A relative one is shown as it was given, and nobody knows relative to what.
    return any(
        layer == own or (layer and not layer.startswith("/") and own.endswith(f"/{layer}"))
        for layer in (shown.upper, *shown.lower, *shown.data)
    )


def _root_whiteouts(upper: bytes, lowers: Lowers) -> int:
    names = (upper + b"/" + name for name in os.listdir(upper))
    return sum(lowers.is_whiteout(full, os.lstat(full), upper) for full in names)


# The file


def _save(plan: Plan, path: Path) -> None:
    head = {"format": _FORMAT, "upper": fp.text(plan.upper), "steps": len(plan.steps)}
    with whole_file(path, sync=True) as file:
        for line in (head, *plan.steps):
            file.write(json.dumps(line).encode("ascii") + b"\n")


def _load(path: Path, upper: Path) -> Plan:
    try:
        head, *lines = path.read_text("ascii").splitlines()
        facts = json.loads(head)
        steps = [json.loads(line) for line in lines]
        if facts["format"] != _FORMAT or len(steps) != facts["steps"]:
            raise ValueError("not whole")
        owner = raw(facts["upper"])
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file; `layerkit finalize` writes it beside the upper") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not the undo data of layerkit finalize ({error})") from None
    if owner != os.fsencode(upper):
        raise StoreError(f"{path} is the undo data of {show_path(owner)}, not of {upper}")
    return Plan(owner, steps)


# Doing and undoing. Every step may be done or undone twice, so a kill needs no note of how far it came.


def _apply(plan: Plan, place: Path) -> None:
    with staging_beside(place) as staging:
        aside = bytes(staging.new)
        for step in plan.steps:
            path = _path(plan, step)
            if step["do"] == fp.MAKE:
                _make(step, path, aside)
            elif step["do"] == fp.LINK:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                os.link(plan.upper + b"/" + raw(step["to"]), path, follow_symlinks=False)
            elif step["do"] == fp.SET:
                _set(path, step["name"], step["new"])
            elif step["do"] == fp.WHITEOUT:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
    _finish(plan, place, made=True)


def _revert(plan: Plan, place: Path) -> None:
    for step in reversed(plan.steps):
        path = _path(plan, step)
        with contextlib.suppress(FileNotFoundError):
            if step["do"] == fp.MAKE and stat.S_ISDIR(step["mode"]):
                os.rmdir(path)
            elif step["do"] in (fp.MAKE, fp.LINK):
                os.unlink(path)
            elif step["do"] == fp.SET:
                _set(path, step["name"], step["old"])
            elif step["do"] == fp.WHITEOUT and not os.path.lexists(path):
                # A device 0:0, or an empty file that an xattr marks.
                os.mknod(path, stat.S_IFMT(step["mode"]) | 0o600, 0)
                _attributes(step, path)
    _finish(plan, place, made=False)


def _path(plan: Plan, step: Step) -> bytes:
    return plan.upper + b"/" + raw(step["path"]) if step["path"] else plan.upper


def _make(step: Step, path: bytes, new: bytes) -> None:
    """Make an entry as ``new`` and put it in its place when it is whole: nothing is inherited or seen half-made."""
    mode = step["mode"]
    if stat.S_ISDIR(mode) and os.path.isdir(path) and not os.path.islink(path):
        return  # by an earlier run; it was put there whole
    if stat.S_ISDIR(mode):
        os.mkdir(new, 0o700)
    elif stat.S_ISLNK(mode):
        os.symlink(raw(step["target"]), new)
    else:
        os.mknod(new, stat.S_IFMT(mode) | 0o600, step["rdev"])
    if stat.S_ISREG(mode):
        os.truncate(new, step["size"])
    _attributes(step, new)
    os.rename(new, path)


def _attributes(step: Step, path: bytes) -> None:
    # chown clears setuid and capabilities, so it goes first; times last.
    os.chown(path, step["uid"], step["gid"], follow_symlinks=False)
    if not stat.S_ISLNK(step["mode"]):
        os.chmod(path, stat.S_IMODE(step["mode"]))
    for name, value in step["xattrs"].items():
        os.setxattr(path, raw(name), raw(value), follow_symlinks=False)
    os.utime(path, ns=(step["times"][0], step["times"][1]), follow_symlinks=False)


def _set(path: bytes, name: str, value: str | None) -> None:
    if value is not None:
        os.setxattr(path, raw(name), raw(value), follow_symlinks=False)
    elif raw(name) in map(os.fsencode, os.listxattr(path, follow_symlinks=False)):
        os.removexattr(path, raw(name), follow_symlinks=False)


def _finish(plan: Plan, place: Path, *, made: bool) -> None:
    """Set the times of folders again, which their entries' coming and going changed, deepest first; then sync."""
    for step in reversed(plan.steps):
        is_folder = step["do"] == fp.TIMES or (made and step["do"] == fp.MAKE and stat.S_ISDIR(step["mode"]))
        if is_folder:
            os.utime(_path(plan, step), ns=(step["times"][0], step["times"][1]))
    with opened(place, TOP_FOLDER) as fd:
        sync_filesystem(fd)


def _lost_its_stub(step: Step, path: bytes) -> bool:
    """Return whether data was copied up into what was made as a stub: the kernel removes the mark then."""
    marks = [name for name in map(raw, step["xattrs"]) if own_mark(name) == METACOPY]
    have = [os.fsencode(name) for name in os.listxattr(path, follow_symlinks=False)]
    return any(mark not in have for mark in marks)


def _refuse_changed(plan: Plan, place: Path, *, finished: bool) -> None:
    """Refuse to take back what somebody has built upon since.

    Raises:
        StoreError: naming the first path.
    """
    made = {step["path"]: step for step in plan.steps if step["do"] in (fp.MAKE, fp.LINK)}
    gone = {step["path"] for step in plan.steps if step["do"] == fp.WHITEOUT}
    for step in plan.steps:
        path, why = _path(plan, step), ""
        try:
            shown = os.lstat(path)
        except FileNotFoundError:
            if finished and step["do"] != fp.WHITEOUT:
                why = "is gone"
        else:
            if step["do"] == fp.MAKE and stat.S_IFMT(shown.st_mode) != stat.S_IFMT(step["mode"]):
                why = "is something else now"
            elif step["do"] == fp.MAKE and _lost_its_stub(step, path):
                why = "was written to"
            elif step["do"] == fp.MAKE and stat.S_ISDIR(step["mode"]):
                added = [n for n in os.listdir(path) if f"{step['path']}/{fp.text(n)}" not in made]
                why = f"has {show_path(added[0])} in it" if added else ""
            elif finished and step["do"] == fp.WHITEOUT and step["path"] in gone:
                why = "was made again"
        if why:
            raise StoreError(
                f"{show_path(path)} {why}, since finalize: taking it back would lose that; nothing was changed"
            )
