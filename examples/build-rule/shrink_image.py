"""One build action: an image archive in, a smaller one and a report out, through layerkit's Python API.

    shrink_image.py --src IN.tar --dst OUT.tar --report OUT.json [--keep-base BASE.tar] [--uid-map C:H:N]

For a build system the action must be a function of its inputs: it uses no store of the machine, takes the time of
the result from ``--epoch``, and its outputs do not depend on cores, folders or the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import layerkit


def run(arguments: Sequence[str]) -> None:
    """Do what ``arguments`` say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--src", required=True, help="OCI or docker archive")
    parser.add_argument("--dst", required=True, help="OCI archive to write")
    parser.add_argument("--report", required=True, help="JSON file to write")
    parser.add_argument("--keep-base", help="archive of an image whose layers stay as they are")
    parser.add_argument("--uid-map", action="append", help="also map the owners in the layers, C:H:N")
    parser.add_argument("--epoch", type=int, default=0, help="time of the result, in seconds since 1970")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        settings = layerkit.Settings(store=Path(scratch) / "store")
        source = options.src
        mapping = layerkit.mapping(options.uid_map)
        if mapping is not None:
            source = f"oci-archive:{scratch}/mapped.tar"
            layerkit.remap(options.src, source, mapping, settings=settings, created=str(options.epoch))
        with layerkit.open_image(source, settings=settings) as image:
            plan = layerkit.optimize(image, keep_base=options.keep_base)
            report = plan.apply(f"oci-archive:{options.dst}", created=str(options.epoch))
    facts = report.to_dict()
    del facts["seconds"]  # the one thing that differs between two runs
    Path(options.report).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except layerkit.LayerkitError as error:
        print(f"shrink_image: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
