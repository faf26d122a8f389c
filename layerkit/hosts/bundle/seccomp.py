"""Which seccomp profile a bundle gets: the one that the host's own container engines use, unless told otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from layerkit.formats import strict_json
from layerkit.formats.runtime import seccomp
from layerkit.model.errors import InvalidImage, UsageError

PROFILES = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))
"""Where podman looks (containers.conf(5), ``seccomp_profile``)."""
_BYTES_AT_MOST = 4 << 20


def profile(wish: str, capabilities: Collection[str]) -> tuple[strict_json.JsonObject | None, str]:
    """Return ``linux.seccomp`` of a config.json, None for none, and what a person should know, "" for nothing.

    Args:
        wish: ``auto`` (the host's, if there is one), ``unconfined``, or the path of a profile.
        capabilities: of the container's bounding set.

    Raises:
        UsageError: a file that is no profile.
    """
    if wish == "unconfined":
        return None, ""
    place = Path(wish)
    if wish == "auto":
        found = next((path for path in PROFILES if path.is_file()), None)
        if found is None:
            return None, (
                "no seccomp profile on this host: every system call is open to the container; install "
                "containers-common, or name a profile with --seccomp FILE"
            )
        place = found
    try:
        with place.open("rb") as file:
            text = file.read(_BYTES_AT_MOST + 1)
    except OSError as error:
        raise UsageError(f"--seccomp {wish}: {error.strerror}; want auto, unconfined or a file") from error
    if len(text) > _BYTES_AT_MOST:
        raise UsageError(f"{place}: more than {_BYTES_AT_MOST} bytes are no seccomp profile")
    system = os.uname()
    numbers = re.match(r"(\d+)\.(\d+)", system.release)
    kernel = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    around = seccomp.Surroundings(system.machine, kernel, capabilities)
    try:
        read = strict_json.load_object(text, str(place))
    except InvalidImage as error:
        raise UsageError(f"--seccomp: {error}") from error
    return seccomp.runtime_profile(read, around, str(place)), ""
