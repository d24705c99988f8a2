"""Polygon's (now Massive's) bucket of flat files: listing it, and fetching an object.

No error of the client library leaves this module.

Vendor's pages, 2026: massive.com/docs/flat-files, massive.com/knowledge-base/article/
how-to-get-started-with-s3.
"""

from __future__ import annotations

import datetime as dt
import os
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.exceptions as aws
import botocore.session
import urllib3.exceptions
from botocore.config import Config

from data_sources.errors import BadAnswer, Refused, SourceUnavailable
from data_sources.vendors.http import Host, RetryPolicy, error_of
from data_sources.vendors.polygon import DataType

BUCKET = "flatfiles"
CHUNK_BYTES = 1 << 20
MOST_PAGES = 100  # of a year's listing, even with four keys a page
# What botocore raises for an answer that it cannot parse, such as a date that is none.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


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
    """One downloaded object, complete by its length, and the version that was downloaded."""

    content: bytes
    version: str


class FlatFiles:
    """The bucket, for one pair of keys; the client library alone keeps the secret. Safe for several threads."""

    def __init__(
        self, endpoint: str, access_key: str, secret_key: str, policy: RetryPolicy, connections: int
    ) -> None:
        self.host = Host(policy, f"Polygon files {endpoint}", refuses_files=True)
        self._endpoint = endpoint
        # A session without profile and AWS files: another account's settings must not leak in, and a
        # stale AWS_PROFILE must not break this.
        session = botocore.session.Session(
            session_vars={
                "profile": (None, None, None, None),
                "config_file": (None, None, os.devnull, None),
                "credentials_file": (None, None, os.devnull, None),
                "data_path": (None, None, None, None),
                "defaults_mode": (None, None, "legacy", None),
                "use_dualstack_endpoint": (None, None, None, None),  # which, as FIPS, excludes an endpoint
                "use_fips_endpoint": (None, None, None, None),
            }
        )
        self._client: Any = boto3.Session(access_key, secret_key, botocore_session=session).client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "total_max_attempts": 1},  # Host retries
                connect_timeout=policy.connect_seconds,
                read_timeout=policy.read_seconds,
                max_pool_connections=connections,
                # The vendor is not AWS: ask for nothing that only AWS has.
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
        task = f"list {data_type.dataset} {year}"
        files: list[DayFile] = []
        for _ in range(MOST_PAGES):
            page = self._ask(lambda: self._client.list_objects_v2(**request), task)
            try:
                if page.get("Name") != BUCKET:  # botocore reads any XML, a web page too, as an empty listing
                    raise KeyError("Name")
                for entry in page.get("Contents", []):
                    key, etag, size = entry["Key"], entry["ETag"], entry["Size"]
                    match = pattern.fullmatch(key)
                    day = _date_or_none(match[1]) if match else None
                    if day is not None:
                        files.append(DayFile(day, key, _plain_etag(etag), size))
                if not page.get("IsTruncated"):
                    return files
                request["ContinuationToken"] = page["NextContinuationToken"]
            except KeyError as error:
                raise SourceUnavailable(
                    f"{self._endpoint} ({task}) sent no listing: check POLYGON_S3_ENDPOINT or try later"
                ) from error
        raise SourceUnavailable(
            f"{self._endpoint} ({task}) sent a listing without end, check POLYGON_S3_ENDPOINT"
        )

    def probe(self, data_type: DataType, today: dt.date) -> tuple[str, str]:
        """Read one byte of the newest day file: files outside of the plan are listed all the same.

        Returns:
            What came, in words, and the server's time as the HTTP header Date.

        Raises:
            DataError: as ``list_year``, or there is no day file at all.
        """
        files = self.list_year(data_type, today.year) or self.list_year(data_type, today.year - 1)
        if not files:
            raise SourceUnavailable(
                f"no day file of {data_type.dataset} is listed since last year; is POLYGON_S3_ENDPOINT right?"
            )
        newest = max(files, key=lambda file: file.day)
        answer = self._get_object(newest.key, Range="bytes=0-0")
        answer["Body"].close()
        date: str = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        return f"accepts the keys; newest day file {newest.day}", date

    def get(self, file: DayFile, received: Callable[[int], None]) -> Body:
        """Download one object into memory (27 MB mostly), complete by its Content-Length, else by the listed size.

        Args:
            file: what to get.
            received: called with the size of every chunk.

        Raises:
            FileNotFoundError: it is gone since it was listed.
            Refused: it is not in the plan of these keys, although listed.
            BadAnswer: the connection was cut within the body.
            SourceUnavailable: no answer after all attempts, far too slow, or the host was stopped.
        """
        began, policy = time.monotonic(), self.host.policy
        answer = self._get_object(file.key)
        # Some proxies send a body in chunks, without its length.
        length, chunks, num_bytes = answer.get("ContentLength", file.size), [], 0
        try:
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                chunks.append(chunk)
                num_bytes += len(chunk)
                received(len(chunk))
                if self.host.stop.is_set():
                    raise SourceUnavailable("stopped")
                if time.monotonic() - began > policy.total_seconds:
                    raise SourceUnavailable(
                        f"{file.key}: {num_bytes:,} of {length:,} bytes in {policy.total_seconds:.0f} seconds"
                    )
        except (aws.ReadTimeoutError, urllib3.exceptions.TimeoutError) as error:
            raise SourceUnavailable(
                f"{file.key}: no byte for {policy.read_seconds:.0f} seconds after {num_bytes:,}"
            ) from error
        except (aws.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            raise BadAnswer(f"{file.key}: body ended after {num_bytes:,} of {length:,} bytes") from error
        finally:
            answer["Body"].close()
        if num_bytes != length:
            raise BadAnswer(f"{file.key}: body ended after {num_bytes:,} of {length:,} bytes")
        # Of the listed length: the listed object. Otherwise it was replaced since it was listed, and the
        # version is that of the body, so that the next listing decides.
        version = file.version if length == file.size else f"{_plain_etag(answer.get('ETag', ''))}/{length}"
        return Body(b"".join(chunks), version)

    def _get_object(self, key: str, **request: str) -> Any:
        """Return the answer for an object, its body still to be read; raises as ``get``."""
        return self._ask(lambda: self._client.get_object(Bucket=BUCKET, Key=key, **request), f"get {key}")

    def _ask(self, request: Callable[[], Any], task: str) -> Any:
        def once() -> Any:
            try:
                return request()
            except aws.ClientError as error:
                raise self._translate(error, task) from error
            except (aws.BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
                # Its type alone: its text may hold more than a user should paste somewhere.
                reason = type(error).__name__ + socks_note()
                raise SourceUnavailable(f"{self._endpoint} ({task}) does not answer: {reason}") from error
            except _UNREADABLE as error:
                reason = type(error).__name__
                raise SourceUnavailable(
                    f"{self._endpoint} ({task}) sent an unreadable answer: {reason}"
                ) from error

        return self.host.retry(once)

    def _translate(self, error: aws.ClientError, task: str) -> Exception:
        """Return our error for an error answer: one line, without the vendor's own text."""
        metadata = error.response.get("ResponseMetadata", {})
        status = int(metadata.get("HTTPStatusCode", 0))
        code = re.sub(r"[^A-Za-z0-9]", "", str(error.response.get("Error", {}).get("Code", "")))[:40]
        details = "" if code == str(status) else code
        host = f"{self._endpoint} ({task})"
        fix = "check POLYGON_S3_ACCESS_KEY and POLYGON_S3_SECRET_KEY, and that the plan includes flat files"
        if code == "RequestTimeTooSkewed":
            fix = "the clock of this machine is wrong, set it"
        if status == 404:
            if task.startswith("get ") and code != "NoSuchBucket":
                return FileNotFoundError(task)
            return SourceUnavailable(f"{host} answered HTTP 404 {details}: check POLYGON_S3_ENDPOINT")
        if status == 400:  # an expired key
            return Refused(f"{host} refuses access (HTTP 400 {details}): {fix}")
        headers = metadata.get("HTTPHeaders", {})
        answer = error_of(status, host, fix=fix, details=details, headers=headers)
        return SourceUnavailable(str(answer)) if isinstance(answer, BadAnswer) else answer


def socks_note() -> str:
    """Return a word on a SOCKS proxy in the environment, which botocore cannot use; else nothing."""
    proxies = urllib.request.getproxies()
    if not any(proxies.get(kind, "").lower().startswith("socks") for kind in ("http", "https", "all")):
        return ""
    return "; Polygon's files come through no SOCKS proxy: set HTTPS_PROXY to one of HTTP"


def _plain_etag(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _date_or_none(text: str) -> dt.date | None:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        return None
