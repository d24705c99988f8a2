"""The lake: bars on disk, as parts with their ledger."""
