"""Bars of one's own: CSV and Parquet files in a folder, see docs/data.md."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_sources.lake.names import as_text
from data_sources.sources import Answer, DataRequest, RefreshJob, Source, SymbolGroup, ask
from data_sources.vendors.files_description import CRYPTO, KINDS, RAW_STOCK, STOCK

if TYPE_CHECKING:
    from data_sources.lake.lake import Lake  # which imports pyarrow and polars

SOURCE_NAME = "files"
NEVER_STALE = 10**9  # minutes: a folder is as new as it was made


class _Kind(SymbolGroup):
    """Symbols of one of KINDS: those that the lake has of the folder."""

    @property
    def kind(self) -> str:
        return CRYPTO if self.asset_class == "crypto" else STOCK if self.adjusts_splits else RAW_STOCK

    def dataset_in(self, request: DataRequest) -> str | None:
        return dataset_of(request.files_dir, self.kind)

    def symbols_in(self, lake: Lake, request: DataRequest) -> tuple[str, ...]:
        own: set[str] = set()
        # Of a symbol in two kinds the first one counts.
        for kind in KINDS[KINDS.index(self.kind) :: -1]:
            parts = lake.parts(SOURCE_NAME, dataset_of(request.files_dir, kind)).values()
            found = {symbol for part in parts for symbol in part.symbols}
            own = found if kind == self.kind else own - found
        return tuple(sorted(own))


class _Files(Source):
    name, label = SOURCE_NAME, "Files"
    groups = (
        _Kind("stock", stale_minutes=NEVER_STALE, adjusts_splits=True),
        _Kind("stock", stale_minutes=NEVER_STALE),
        _Kind("crypto", stale_minutes=NEVER_STALE),
    )

    def refresh(self, job: RefreshJob) -> None:
        from data_sources.vendors.files_refresh import Refresh

        Refresh(job).run()

    def probe(self, request: DataRequest, now_ns: int) -> Iterator[Answer]:
        from data_sources.vendors.files_find import Folder

        def look() -> tuple[str, str]:
            found = Folder.read(Path(request.files_dir)).files
            return f"has {len(found):,} files of {sum(file.size for file in found) / 1e6:,.1f} MB", ""

        yield ask(f"Files {request.files_dir}", look)


SOURCE = _Files()


def dataset_of(folder: str, kind: str) -> str:
    """Return the dataset of a folder's symbols of a kind; folders of one name differ by their path."""
    path = os.path.abspath(folder)  # noqa: PTH100 - resolve() would follow links, behind which folders change
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return f"{as_text(Path(path).name)}-{digest}-{kind}"
