"""The tree that a mount shows."""
