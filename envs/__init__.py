"""The market on the device, the account's ledger, and many environments stepped at once."""
