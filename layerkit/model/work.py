"""What a use case is given: an image to work on with all that serves it, and where the result goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol

from layerkit.model.limits import DEFAULT, Limits

if TYPE_CHECKING:  # an index brings numpy, which a copy has no need for
    from layerkit.model.digest import Digest
    from layerkit.model.image import Image, Layer
    from layerkit.model.index import Index
    from layerkit.model.ports import ImageSink, ImageSource, Progress


class Kept(Protocol):
    """What is known of layers, so that they need not be read again; None where it has nothing of one."""

    def load_index(self, diff_id: Digest) -> Index | None:
        """Return the proven index of a layer."""
        return None

    def open_tar(self, diff_id: Digest) -> BinaryIO | None:
        """Open the raw tar of a layer; the caller closes it."""
        return None


class _NothingKept(Kept):
    """Every layer is read."""


NOTHING_KEPT: Kept = _NothingKept()
"""Where every layer is to be read."""


class Others:
    """Who else may know the index of a layer, or be reading the layer just now; by itself nobody.

    Attributes:
        notes: why a better way was not gone, as text.
    """

    notes: Sequence[str] = ()

    def index(self, layer: Layer, below: Mapping[Digest, Index]) -> tuple[Index, str] | None:
        """Return the index of a layer and where it came from, None where nobody has it.

        Args:
            layer: which is not read for it.
            below: the indexes of the layers below it.
        """
        return None

    def turn(self, layer: Layer) -> contextlib.AbstractContextManager[tuple[Index, str] | None]:
        """Have the layer to oneself while the block runs; gives its index where it has come about meanwhile."""
        return contextlib.nullcontext()

    def take(self, index: Index) -> None:
        """Take the index of a layer that was read here."""
        return


NOBODY = Others()
"""Where there is nobody else."""


@dataclass(frozen=True, slots=True)
class Work:
    """One image, and what serves whatever is done with it.

    Attributes:
        source: where its blobs are.
        image: one that ``source.image()`` returned.
        name: what the image is called, for reports.
        kept: layers that need not be read.
        limits: bounds on input.
        progress: told of the bytes read and written; what it raises ends the work.
        strict: refuse overlay xattrs that the image brings, instead of escaping them.
        jobs: layers read at the same time, where several can be.
    """

    source: ImageSource
    image: Image
    name: str = ""
    kept: Kept = NOTHING_KEPT
    limits: Limits = DEFAULT
    progress: Progress | None = None
    strict: bool = False
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a result goes.

    Attributes:
        open: opens the place; it may refuse. None for a dry run: nothing is to be written.
        name: of the image there, "" for the name it has.
        where: the reference, for messages.
        one_image: there is no room for an index: a docker archive or daemon.
        has_image: the image is there already, and what is put is attached to it.
    """

    open: Callable[[], ImageSink] | None
    name: str = ""
    where: str = ""
    one_image: bool = False
    has_image: bool = False

    @contextlib.contextmanager
    def sink(self) -> Iterator[ImageSink]:
        """Give the place; at the end of the block it is committed, and on an error nothing of it is visible."""
        assert self.open is not None, "a dry run writes nothing"
        sink = self.open()
        try:
            yield sink
            sink.commit()
        except BaseException:
            sink.abort()
            raise


NOWHERE = Destination(None)
"""Of a dry run."""
