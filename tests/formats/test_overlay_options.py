"""Mount options of overlayfs: what is written is read again, by us and by the kernel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from needs import need_root
from programs import ROOT

from layerkit.formats.overlay_options import OverlayOptions, parse_layers
from layerkit.linux import mounts
from layerkit.model.errors import UsageError

PATHS = st.text("/ab\\:, é\t", min_size=1)
OPTIONS = st.builds(
    OverlayOptions,
    st.lists(PATHS, min_size=1, max_size=4).map(tuple),
    st.lists(PATHS, max_size=3).map(tuple),
    PATHS, PATHS, st.just((("userxattr", None), ("metacopy", "on"), ("context", "a:b"))),
)  # fmt: skip


@given(OPTIONS)
def test_what_is_written_is_read_again(options: OverlayOptions) -> None:
    assert OverlayOptions.parse(str(options)) == options
    # As seq_show_option of the kernel writes it.
    words = (word.partition("=") for word in options.texts)
    shown = ",".join(key + given + "".join(map(octal, value)) for key, given, value in words)
    assert OverlayOptions.shown(shown) == options


def octal(char: str) -> str:
    return f"\\{ord(char):03o}" if char in ",= \t\n\\" else char


def test_text() -> None:
    options = OverlayOptions(("/a:b", "/c"), ("/d,e",), "/u\\p", "/w", (("index", "off"), ("volatile", None)))
    assert options.texts == (
        "index=off", "volatile", r"lowerdir=/a\:b:/c::/d\,e", r"upperdir=/u\\p", "workdir=/w",
    )  # fmt: skip
    assert options.size == len(str(options)) + 1 and options.fits
    assert not OverlayOptions(("/" + "a" * os.sysconf("SC_PAGE_SIZE"),)).fits


def test_what_others_write() -> None:
    assert OverlayOptions.parse(r"lowerdir=/a\,b:/c\:d,,x,context=" + '"u:r:t:s0,c1"') == OverlayOptions(
        ("/a,b", "/c:d"), more=(("x", None), ("context", "u:r:t:s0,c1"))
    )
    assert OverlayOptions.parse("lowerdir=/a\\").lower == ("/a\\",)
    one_by_one = OverlayOptions.shown("ro,lowerdir+=/a:b,lowerdir+=/b,datadir+=/c\\054d")
    assert (one_by_one.lower, one_by_one.data) == (("/a:b", "/b"), ("/c,d",))
    # Older kernels show escapes of their own options bare.
    shown = OverlayOptions.shown("rw,lowerdir=/a\\:b:/c::/d,upperdir=/u\\,p,workdir=/w")
    assert (shown.upper, shown.lower, shown.data) == ("/u,p", ("/a:b", "/c"), ("/d",))


@pytest.mark.parametrize("text", ["", ":", "/a:", ":/a", "/a::", "/a:::/b", "::/a"])
def test_layers_without_a_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"--lower .*want DIR"):
        parse_layers(text, "--lower")


def test_the_kernel_reads_and_shows_the_same(tmp_path: Path) -> None:
    need_root()
    odd = tmp_path / "a:b,c\\d e"
    for name in ("low", "data", "up", "work"):
        (odd / name).mkdir(parents=True)
    (odd / "low" / "f").write_text("found")
    at = tmp_path / "m"
    at.mkdir()
    low, data, up, work = (str(odd / name) for name in ("low", "data", "up", "work"))
    options = OverlayOptions((low,), (data,), up, work, (("metacopy", "on"),))
    subprocess.run(["mount", "-i", "-t", "overlay", "overlay", "-o", str(options), at], check=True)
    try:
        assert (at / "f").read_text() == "found"
        mount = mounts.mount_of(at)
        assert mount is not None
        shown = OverlayOptions.shown(mount.super_options)
        assert (shown.lower, shown.data, shown.upper, shown.work) == ((low,), (data,), up, work)
    finally:
        subprocess.run(["umount", at], check=True)


def test_nobody_else_reads_or_writes_them() -> None:
    found = [
        f"{path}: {word}"
        for path in sorted((ROOT / "layerkit").rglob("*.py"))
        for word in (
            '"lowerdir="',
            'f"lowerdir=',
            'b"lowerdir=',
            '"upperdir="',
            'f"upperdir=',
            "super_options.split(",
        )
        if path.name != "overlay_options.py" and word in path.read_text("utf-8").replace('"lowerdir=FOLDER', "")
    ]
    assert found == []
