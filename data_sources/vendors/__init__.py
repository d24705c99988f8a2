"""Vendors' protocols, one adapter each."""
