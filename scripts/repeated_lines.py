#!/usr/bin/env python3
"""Show every run of equal lines that stands twice in the tests: repeated_lines.py [FOLDER] [LINES].

FOLDER is tests/ and LINES is 15 where they are not given. Blank lines do not count, nor does white space around
a line. Exits with 1 if there is such a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def repeated(folder: Path, count: int) -> list[str]:
    """Return a line of text for each run of at least ``count`` equal lines, named by its two places."""
    seen: dict[tuple[str, ...], tuple[Path, int]] = {}
    found: list[str] = []
    for path in sorted(folder.rglob("*.py")):
        every = enumerate(map(str.strip, path.read_text("utf-8").splitlines()), 1)
        lines = [(number, text) for number, text in every if text]
        last = 0  # of a run that was told already
        for at in range(len(lines) - count + 1):
            window = tuple(text for _, text in lines[at : at + count])
            first = seen.setdefault(window, (path, lines[at][0]))
            if first != (path, lines[at][0]):
                if lines[at][0] > last:
                    found.append(f"{path}:{lines[at][0]} repeats {first[0]}:{first[1]}")
                last = lines[at + count - 1][0]
    return found


def main(words: list[str]) -> int:
    """Print them; return the exit code."""
    found = repeated(Path(words[0]) if words else ROOT / "tests", int(words[1]) if len(words) > 1 else 15)
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
