"""Services that host models: one module a protocol."""
