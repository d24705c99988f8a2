"""Your own model: one class of nn.Module with ``@model``; docs/own_model.md shows an example.

It takes the place of the transformer: bars in, one vector per bar out.
"""
