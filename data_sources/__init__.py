"""Bars from vendors: fetched once into a lake, checked, merged, returned as arrays. Without torch."""
