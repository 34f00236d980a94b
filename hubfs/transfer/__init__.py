"""Bytes on their way: from a hub to files."""
