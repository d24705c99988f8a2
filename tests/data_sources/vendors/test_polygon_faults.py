"""Polygon's damaged files, failing hosts, refusals and wrong keys, over HTTP, signatures checked by moto."""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import replace
from functools import partial

import pytest

from data_sources.errors import DataError, MissingCredentials, Refused, SourceUnavailable
from data_sources.vendors import polygon_files, polygon_refresh
from data_sources.vendors.polygon_refresh import Polygon
from tests.data_sources.vendors.polygon_harness import (
    DAYS,
    KEY_ID,
    NUM_BARS,
    SECRET,
    closes,
    expected_closes,
    held_days,
    put_days,
    refresh,
    rows,
    stamp_of,
)
from tests.data_sources.vendors.s3_server import CRYPTO, STOCKS, WEB_PAGE, Fault, day_file, key_of


def with_policy(source: Polygon, **changes: float) -> Polygon:
    return replace(source, policy=replace(source.policy, **changes))


def shifted_a_day(day: dt.date) -> bytes:
    return day_file(rows("AAPL", day, shift_ns=86_400 * 10**9))


WHOLE = day_file(rows("AAPL", DAYS[2]))
BROKEN_FILES = {
    "cut gzip": WHOLE[: len(WHOLE) // 2],
    "gzip without its trailer": WHOLE[:-8],
    "wrong checksum": WHOLE[:-8] + bytes([WHOLE[-8] ^ 1]) + WHOLE[-7:],
    "plain text": b"ticker,volume\nAAPL,1\n",
    "web page": WEB_PAGE,
    "nothing": b"",
    "no header": day_file([], ""),
    "another schema": day_file(["AAPL,1,2"], "ticker,day,price"),
    "text for numbers": day_file([f"AAPL,many,1,1,1,1,{stamp_of(DAYS[2], 0)},1"]),
    "stamps a day late": shifted_a_day(DAYS[2]),
    "stamps in milliseconds": day_file([f"AAPL,1,1,1,1,1,{stamp_of(DAYS[2], 0) // 10**6},1"]),
    "no stamps": day_file(["AAPL,1,1,1,1,1,,1"]),
}


@pytest.mark.parametrize("broken", BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_a_broken_day_file_is_requested_twice_and_the_other_days_arrive(server, source, lake, broken):
    put_days(server, ["AAPL"])
    server.put(key_of(DAYS[2]), broken)
    (warning,) = refresh(source, lake, ["AAPL"]).warnings
    assert key_of(DAYS[2]) in warning and warning.isascii() and "\n" not in warning
    assert server.gets().count(key_of(DAYS[2])) == 2
    assert held_days(lake) == [day for day in DAYS if day != DAYS[2]]
    put_days(server, ["AAPL"], [DAYS[2]])
    refresh(source, lake, ["AAPL"])
    assert closes(lake, "AAPL") == expected_closes("AAPL")


def test_rows_ahead_of_the_present_cost_themselves_and_not_their_day(server, source, lake):
    ahead = rows("AAPL", DAYS[4], num_bars=5, shift_ns=9 * 86_400 * 10**9)
    server.put(key_of(DAYS[4]), day_file(rows("AAPL", DAYS[4]) + ahead))
    assert refresh(source, lake, ["AAPL"]).warnings == []
    assert closes(lake, "AAPL") == expected_closes("AAPL", DAYS[4:])
    assert lake.parts("polygon", "us_stocks_sip")[DAYS[4].isoformat()].rejected == {"future": 5}


def test_a_broken_replacement_leaves_the_kept_day_alone(server, source, lake):
    put_days(server, ["AAPL"])
    refresh(source, lake, ["AAPL"])
    server.put(key_of(DAYS[2]), BROKEN_FILES["wrong checksum"])
    refresh(source, lake, ["AAPL"])
    assert closes(lake, "AAPL") == expected_closes("AAPL")


@pytest.mark.parametrize("kind", ["cut", "reset", "page", "drop"])
def test_an_answer_broken_in_transit_is_requested_again_within_the_refresh(server, source, lake, kind):
    put_days(server, ["AAPL"])
    server.faults.append(Fault(kind, count=1))
    assert refresh(source, lake, ["AAPL"]).warnings == []
    assert closes(lake, "AAPL") == expected_closes("AAPL")


def test_a_flipped_bit_is_noticed_although_the_http_answer_is_fine(server, source, lake):
    put_days(server, ["AAPL"])

    def flip(body: bytes) -> bytes:
        return body[:200] + bytes([body[200] ^ 4]) + body[201:]

    server.faults.append(Fault("damage", str(DAYS[1]), damage=flip))
    recorder = refresh(source, lake, ["AAPL"])
    assert len(recorder.warnings) == 1 and DAYS[1] not in held_days(lake)
    server.faults.clear()
    refresh(source, lake, ["AAPL"])
    assert closes(lake, "AAPL") == expected_closes("AAPL")


def test_an_object_replaced_after_the_listing_is_compared_again_next_time(server, source, lake):
    put_days(server, ["AAPL"])
    newer = day_file(rows("AAPL", DAYS[2], num_bars=NUM_BARS - 1))
    server.faults.append(Fault("damage", str(DAYS[2]), damage=lambda body: newer))
    refresh(source, lake, ["AAPL"])
    server.faults.clear()
    server.log.clear()
    refresh(source, lake, ["AAPL"])
    assert server.gets() == [key_of(DAYS[2])]


def test_a_burst_of_503_is_waited_out(server, source, lake):
    put_days(server, ["AAPL"])
    server.faults.append(Fault("status", status=503, count=2))
    assert refresh(source, lake, ["AAPL"]).warnings == []
    assert held_days(lake) == DAYS


def test_a_429_is_obeyed_for_as_long_as_it_demands(server, source, lake):
    put_days(server, ["AAPL"])
    server.faults.append(Fault("status", status=429, headers={"Retry-After": "0"}, count=1))
    assert refresh(source, lake, ["AAPL"]).warnings == []
    assert held_days(lake) == DAYS


def test_a_day_that_failed_in_a_bad_minute_is_tried_again_at_the_end(server, source, lake):
    put_days(server, ["AAPL"])
    server.faults.append(Fault("status", str(DAYS[3]), status=502, count=2))
    recorder = refresh(with_policy(source, attempts=2), lake, ["AAPL"])
    assert recorder.warnings == [] and recorder.units == recorder.total == 5
    assert held_days(lake) == DAYS


def test_a_source_that_dies_after_the_first_day_keeps_it_and_is_given_up(server, source, lake):
    days = [dt.date(2026, 11, day) for day in range(1, 21)]
    put_days(server, ["AAPL"], days)
    server.faults.append(Fault("status", r"2026-11-(0\d|1\d)\.csv", status=500))
    with pytest.raises(SourceUnavailable, match=r"HTTP 500.*1 of 20 day files arrived"):
        refresh(with_policy(source, attempts=1), lake, ["AAPL"])
    assert held_days(lake) == days[-1:]
    assert len(server.gets()) <= 1 + source.policy.failures_in_a_row + polygon_refresh.PARALLEL_GETS
    server.faults.clear()
    refresh(source, lake, ["AAPL"])
    assert held_days(lake) == days


def test_a_hanging_source_is_given_up(server, source, lake):
    server.faults.append(Fault("hang", ""))
    with pytest.raises(SourceUnavailable, match="ReadTimeoutError"):
        refresh(with_policy(source, read_seconds=0.2, attempts=1), lake, ["AAPL"])


def test_a_body_that_drips_for_ever_is_given_up(server, source, lake, monkeypatch):
    monkeypatch.setattr(polygon_files, "CHUNK_BYTES", 4)
    put_days(server, ["AAPL"], DAYS[:2])
    server.faults.append(Fault("drip", "2026-11-17"))
    recorder = refresh(with_policy(source, total_seconds=0.3), lake, ["AAPL"])
    assert held_days(lake) == DAYS[:1]
    assert any("2026-11-17" in warning and "bytes in 0 seconds" in warning for warning in recorder.warnings)
    server.faults.clear()
    refresh(source, lake, ["AAPL"])
    assert held_days(lake) == DAYS[:2]


def test_an_expired_credential_is_refused_without_a_retry(server, source, lake):
    server.faults.append(Fault("status", "list-type", status=400))
    with pytest.raises(Refused, match="check POLYGON_S3_ACCESS_KEY"):
        refresh(source, lake, ["AAPL"])
    assert len(server.log) == 1


def test_a_refused_connection_is_a_source_that_is_down(source, lake):
    with pytest.raises(SourceUnavailable, match=r"http.* \(list us_stocks_sip 2026\) does not answer"):
        refresh(replace(with_policy(source, attempts=1), endpoint="http://127.0.0.1:9"), lake, ["AAPL"])


def test_a_web_page_instead_of_a_listing_is_not_an_empty_listing(server, source, lake):
    put_days(server, ["AAPL"])
    server.faults.append(Fault("page", "list-type"))
    with pytest.raises(SourceUnavailable):
        refresh(source, lake, ["AAPL"])


BROKEN_LISTINGS = {
    "no size": (rb"<Size>\d+</Size>", b""),
    "a size that is none": (rb"<Size>", b"<Size>about "),
    "no version": (rb"<ETag>[^<]*</ETag>", b""),
    "no key": (rb"<Key>[^<]*</Key>", b""),
    "a date that is none": (rb"<LastModified>", b"<LastModified>about "),
    "more pages and no way to them": (rb"(<IsTruncated>)false", rb"\1true"),
}


@pytest.mark.parametrize("broken", BROKEN_LISTINGS.values(), ids=BROKEN_LISTINGS.keys())
def test_a_listing_that_cannot_be_one_is_a_source_that_is_down(server, source, lake, broken):
    put_days(server, ["AAPL"])
    server.faults.append(Fault("damage", "list-type", damage=partial(re.sub, *broken)))
    with pytest.raises(SourceUnavailable, match=r"\(list us_stocks_sip 2026\) sent"):
        refresh(source, lake, ["AAPL"])


def test_a_listing_without_end_is_given_up(server, source, lake, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    monkeypatch.setattr(polygon_files, "MOST_PAGES", 2)
    put_days(server, ["AAPL"])
    with pytest.raises(SourceUnavailable, match=r"sent a listing without end"):
        refresh(source, lake, ["AAPL"])


def test_a_body_without_its_length_is_complete_by_the_listing(server, source, lake):
    put_days(server, ["AAPL"])
    server.faults.append(Fault("chunked"))
    assert refresh(source, lake, ["AAPL"]).warnings == []
    assert closes(lake, "AAPL") == expected_closes("AAPL")
    assert refresh(source, lake, ["AAPL"]).total == 0


def test_a_missing_bucket_points_at_the_endpoint(server, source, lake):
    server.owner("s3").delete_bucket(Bucket="flatfiles")
    with pytest.raises(SourceUnavailable, match=r"404 NoSuchBucket.*POLYGON_S3_ENDPOINT"):
        refresh(source, lake, ["AAPL"])


def test_a_window_without_any_day_file_is_a_warning(server, source, lake):
    (warning,) = refresh(source, lake, ["AAPL"]).warnings
    assert "no day file is listed" in warning


def test_an_object_gone_since_the_listing_is_not_an_error(server, source, lake):
    put_days(server, ["AAPL"])
    server.faults.append(Fault("status", str(DAYS[2]), status=404))
    assert refresh(source, lake, ["AAPL"]).warnings == []
    assert held_days(lake) == [day for day in DAYS if day != DAYS[2]]


def test_crypto_outside_of_the_plan_is_requested_and_reported_once_while_stocks_arrive(server, source, lake):
    put_days(server, ["AAPL"])
    put_days(server, ["X:BTC-USD"], data_type=CRYPTO)
    key_id, secret = server.new_user(denied=["global_crypto/*"])
    with server.signatures_checked():
        recorder = refresh(
            replace(source, access_key=key_id, secret_key=secret), lake, ["AAPL"], ["X:BTC-USD"]
        )
    assert held_days(lake) == DAYS and held_days(lake, "global_crypto") == []
    assert sum("global_crypto" in key for key in server.gets()) == 1
    (warning,) = recorder.warnings
    assert "global_crypto" in warning and "403" in warning and "plan" in warning
    assert recorder.units == recorder.total == 10


def test_days_older_than_the_plan_are_refused_without_asking_for_all_of_them(server, source, lake):
    days = [dt.date(2026, 11, day) for day in range(1, 21)]
    put_days(server, ["AAPL"], days)
    key_id, secret = server.new_user(denied=[f"{STOCKS}/2026/11/2026-11-0*"])
    with server.signatures_checked():
        entitled = replace(source, access_key=key_id, secret_key=secret)
        (warning,) = refresh(entitled, lake, ["AAPL"]).warnings
        assert held_days(lake) == days[9:]
        assert "9 missing days up to 2026-11-09" in warning
        server.log.clear()
        refresh(entitled, lake, ["AAPL"])
    assert server.gets() == [key_of(days[8])]


def test_a_wrong_secret_is_refused_in_words_that_hold_no_key(server, source, lake):
    put_days(server, ["AAPL"])
    key_id, secret = server.new_user(denied=[])
    with server.signatures_checked():
        with pytest.raises(Refused, match=r"403 SignatureDoesNotMatch.*POLYGON_S3_SECRET_KEY") as raised:
            refresh(replace(source, access_key=key_id), lake, ["AAPL"])
        refresh(replace(source, access_key=key_id, secret_key=secret), lake, ["AAPL"])
    assert key_id not in str(raised.value) and SECRET not in str(raised.value)
    assert held_days(lake) == DAYS


def test_an_unknown_key_is_refused_without_a_retry(server, source, lake):
    with server.signatures_checked(), pytest.raises(Refused, match="403 InvalidAccessKeyId"):
        refresh(source, lake, ["AAPL"])
    assert len(server.log) == 1 and server.gets() == []


@pytest.mark.parametrize("name", ["POLYGON_S3_ACCESS_KEY", "POLYGON_S3_SECRET_KEY"])
@pytest.mark.parametrize("value", [None, "", "  "])
def test_missing_credentials_name_the_variable(monkeypatch, name, value):
    for other in ("POLYGON_S3_ACCESS_KEY", "POLYGON_S3_SECRET_KEY"):
        monkeypatch.setenv(other, "something")
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(MissingCredentials) as raised:
        Polygon.from_environment()
    assert str(raised.value) == f"{name} is not set, see .env.example"


def test_a_key_with_characters_no_key_has_is_not_shown(monkeypatch):
    monkeypatch.setenv("POLYGON_S3_ACCESS_KEY", KEY_ID)
    monkeypatch.setenv("POLYGON_S3_SECRET_KEY", "broken\nsecret")
    with pytest.raises(MissingCredentials) as raised:
        Polygon.from_environment()
    assert "broken" not in str(raised.value)


def test_the_endpoint_is_a_setting_and_must_be_an_address(monkeypatch):
    monkeypatch.setenv("POLYGON_S3_ACCESS_KEY", KEY_ID)
    monkeypatch.setenv("POLYGON_S3_SECRET_KEY", SECRET)
    monkeypatch.delenv("POLYGON_S3_ENDPOINT", raising=False)
    assert Polygon.from_environment().endpoint == "https://files.massive.com"
    monkeypatch.setenv("POLYGON_S3_ENDPOINT", "https://files.polygon.io/")
    assert Polygon.from_environment().endpoint == "https://files.polygon.io"
    for wrong in ("files.massive.com", "ftp://files.massive.com", "https://me:password@files.massive.com"):
        monkeypatch.setenv("POLYGON_S3_ENDPOINT", wrong)
        with pytest.raises(DataError, match="POLYGON_S3_ENDPOINT must look like") as raised:
            Polygon.from_environment()
        assert "password" not in str(raised.value)


def test_no_message_representation_or_file_holds_a_secret(server, source, lake):
    put_days(server, ["AAPL"])
    server.put(key_of(DAYS[1]), b"junk")
    server.faults.append(Fault("status", str(DAYS[2]), status=403))
    texts = [*refresh(source, lake, ["AAPL", "NOPE"]).warnings, repr(source), str(source)]
    for status in (400, 401, 403, 404, 429, 500):
        server.faults[:] = [Fault("status", "list-type", status=status)]
        with pytest.raises(DataError) as raised:
            refresh(with_policy(source, attempts=1), lake, ["AAPL"])
        texts.append(str(raised.value))
    for text in texts:
        assert SECRET not in text and KEY_ID not in text and "\n" not in text
    for path in lake.root.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_another_accounts_settings_do_not_leak_in(server, source, lake, monkeypatch, tmp_path):
    put_days(server, ["AAPL"])
    config = tmp_path / "config"
    config.write_text("[default]\nregion = mars-1\nendpoint_url = http://127.0.0.1:9\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "does_not_exist")
    monkeypatch.setenv("AWS_REGION", "mars-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    refresh(source, lake, ["AAPL"])
    assert held_days(lake) == DAYS
