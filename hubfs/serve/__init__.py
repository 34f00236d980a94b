"""A local hub: TensorFlow Hub's hosting protocol over a directory tree of SavedModels."""

from hubfs.serve.catalog import Catalog, Version
from hubfs.serve.server import LocalHub, RequestRecord

__all__ = ["Catalog", "LocalHub", "RequestRecord", "Version"]
