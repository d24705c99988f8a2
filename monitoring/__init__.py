"""What people see while it trains."""
