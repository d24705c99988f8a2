"""Bars from vendors: fetched once into a lake, checked, merged, handed on as arrays. Knows no torch."""
