"""The clock tool: dates, time zones, sums of dates."""

import calendar
import random
from datetime import date, datetime, timedelta, timezone

import pytest

from inference.clock import clock

NOW = datetime(2026, 5, 1, 23, 30, tzinfo=timezone(timedelta(hours=8)))


def ask(**arguments):
    return clock(clock_now=lambda: NOW, **arguments)


def test_now_in_other_zones():
    """Guards: the wrong day on the other side of midnight."""
    assert ask(timezone="Asia/Shanghai")["time"] == "2026-05-01T23:30:00+08:00"
    assert ask(timezone="UTC")["time"] == "2026-05-01T15:30:00+00:00"
    tokyo = ask(timezone="Asia/Tokyo")
    assert tokyo["time"] == "2026-05-02T00:30:00+09:00" and tokyo["weekday"] == "Saturday" and tokyo["星期"] == "星期六"
    assert ask(operation="convert", time="2026-05-01T12:00", timezone="Asia/Shanghai", to_timezone="America/New_York")["time"].startswith(
        "2026-05-01T00:00:00-04:00"
    )


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ({"time": "2026-01-31", "months": 1}, "2026-02-28"),
        ({"time": "2028-01-31", "months": 1}, "2028-02-29"),
        ({"time": "2024-02-29", "years": 1}, "2025-02-28"),
        ({"time": "2026-03-31", "months": -13}, "2025-02-28"),
        ({"time": "2026年5月1日", "weeks": 2, "days": -1}, "2026-05-14"),
        ({"time": "tomorrow", "days": 1, "timezone": "Asia/Shanghai"}, "2026-05-03"),
    ],
)
def test_adding_to_dates(arguments, wanted):
    """Guards: 31 February."""
    assert ask(operation="add", **arguments)["date"] == wanted


def test_months_against_a_calendar():
    """Guards: an error at some end of a year. Random months, counted one by one."""
    rng = random.Random()
    for _ in range(300):
        start = date(rng.randrange(1990, 2100), rng.randrange(1, 13), rng.randrange(1, 29))
        months = rng.randrange(-40, 41)
        year, month = start.year, start.month
        for _ in range(abs(months)):
            month += 1 if months > 0 else -1
            year, month = (year + 1, 1) if month == 13 else (year - 1, 12) if month == 0 else (year, month)
        wanted = date(year, month, min(start.day, calendar.monthrange(year, month)[1]))
        if months:
            assert ask(operation="add", time=start.isoformat(), months=months)["date"] == wanted.isoformat()


def test_summer_time():
    """Guards: an hour too many or too few where clocks change: a day keeps the time of day, 24 hours are 24 hours."""
    start = {"operation": "add", "time": "2026-03-28T12:00", "timezone": "Europe/Berlin"}
    assert ask(**start, days=1)["time"] == "2026-03-29T12:00:00+02:00"
    assert ask(**start, hours=24)["time"] == "2026-03-29T13:00:00+02:00"


def test_differences():
    """Guards: days counted by the hours between, and a sign that is lost."""
    assert ask(operation="difference", time="2026-05-01", until="2026-12-25")["days"] == 238
    assert ask(operation="difference", time="2026-12-25", until="2026-05-01")["days"] == -238
    found = ask(operation="difference", time="2026-05-01T10:00:00Z", until="2026-05-03T11:30:05+01:00")
    assert (found["days"], found["hours"], found["minutes"], found["seconds"], found["later"]) == (2, 0, 30, 5, True)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"operation": "add"}, "needs an amount"),
        ({"operation": "add", "time": "2026-02-30", "days": 1}, "2026-02-30"),
        ({"operation": "add", "time": "9999-12-31", "days": 1}, "years 1 to 9999"),
        ({"operation": "add", "time": "2026-01-01", "years": -90000}, "years 1 to 9999"),
        ({"timezone": "Mars/Base"}, "no time zone 'Mars/Base'"),
        ({"timezone": "../../etc/passwd"}, "no time zone"),
        ({"operation": "convert", "time": "2026-01-01T10:00"}, "to_timezone"),
        ({"operation": "convert", "time": "2026-01-01", "to_timezone": "UTC"}, "time of day"),
        ({"operation": "what"}, "no operation 'what'"),
    ],
)
def test_bad_questions(arguments, words):
    """Guards: a trace where the model needs a sentence."""
    with pytest.raises(ValueError, match=words):
        ask(**arguments)
