"""A local hub: TensorFlow Hub's hosting protocol over a directory tree of SavedModels."""

from hubfs.serve.catalog import Catalog
from hubfs.serve.files import Version
from hubfs.serve.handler import RequestRecord
from hubfs.serve.server import LocalHub

__all__ = ["Catalog", "LocalHub", "RequestRecord", "Version"]
