"""``layerkit which``: from a path in a mount to image, layer and sharers, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from layerkit.cli import options as o
from layerkit.cli.render import Output, fields, human, line, table

if TYPE_CHECKING:
    from layerkit.hosts.diagnosis.which import Place, Which

_UPPER = {
    "metadata": "only its metadata was copied up; the data is the layer's",
    "data": "copied up with its data: it is shared with nobody",
    "made": "made in this mount; it is in no layer",
}
_PLACES_SHOWN = 20


def which(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PATH|OBJECT",
            help="A path in a mount of layerkit; or a content, layer or image: `sha256:HEX`, its first 8 or more "
            "digits, or the short name of data, `/:x/NAME`.",
        ),
    ],
    store: o.StoreDir = None,
    json: o.Json = False,
) -> None:
    """Say which image, layer and blob a file comes from, where its bytes lie, and which mounts share them.

    Examples:
    `layerkit which /mnt/usr/bin/python3`

    `layerkit which sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03 --json`
    """
    from layerkit.api.open import open_store
    from layerkit.hosts.diagnosis.which import which as find

    with open_store(o.store_dir(store)) as held:
        answer = find(what, held)
    if not Output(json).told("which", answer.to_dict()):
        _show(answer)


def _show(answer: Which) -> None:
    pairs: list[tuple[str, object]] = []
    if answer.kind == "path":
        pairs.append(("file", f"{answer.file}, {human(answer.size)}"))
        pairs.append(("mount", f"{answer.mount}, map {answer.map or 'none'}"))
        if answer.upper:
            pairs.append(("upper", _UPPER[answer.upper]))
        if answer.place is not None:
            pairs.append(("image", f"{answer.place.image} {answer.place.manifest}".strip()))
            pairs.append(("layer", _layer(answer.place)))
    elif answer.kind == "content":
        pairs.append(("content", human(answer.size)))
    if answer.sha256:
        pairs += [("sha256", answer.sha256), ("short name", answer.name)]
    if answer.data:
        pairs.append(("bytes at", answer.data))
    if answer.sharers:
        who = [f"{s.target} ({s.image}, map {s.map or 'none'})" for s in answer.sharers]
        pairs.append(("shared with" if answer.kind == "path" else "mounted at", who))
    elif answer.kind == "path" and answer.sha256:
        pairs.append(("shared with", "no other mount"))
    fields(pairs)
    if answer.places:
        rows = [
            (p.image, p.layer or "", p.diff_id[:19], p.path, "" if p.visible else "hidden")
            for p in answer.places[:_PLACES_SHOWN]
        ]
        table("", ["IMAGE", "LAYER", "DIFF ID", "PATH", ""], rows, right=(1,))
        if len(answer.places) > _PLACES_SHOWN:
            line(f"and {len(answer.places) - _PLACES_SHOWN} more (--json lists all)")


def _layer(place: Place) -> str:
    names = [f"{place.layer} from the bottom", place.diff_id and f"diff_id {place.diff_id}",
             place.blob and f"blob {place.blob}"]  # fmt: skip
    return ", ".join(filter(None, names))
