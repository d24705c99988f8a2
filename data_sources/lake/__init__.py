"""The lake: bars on disk."""
