"""Artifacts on disk: a private directory, content-addressed payloads, manifests, a lock, eviction.

Knows nothing of torch and imports nothing of fluxfire: bytes in, the same bytes out, or a `StoreError`.
"""

from fluxfire.store.files import Folder, StoreError, open_private
from fluxfire.store.manifest import Manifest
from fluxfire.store.store import Store

__all__ = ["Folder", "Manifest", "Store", "StoreError", "open_private"]
