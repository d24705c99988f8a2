"""The former path of ``data_sources.bars.bars_of_frame``, for exported examples; kept for one release."""

from data_sources.bars import bars_of_frame

__all__ = ["bars_of_frame"]
