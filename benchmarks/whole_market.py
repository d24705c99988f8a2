"""``top:500`` at the market's real size: day files of 11,000 tickers to the lake, and the lake to the market.

    python benchmarks/whole_market.py days [--days 8] [--other FOLDER]
    python benchmarks/whole_market.py market [--symbols 500] [--sessions 504] [--other FOLDER]

``days``: made-up day files of Polygon, one at a time: 11,000 tickers, 1.6 million rows from 04:00 to 20:00, three
sessions of October and the first ones of November, on a real S3 server on loopback. A refresh of ``top:500``
fetches each as it comes, then all of them into an empty lake, four at a time; then the rule chooses the members.

``market``: a lake as such refreshes leave it, but with the chosen symbols alone: a part for each session, every
minute a bar. The mapped copy is written, the market made of it, and made again as in a restart, with the scales
and the features that are kept.

Every measurement is a process of its own that has imported all. CPU seconds are of all threads. Memory is the peak
of anonymous memory above the imports: pages of mapped files belong to the page cache, one copy for all processes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "flatfiles"
NUM_TICKERS = 11_000
BUSY = 1_330  # tickers with a bar in every minute of the session; others have fewer, the smaller the fewer
SMALL = 20  # symbols and sessions of the market that is made before the clock starts


def sessions(first: dt.date, count: int) -> list[dt.date]:
    """Return weekdays: a made-up market has no holidays."""
    days = (first + dt.timedelta(days=number) for number in range(2 * count + 7))
    return [day for day in days if day.weekday() < 5][:count]


def tickers(count: int) -> list[str]:
    """Return names of four letters, spread over the alphabet."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    numbers = [number * 10_007 % 26**4 for number in range(count)]
    return ["".join(letters[number // 26**place % 26] for place in range(4)) for number in numbers]


def walk(random, shape: tuple[int, ...]) -> list:
    """Return open, high, low, close and volume of random walks along the last axis."""
    import numpy as np

    close = np.round(50 * np.exp(np.cumsum(random.normal(0, 8e-4, shape), axis=-1)), 2)
    opened = np.concatenate([np.full((*shape[:-1], 1), 50.0), close[..., :-1]], axis=-1)
    volume = np.round(random.exponential(900.0, shape)) + 1
    return [opened, np.maximum(opened, close) + 0.01, np.minimum(opened, close) - 0.01, close, volume]


def day_file(day: dt.date) -> tuple[bytes, int]:
    """Return a day file as Polygon writes it, and its number of rows."""
    import gzip

    import numpy as np
    import polars as pl

    from data_sources.calendar import new_york_midnight_ns

    random = np.random.default_rng(day.toordinal())
    minutes = np.arange(240, 1_200)
    share = np.minimum(1.0, (BUSY / np.arange(1, NUM_TICKERS + 1)) ** 1.2)[:, None]
    in_session = (minutes >= 570) & (minutes < 960)
    has_bar = random.random((NUM_TICKERS, len(minutes))) < np.where(in_session, share, 0.1 * share)
    opened, high, low, close, volume = walk(random, has_bar.shape)
    volume = np.round(volume * np.sqrt(BUSY / np.arange(1, NUM_TICKERS + 1))[:, None]) + 1
    number, minute = np.nonzero(has_bar)
    values = {
        "ticker": pl.Series(tickers(NUM_TICKERS)).gather(number),
        **{name: array[has_bar] for name, array in
           {"volume": volume.astype(np.int64), "open": opened, "close": close, "high": high, "low": low}.items()},
        "window_start": new_york_midnight_ns(day) + minutes[minute] * 60_000_000_000,
        "transactions": volume[has_bar].astype(np.int64) // 90 + 1,
    }  # fmt: skip
    text = io.BytesIO()
    pl.DataFrame(values).sort("ticker", "window_start").write_csv(text)
    return gzip.compress(text.getbuffer(), 3), len(number)


def request_for(first: dt.date, last: dt.date, *stocks: str):
    from data_sources.calendar import new_york_midnight_ns
    from data_sources.sources import DataRequest

    times = new_york_midnight_ns(first), new_york_midnight_ns(last + dt.timedelta(days=1))
    return DataRequest(("polygon",), {"stocks": stocks}, *times, min_bars=100)


def make_lake(folder: Path, num_symbols: int, days: list[dt.date]) -> None:
    """Fill a lake with a part for each session, of symbols with a bar in every minute."""
    import numpy as np
    import pyarrow as pa

    from data_sources.calendar import new_york_midnight_ns
    from data_sources.lake.lake import Lake

    lake, names, random = Lake(folder), sorted(tickers(num_symbols)), np.random.default_rng(0)
    symbol = pa.array(np.repeat(names, 390))
    for day in days:
        begin_ns = new_york_midnight_ns(day)
        times = np.tile(begin_ns + np.arange(570, 960) * 60_000_000_000, num_symbols)
        columns = [array.ravel() for array in walk(random, (num_symbols, 390))]
        header = ["symbol", "open_time", "open", "high", "low", "close", "volume"]
        lake.write(
            "polygon", "us_stocks_sip", day.isoformat(), pa.table([symbol, times, *columns], names=header),
            key="", version="1", start_ns=begin_ns, end_ns=begin_ns + 86_400 * 10**9, symbols=names,
            now_ns=begin_ns + 2 * 86_400 * 10**9,
        )  # fmt: skip


# --- what is measured, each in a process of its own ------------------------------------------------------------


def refresh(folder: str, first: str, last: str) -> dict[str, float]:
    from data_sources.lake.lake import Lake
    from data_sources.progress import NullProgress
    from data_sources.sources import RefreshJob
    from data_sources.splits import SplitLedger
    from data_sources.vendors.polygon_refresh import Polygon

    lake = Lake(Path(folder))
    request = request_for(dt.date(2026, 11, 1), dt.date.fromisoformat(last), "top:500")

    def work() -> dict[str, float]:
        job = RefreshJob(
            lake, request, request.end_ns + 86_400 * 10**9, NullProgress(), SplitLedger(lake.root)
        )
        with lake.writing():
            Polygon.from_environment().refresh(job)
        return {}

    found = measured(work)
    parts = lake.parts("polygon", "us_stocks_sip").values()
    return found | {"bars": sum(part.rows for part in parts), "days": len(parts), "bytes": size_of(folder)}


def choose(folder: str, first: str, last: str) -> dict[str, float]:
    from data_sources.lake.lake import Lake
    from data_sources.universe import members

    request = request_for(dt.date(2026, 11, 1), dt.date.fromisoformat(last), "top:500")
    span = request.start_ns, request.end_ns
    return measured(
        lambda: {"symbols": len(members(Lake(Path(folder)), "polygon", "us_stocks_sip", 500, *span))}
    )


def copy(folder: str, num_symbols: str, first: str, last: str) -> dict[str, float]:
    from data_sources import snapshot
    from data_sources.lake.lake import Lake

    lake = Lake(Path(folder))
    names = sorted(tickers(int(num_symbols)))
    request = request_for(dt.date.fromisoformat(first), dt.date.fromisoformat(last), *names)

    def work() -> dict[str, float]:
        path = snapshot.provide(lake, request)
        assert path is not None
        return {"mapped": path.stat().st_size}

    return measured(work) | {"bytes": size_of(folder)}


def market(folder: str) -> dict[str, float]:
    import torch

    from continuous_training import Settings
    from data_sources import snapshot
    from envs.features import FeatureStatistics
    from training.data_feed import make_market
    from training.distributed import Ranks

    path = next((Path(folder) / ".ready").glob("*.npy"))
    data, ranks = snapshot.open_snapshot(path), Ranks(0, 1, torch.device("cpu"))
    settings, known = Settings(sources=("polygon",), holdout_days=1), Path(folder) / "scale.pt"
    scale = FeatureStatistics.from_state_dict(torch.load(known)) if known.exists() else None
    few = [series.rows(0, SMALL * 390) for series in data.bars[:SMALL]]
    make_market(settings, few, ranks, None)

    def work() -> dict[str, float]:
        begun = make_market(settings, data.bars, ranks, scale, path)
        torch.save(begun.statistics.state_dict(), known)
        return {"bars": len(begun.open_time), "market": begun.num_bytes, "features": begun.features.nbytes}

    return measured(work)


def measured(work) -> dict[str, float]:
    """Return what ``work`` returns, its CPU seconds, seconds, and peak of anonymous memory."""
    from lake_to_tensors import Peak

    begin, cpu = time.monotonic(), time.process_time()
    with Peak() as peak:
        found = work()
    cpu, wall = time.process_time() - cpu, time.monotonic() - begin
    return found | {"cpu": cpu, "wall": wall, "peak": peak.megabytes * 2**20}


def size_of(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))


MEASURES = {"refresh": refresh, "choose": choose, "copy": copy, "market": market}


def run(root: Path, *words: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", *words]
    surroundings = os.environ | environment | {"PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
    answer = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=surroundings
    )
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def row(name: str, found: dict[str, float], count: float, unit: str) -> None:
    text = (
        f"{found['cpu']:.1f} | {found['wall']:.1f} | {found['peak'] / 1e6:,.0f} | {found['cpu'] / count:.3f}"
    )
    print(f"| {name} | {text} a {unit} |", flush=True)


HEADER = "| | CPU seconds | seconds | peak MB | CPU seconds |\n|---|---|---|---|---|"


def measure_days(folder: Path, count: int, root: Path) -> None:
    import logging

    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "owner", "region_name": "us-east-1"}
    owner = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    owner.create_bucket(Bucket=BUCKET)
    settings = {
        "POLYGON_S3_ENDPOINT": f"http://{host}:{port}",
        "POLYGON_S3_ACCESS_KEY": "owner",
        "POLYGON_S3_SECRET_KEY": "owner",
    }
    days = sessions(dt.date(2026, 10, 28), count)
    print(HEADER)
    for day in days:
        content, num_rows = day_file(day)
        key = f"us_stocks_sip/minute_aggs_v1/{day:%Y/%m}/{day:%Y-%m-%d}.csv.gz"
        owner.put_object(Bucket=BUCKET, Key=key, Body=content)
        last = max(day, dt.date(2026, 11, 2)).isoformat()
        found = run(root, "refresh", str(folder / "one"), str(day), last, **settings)
        row(f"{day}: {num_rows:,} rows, {len(content) / 1e6:.0f} MB", found, 1, "day")
    last = max(days[-1], dt.date(2026, 11, 2)).isoformat()
    together = run(root, "refresh", str(folder / "all"), "", last, **settings)
    row(f"{count} days at once", together, count, "day")
    row(
        "a refresh without news",
        run(root, "refresh", str(folder / "all"), "", last, **settings),
        count,
        "day",
    )
    chosen = run(root, "choose", str(folder / "all"), "", last)
    row(f"the rule: {chosen['symbols']:.0f} symbols", chosen, count, "day")
    text = (
        f"{together['bars'] / count:,.0f} bars a day, {together['bytes'] / together['bars']:.1f} bytes each"
    )
    print(f"The lake keeps {text}.")
    server.stop()


def measure_market(folder: Path, num_symbols: int, num_sessions: int, root: Path) -> None:
    days = sessions(dt.date(2024, 11, 25), num_sessions)
    begin = time.process_time()
    make_lake(folder, num_symbols, days)
    print(f"Made a lake in {time.process_time() - begin:.0f} CPU seconds.", flush=True)
    bars, thousands = num_symbols * num_sessions * 390, num_symbols * num_sessions / 1e3
    print(f"{num_symbols} symbols, {num_sessions} sessions, {bars:,} bars\n{HEADER}")
    copied = run(root, "copy", str(folder), str(num_symbols), str(days[0]), str(days[-1]))
    row("lake to mapped copy", copied, thousands, "thousand symbol-days")
    computed = run(root, "market", str(folder))
    row("copy to market", computed, thousands, "thousand symbol-days")
    row("the same in a restart", run(root, "market", str(folder)), thousands, "thousand symbol-days")
    sizes = {"lake": copied["bytes"], "copy": copied["mapped"]}
    sizes |= {"features": computed["features"], "market with them": computed["market"]}
    text = ", ".join(f"{name} {size / 1e6:,.0f} MB ({size / bars:.1f} a bar)" for name, size in sizes.items())
    print(f"On disk, mapped or on the device: {text}.")


def main() -> None:
    """Make the data, measure, and print a table."""
    if sys.argv[1:2] == ["--measure"]:
        name, *words = sys.argv[2:]
        print(json.dumps(MEASURES[name](*words)))
        return
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("days", "market"))
    parser.add_argument("--days", type=int, default=8)
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=504)
    parser.add_argument("--other", type=Path, default=ROOT, help="folder of another commit, measured instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        if options.what == "days":
            measure_days(Path(folder), options.days, options.other)
        else:
            measure_market(Path(folder), options.symbols, options.sessions, options.other)


if __name__ == "__main__":
    main()
