"""What is on disk: tensorflow_hub's cache directory, and the transfers that fill it."""
