"""Networks. They know only tensors: no market, no account, no process group."""

from models.exported import load_policy

__all__ = ["load_policy"]
