"""Networks. They know only tensors: no market, no account, no process group."""
