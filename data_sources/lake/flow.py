"""Order flow for parts that were kept before there was any: joined to their bars from a newer answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_sources.bars import COLUMNS
from data_sources.lake.parts import FORMAT, Part, flow_digest_of
from data_sources.lake.quality import FLOW_SCHEMA, SCHEMA, clean, flow_of

OTHER_BAR = "flow_of_other_bar"


def join_flow(part: Part, bars: pa.Table, answer: pa.Table, now_ns: int) -> tuple[Part, pa.Table, pa.Table]:
    """Give each bar of a part the flow that ``answer`` has for its minute, where both have the same bar.

    No bar changes, comes or goes. Where prices or volume differ, the answer's row is set aside as ``OTHER_BAR``.

    Args:
        part: the footer.
        bars: its rows.
        answer: a newer answer to its request; as for quality.clean.
        now_ns: the time of the answer.

    Returns:
        The new footer, the bars with flow, and the answer's rows whose flow no bar got, with the reason.
    """
    fresh = clean(answer, now_ns=now_ns, start_ns=part.start_ns, end_ns=part.end_ns, symbols=part.symbols)
    names, keys = flow_of(fresh.table), ["symbol", "open_time"]
    held = pl.DataFrame(pl.from_arrow(bars.select(SCHEMA.names))).with_columns(
        pl.col("symbol").cast(pl.String)
    )
    now = pl.DataFrame(pl.from_arrow(fresh.table))
    both = held.join(now, keys, "left", suffix="_now", maintain_order="left")
    is_same = pl.all_horizontal(pl.col(name) == pl.col(f"{name}_now") for name in COLUMNS[1:]).fill_null(
        False
    )
    has_flow = pl.any_horizontal(pl.lit(False), *(pl.col(name).is_not_null() for name in names))
    others = both.filter(~is_same & has_flow)
    both = both.with_columns(pl.when(is_same).then(pl.col(name)).alias(name) for name in names)
    names = [name for name in names if both[name].null_count() < len(both)]
    schema = pa.schema([FLOW_SCHEMA.field(name) for name in (*SCHEMA.names, *names)])
    table = both.select(schema.names).to_arrow().cast(schema)

    rejected = {symbol: dict(reasons) for symbol, reasons in fresh.flow_rejected.items()}
    for symbol, count in others.group_by("symbol").len().sort("symbol").rows():
        rejected.setdefault(symbol, {})[OTHER_BAR] = count
    reasons = {reason for counts in fresh.flow_rejected.values() for reason in counts}
    lost = fresh.quarantined.filter(pc.is_in(fresh.quarantined["reason"], pa.array(reasons, pa.string())))
    aside = now.join(others, keys, "semi").to_arrow().cast(fresh.table.schema)
    aside = aside.append_column("reason", pa.repeat(pa.scalar(OTHER_BAR), len(aside)))
    new = replace(
        part,
        format=FORMAT,
        flow={name: len(table) - table[name].null_count for name in names},
        flow_content=flow_digest_of(table),
        flow_rejected=rejected,
    )
    return new, table, pa.concat_tables([lost, aside], promote_options="permissive")


def added_to(path: Path, aside: pa.Table) -> pa.Table:
    """Return the rows of a quarantine file, if there is one, and ``aside``.

    Raises:
        OSError, ArrowException: it cannot be read.
    """
    if not path.exists():
        return aside
    held = pq.read_table(path)
    # Of an attempt that was killed before it wrote the part, the same rows may be there.
    again = pc.is_in(held["reason"], aside["reason"].combine_chunks())
    return pa.concat_tables([held.filter(pc.invert(again)), aside], promote_options="permissive")
