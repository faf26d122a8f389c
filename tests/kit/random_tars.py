"""Random layers, as odd as they may be and still mean the same to a tool that unpacks them in their order.

So no name that a hard link takes from a lower layer is touched by its own layer, whiteouts come first, every folder
has an entry, and xattrs have values (an empty one deletes to Go, and is one to GNU tar).
"""

from __future__ import annotations

import random
import struct
from typing import Any

from tar_blocks import END, header, member, pax

NAMES = (
    b"a", b"b", b"c", b"\xff", b"u\xcc\x88", b"\xc3\xbc", b"n" * 250, b"x\ny", b":xx", b".wh", b"a:b,c\\d", b"..a",
    b" ",
)  # fmt: skip
NO_ID = 0xFFFFFFFF
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *e) for e in ((1, 6, NO_ID), (2, 7, 1234), (4, 4, NO_ID), (16, 5, NO_ID), (32, 0, NO_ID))
)
XATTRS = (
    (b"user.x", b"\0=\n"), (b"trusted.t", b"1"), (b"user.long", b"v" * 3000), (b"system.posix_acl_access", ACL),
    (b"security.capability", struct.pack("<IIIII", 0x02000001, 0x2000, 0, 0, 0)), (b"user.overlay.metacopy", b"x"),
)  # fmt: skip
CONTENTS = (b"", b"one", b"two" * 300, b"big" * 3000)


def above(path: bytes) -> list[bytes]:
    """Every folder over ``path``, the root last."""
    return [path.rsplit(b"/", n)[0] for n in range(1, path.count(b"/") + 1)] + [b""] if path else []


def inside(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder + b"/") or not folder


class Stack:
    """Layers, each made on what the ones below it left: a kind (d, f, l, p, c) by path."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.there: dict[bytes, str] = {b"": "d"}
        self.layers = [self._layer() for _ in range(self.random.randint(1, 6))]

    def _layer(self) -> bytes:
        self.new: dict[bytes, str] = {}
        self.out: list[bytes] = []
        linked: set[bytes] = set()
        markers: list[tuple[bytes, bytes]] = []
        for _ in range(self.random.randint(0, 8)):
            folder = b"/".join(self.random.choice(NAMES[:4]) for _ in range(self.random.randint(0, 2)))
            path = (folder + b"/" if folder else b"") + self.random.choice(NAMES)
            kind = self.random.choice("fffffddlhhwwopc")
            if path in self.new or any(inside(q, path) or inside(path, q) for q in linked):
                continue
            if kind in "wo":
                victim = path if kind == "w" else folder
                if victim in self.there and (kind == "w" or folder):
                    markers.append((kind.encode(), victim))
            elif self._folder(folder):
                self._entry(path, kind, linked, markers)
        whiteouts = [text for kind, victim in markers if (text := self._marker(kind, victim, linked))]
        for path, kind in self.new.items():
            if kind != "d":
                self._gone(path)
            self.there[path] = kind
        return b"".join(whiteouts + self.out) + END

    def _gone(self, path: bytes) -> None:
        self.there = {p: k for p, k in self.there.items() if not inside(p, path)}

    def _attributes(self) -> dict[str, Any]:
        pick = self.random.choice
        return {
            "mode": pick((0o644, 0o4755, 0o600, 0o2711, 0o1777, 0)), "uid": pick((0, 1000, 65000)),
            "gid": pick((0, 1000)), "mtime": pick((0, 1, 2**31 - 1, 2**33 - 1, 1_700_000_000)),
        }  # fmt: skip

    def _folder(self, path: bytes) -> bool:
        """Give ``path`` and all above it entries; return whether that can be."""
        if path in self.new:
            return self.new[path] == "d"
        if path and not self._folder(path.rpartition(b"/")[0]):
            return False
        self.new[path] = "d"
        self.out.append(header(path or b".", b"5", **self._attributes()))
        return True

    def _entry(self, path: bytes, kind: str, linked: set[bytes], markers: list[tuple[bytes, bytes]]) -> None:
        records, fields = [(b"path", path)], self._attributes()
        if self.random.random() < 0.3:
            records.append(
                (b"mtime", b"%d.%09d" % (self.random.randint(0, 2**32), self.random.randint(0, 10**9 - 1)))
            )
        if kind in "fd" and self.random.random() < 0.4:
            chosen = self.random.sample(XATTRS, 2)
            records += [(b"SCHILY.xattr." + k, v) for k, v in chosen if kind == "f" or k != b"security.capability"]
        if kind == "h":
            taken = {victim for _, victim in markers}
            targets = [p for p, k in self.new.items() if k in "fpc"] + [
                p for p, k in self.there.items()
                if k in "fpc" and p not in self.new and not inside(p, path) and not any(inside(p, t) for t in taken)
                and all(self.new.get(f, "d") == "d" for f in above(p))
            ]  # fmt: skip
            if not targets:
                return
            target = self.random.choice(targets)
            linked.add(target)
            self.new[path] = self.new.get(target) or self.there[target]
            self.out.append(pax((b"path", path), (b"linkpath", target)) + header(b"z", b"1", link=b"z", **fields))
            return
        self.new[path] = kind
        body = {
            "f": lambda: member(b"z", self.random.choice(CONTENTS), **fields),
            "d": lambda: header(b"z", b"5", **fields),
            "l": lambda: header(b"z", b"2", link=self.random.choice((b"a", b"/etc", b"../..", b"\xff")), **fields),
            "p": lambda: header(b"z", b"6", **fields),
            "c": lambda: header(b"z", b"3", major=5, minor=self.random.randint(1, 300), **fields),
        }[kind]()
        self.out.append(pax(*records) + body)

    def _marker(self, kind: bytes, victim: bytes, linked: set[bytes]) -> bytes:
        folder, _, name = victim.rpartition(b"/")
        if any(inside(p, victim) for p in linked) or self.there.get(victim) is None:
            return b""
        if any(self.new.get(p, "d") != "d" for p in (victim, *above(victim))) or self.there.get(folder) != "d":
            return b""
        if kind == b"w":
            if any(inside(p, victim) for p in self.new):
                return b""
            self._gone(victim)
            return pax((b"path", (folder + b"/" if folder else b"") + b".wh." + name)) + member(b"z")
        if self.there[victim] != "d":
            return b""
        self.there = {p: k for p, k in self.there.items() if p == victim or not inside(p, victim)}
        return pax((b"path", victim + b"/.wh..wh..opq")) + member(b"z")
