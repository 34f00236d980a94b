"""The one place where hubfs's version is written."""

__version__ = "0.1.0"
