"""The errors of the public API, as :mod:`layerkit.model.errors` says what each of them means."""

from layerkit.model.errors import Cancelled as Cancelled
from layerkit.model.errors import DaemonError as DaemonError
from layerkit.model.errors import DigestMismatch as DigestMismatch
from layerkit.model.errors import InvalidImage as InvalidImage
from layerkit.model.errors import LayerkitError as LayerkitError
from layerkit.model.errors import LimitExceeded as LimitExceeded
from layerkit.model.errors import LossyResult as LossyResult
from layerkit.model.errors import NotFound as NotFound
from layerkit.model.errors import PartialFailure as PartialFailure
from layerkit.model.errors import RegistryError as RegistryError
from layerkit.model.errors import StoreError as StoreError
from layerkit.model.errors import UnmappedId as UnmappedId
from layerkit.model.errors import UnsafeEntry as UnsafeEntry
from layerkit.model.errors import UnsupportedHost as UnsupportedHost
from layerkit.model.errors import UsageError as UsageError
