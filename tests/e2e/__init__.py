"""The real commands, as real processes."""
