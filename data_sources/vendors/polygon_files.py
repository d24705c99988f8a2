"""Polygon's (now Massive's) bucket of flat files: what it lists, and how an object is fetched.

No client library's error leaves this module.

Vendor's pages, 2026: massive.com/docs/flat-files, massive.com/knowledge-base/article/
how-to-get-started-with-s3.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import boto3
import botocore.exceptions as aws
import botocore.session
import urllib3.exceptions
from botocore.config import Config

from data_sources.errors import BadAnswer, DataError, RateLimited, Refused, SourceUnavailable

BUCKET = "flatfiles"
LONGEST_RETRY_AFTER_SECONDS = 60.0
CHUNK_BYTES = 1 << 20
LONGEST_GET_SECONDS = 900.0  # 27 MB at 30 kB/s; slower than that is a hang
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class DataType:
    """One of the vendor's data types: where its day files are and which hours a day of it has."""

    dataset: str
    zone: dt.tzinfo
    ending: str = ""  # of the tickers that a rule may choose

    @property
    def prefix(self) -> str:
        """What the keys of its minute files begin with."""
        return f"{self.dataset}/minute_aggs_v1/"

    def interval(self, day: dt.date) -> tuple[int, int]:
        """Return the half-open interval of ``day``, ns UTC: from midnight to midnight in its own zone."""
        midnights = (
            dt.datetime.combine(day + dt.timedelta(days=more), dt.time(), self.zone) for more in (0, 1)
        )
        start, end = (int(midnight.timestamp()) * NANOSECONDS for midnight in midnights)
        return start, end

    def day_of(self, time_ns: int) -> dt.date:
        """Return the day that holds ``time_ns``."""
        return dt.datetime.fromtimestamp(time_ns // NANOSECONDS, self.zone).date()


US_STOCKS = DataType("us_stocks_sip", ZoneInfo("America/New_York"))  # 04:00-20:00 New York
GLOBAL_CRYPTO = DataType("global_crypto", dt.UTC, "-USD")  # every calendar day


@dataclass(frozen=True)
class DayFile:
    """One listed object."""

    day: dt.date
    key: str
    etag: str
    size: int

    @property
    def version(self) -> str:
        """What changes when the vendor replaces the file."""
        return f"{self.etag}/{self.size}"


@dataclass(frozen=True)
class Body:
    """One downloaded object, complete by its Content-Length, and the version that was downloaded."""

    content: bytes
    version: str


class FlatFiles:
    """The bucket, for one pair of keys. Safe to use from several threads.

    Args:
        endpoint: scheme and host of the S3 service.
        access_key: S3 access key id.
        secret_key: its secret, kept by the client library only.
        connect_timeout_seconds: for a connection to come about.
        read_timeout_seconds: without a byte for so long, a request is tried again.
        attempts: of one request in all, while the source does not answer or answers 5xx.
        connections: kept open at most.
    """

    def __init__(
        self,
        endpoint: str,
        access_key: str,
        secret_key: str,
        *,
        connect_timeout_seconds: float,
        read_timeout_seconds: float,
        attempts: int,
        connections: int,
    ) -> None:
        self.endpoint = endpoint
        self.read_timeout_seconds = read_timeout_seconds
        # A session without profile and AWS files: another account's settings must not leak in, and a
        # stale AWS_PROFILE must not break this.
        session = botocore.session.Session(
            session_vars={
                "profile": (None, None, None, None),
                "config_file": (None, None, os.devnull, None),
                "credentials_file": (None, None, os.devnull, None),
            }
        )
        self._client: Any = boto3.Session(access_key, secret_key, botocore_session=session).client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "total_max_attempts": attempts},
                connect_timeout=connect_timeout_seconds,
                read_timeout=read_timeout_seconds,
                max_pool_connections=connections,
                # The vendor is no AWS: ask for nothing that only AWS has.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def list_year(self, data_type: DataType, year: int) -> list[DayFile]:
        """Return the day files of one year; a year fits one page of 1,000 keys.

        Raises:
            Refused: these keys may not list it.
            SourceUnavailable: no answer, or no listing, after all attempts.
        """
        pattern = re.compile(re.escape(data_type.prefix) + r"\d{4}/\d{2}/(\d{4}-\d{2}-\d{2})\.csv\.gz")
        request = {"Bucket": BUCKET, "Prefix": f"{data_type.prefix}{year}/"}
        files: list[DayFile] = []
        while True:
            page = self._ask(
                lambda: self._client.list_objects_v2(**request), f"list {data_type.dataset} {year}", None
            )
            if page.get("Name") != BUCKET:  # botocore reads any XML, a web page too, as an empty listing
                raise SourceUnavailable(
                    f"{self.endpoint} answered something else than a listing of {data_type.dataset} {year},"
                    " check POLYGON_S3_ENDPOINT or try later"
                )
            for entry in page.get("Contents", []):
                match = pattern.fullmatch(entry["Key"])
                day = _date_or_none(match[1]) if match else None
                if day is not None:
                    files.append(DayFile(day, entry["Key"], _plain_etag(entry["ETag"]), entry["Size"]))
            if not page.get("IsTruncated"):
                return files
            request["ContinuationToken"] = page["NextContinuationToken"]

    def probe(self, data_type: DataType, today: dt.date) -> tuple[str, str]:
        """Ask for one byte of the newest day file: what is outside of the plan is listed all the same.

        Returns:
            What came, in words, and the server's time as the HTTP header Date.

        Raises:
            Refused: these keys may not list or read it.
            SourceUnavailable: no answer, or no day file at all.
        """
        files = self.list_year(data_type, today.year) or self.list_year(data_type, today.year - 1)
        if not files:
            raise SourceUnavailable(
                f"no day file of {data_type.dataset} is listed since last year; is POLYGON_S3_ENDPOINT right?"
            )
        newest = max(files, key=lambda file: file.day)
        task = f"read {newest.key}"
        answer = self._ask(
            lambda: self._client.get_object(Bucket=BUCKET, Key=newest.key, Range="bytes=0-0"), task, None
        )
        answer["Body"].close()
        date: str = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        return f"accepts the keys; newest day file {newest.day}", date

    def get(self, file: DayFile, received: Callable[[int], None], stopping: threading.Event) -> Body:
        """Download one object in memory (27 MB at most times), complete by its Content-Length.

        Args:
            file: what to get.
            received: told of the bytes of every chunk.
            stopping: when set, the download is given up.

        Raises:
            FileNotFoundError: it is gone since it was listed.
            Refused: it is not in the plan of these keys, although listed.
            BadAnswer: the connection was cut within the body.
            SourceUnavailable: no answer after all attempts, or far too slow.
        """
        began = time.monotonic()
        try:
            answer = self._ask(
                lambda: self._client.get_object(Bucket=BUCKET, Key=file.key), f"get {file.key}", stopping
            )
        except SourceUnavailable as error:
            gone = error.__cause__
            if isinstance(gone, aws.ClientError) and _status(gone) == 404 and _code(gone) != "NoSuchBucket":
                raise FileNotFoundError(file.key) from gone
            raise
        length, chunks, num_bytes = answer["ContentLength"], [], 0
        try:
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                chunks.append(chunk)
                num_bytes += len(chunk)
                received(len(chunk))
                if stopping.is_set():
                    raise SourceUnavailable("stopped")
                if time.monotonic() - began > LONGEST_GET_SECONDS:
                    raise SourceUnavailable(
                        f"{file.key}: {num_bytes:,} of {length:,} bytes in {LONGEST_GET_SECONDS:.0f} seconds"
                    )
        except (aws.ReadTimeoutError, urllib3.exceptions.TimeoutError) as error:
            raise SourceUnavailable(
                f"{file.key}: no byte for {self.read_timeout_seconds:.0f} seconds after {num_bytes:,}"
            ) from error
        except (aws.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            raise BadAnswer(f"{file.key}: body ended after {num_bytes:,} of {length:,} bytes") from error
        finally:
            answer["Body"].close()
        if num_bytes != length:
            raise BadAnswer(f"{file.key}: body ended after {num_bytes:,} of {length:,} bytes")
        # Of the listed length: the listed object. Otherwise it was replaced since it was listed, and the
        # version is what came, so that the next listing decides.
        version = file.version if length == file.size else f"{_plain_etag(answer.get('ETag', ''))}/{length}"
        return Body(b"".join(chunks), version)

    def _ask(self, request: Callable[[], Any], task: str, stopping: threading.Event | None) -> Any:
        """Make a request; wait and make it once more when the vendor asks for a short pause."""
        for is_last in (False, True):
            try:
                return request()
            except aws.ClientError as error:
                translated = self._translated(error, task)
                pause = translated.retry_after if isinstance(translated, RateLimited) else None
                if is_last or pause is None or pause > LONGEST_RETRY_AFTER_SECONDS:
                    raise translated from error
                if (stopping or threading.Event()).wait(pause):
                    raise translated from error
            except (aws.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
                reason = type(error).__name__  # its text may hold more than a user should paste somewhere
                raise SourceUnavailable(f"could not {task} at {self.endpoint}: {reason}") from error
        raise AssertionError("the second request returns or raises")

    def _translated(self, error: aws.ClientError, task: str) -> DataError:
        """Return our error for an error answer: one line, without the vendor's own text."""
        status, code = _status(error), _code(error)
        said = f"HTTP {status}" if code in ("", str(status)) else f"HTTP {status} {code}"
        if code == "RequestTimeTooSkewed":
            return Refused(f"may not {task} ({said}): the clock of this machine is wrong, set it")
        if status in (400, 401, 403):
            return Refused(
                f"may not {task} at {self.endpoint} ({said}): check POLYGON_S3_ACCESS_KEY and"
                " POLYGON_S3_SECRET_KEY, and that the plan includes flat files"
            )
        if status == 404:
            return SourceUnavailable(
                f"could not {task} at {self.endpoint} ({said}): check POLYGON_S3_ENDPOINT"
            )
        text = f"could not {task} at {self.endpoint} ({said})"
        if status == 429:
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            seconds = headers.get("retry-after", "")
            return RateLimited(text, float(seconds) if seconds.isdecimal() else None)
        return SourceUnavailable(text)


def _status(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _plain_etag(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _date_or_none(text: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        return None


def _code(error: aws.ClientError) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", str(error.response.get("Error", {}).get("Code", "")))[:40]
