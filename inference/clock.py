"""Dates and times for a model that cannot know them: the time now, in any time zone, sums of dates, and the days between two.

Days, weeks, months and years are counted on the calendar (31 January and a month is the last day of February), hours and minutes
on the clock, in a named zone across its changes to summer time. Zones are names of the tz database (Asia/Shanghai); where the
system has none (Windows), the package tzdata brings them.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

OPERATIONS = ("now", "add", "difference", "convert")
UNITS = ("years", "months", "weeks", "days", "hours", "minutes")
WEEKDAYS = (
    ("Monday", "星期一"), ("Tuesday", "星期二"), ("Wednesday", "星期三"), ("Thursday", "星期四"), ("Friday", "星期五"),
    ("Saturday", "星期六"), ("Sunday", "星期日"),
)  # fmt: skip
CLOCK_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "operation": {"type": "string", "enum": list(OPERATIONS), "description": "default: now"},
        "time": {"type": "string", "description": "ISO date or time, such as 2026-05-01 or 2026-05-01T09:30; default: now"},
        "until": {"type": "string", "description": "difference: the second date or time; default: now"},
        **{unit: {"type": "integer", "minimum": -100000, "maximum": 100000, "description": "add: how many"} for unit in UNITS},
        "timezone": {"type": "string", "description": "such as Asia/Shanghai; default: that of this computer"},
        "to_timezone": {"type": "string", "description": "convert: the time zone wanted"},
    },
    "additionalProperties": False,
}


def clock(
    operation: str = "now",
    time: str = "",
    until: str = "",
    timezone: str = "",  # noqa: A002 - the name that the model uses
    to_timezone: str = "",
    clock_now: Callable[[], datetime] | None = None,
    **amounts: int,
) -> dict[str, Any]:
    """What the tool `clock` answers (the parameters: CLOCK_PARAMETERS). Raises ValueError naming what cannot be read.

    clock_now: the time now, with its zone; for tests.
    """
    now = (clock_now or (lambda: datetime.now().astimezone()))()
    zone = _zone(timezone) if timezone else None
    start = _read(time, zone, now)
    if operation == "now":
        return _answer(now.astimezone(zone))
    if operation == "add":
        if not any(amounts.values()):
            raise ValueError(f"add needs an amount: one of {', '.join(UNITS)}")
        return _answer(_added(start, amounts))
    if operation == "convert":
        if not to_timezone:
            raise ValueError("convert needs to_timezone, such as Europe/Berlin")
        if not isinstance(start, datetime):
            raise ValueError(f"convert needs a time of day, such as {start}T12:00")
        return _answer(start.astimezone(_zone(to_timezone)))
    if operation == "difference":
        return _difference(start, _read(until, zone, now))
    raise ValueError(f"there is no operation {operation!r}; known: {', '.join(OPERATIONS)}")


def _added(start: date, amounts: dict[str, int]) -> date:
    """start (a date, or a time with its zone) later by the amounts; a date stays a date unless hours or minutes are added."""
    hours = timedelta(hours=amounts.get("hours", 0), minutes=amounts.get("minutes", 0))
    if hours and not isinstance(start, datetime):
        start = datetime(start.year, start.month, start.day).astimezone()
    try:
        months = start.month - 1 + amounts.get("months", 0) + 12 * amounts.get("years", 0)
        year, month = start.year + months // 12, months % 12 + 1
        day = min(start.day, calendar.monthrange(year, month)[1])
        moved = start.replace(year=year, month=month, day=day) + timedelta(days=amounts.get("days", 0) + 7 * amounts.get("weeks", 0))
        if isinstance(moved, datetime) and hours:
            moved = (moved.astimezone(_UTC) + hours).astimezone(moved.tzinfo)
    except (OverflowError, ValueError, IndexError) as error:
        raise ValueError("the result lies outside the years 1 to 9999") from error
    return moved


def _difference(start: date, end: date) -> dict[str, Any]:
    if isinstance(start, datetime) and isinstance(end, datetime):
        seconds = round((end - start).total_seconds())
        days, rest = divmod(abs(seconds), 86400)
        hours, rest = divmod(rest, 3600)
        parts = {"days": days, "hours": hours, "minutes": rest // 60, "seconds": rest % 60}
        return {"from": start.isoformat(), "to": end.isoformat(), "later": seconds >= 0, **parts, "total_seconds": seconds}
    first, last = (value.date() if isinstance(value, datetime) else value for value in (start, end))
    days = (last - first).days
    return {"from": first.isoformat(), "to": last.isoformat(), "days": days, "weeks": round(days / 7, 2)}


_UTC = timezone.utc
_DATE = re.compile(r"(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})日?")


def _read(text: str, zone: tzinfo | None, now: datetime) -> date:
    """A date, or a time with its zone. "" is now; today, tomorrow and yesterday are dates."""
    text = text.strip()
    days = {"today": 0, "今天": 0, "tomorrow": 1, "明天": 1, "yesterday": -1, "昨天": -1}
    if text.lower() in ("", "now", "现在"):
        return now.astimezone(zone)
    if text.lower() in days:
        return now.astimezone(zone).date() + timedelta(days=days[text.lower()])
    try:
        if found := _DATE.fullmatch(text):
            return date(*map(int, found.groups()))
        read = datetime.fromisoformat(text.replace("Z", "+00:00") if text.endswith("Z") else text)
    except ValueError as error:
        raise ValueError(f"cannot read {text!r:.60} as a date or time; write 2026-05-01 or 2026-05-01T09:30 ({error})") from error
    if read.tzinfo is not None:
        return read.astimezone(zone) if zone else read
    return read.replace(tzinfo=zone) if zone else read.astimezone()


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"there is no time zone {name!r:.60}; use names such as Asia/Shanghai or UTC (on Windows they need `pip install tzdata`)"
        ) from error


def _answer(moment: date) -> dict[str, Any]:
    english, chinese = WEEKDAYS[moment.weekday()]
    if isinstance(moment, datetime):
        return {"time": moment.isoformat(timespec="seconds"), "timezone": str(moment.tzinfo), "weekday": english, "星期": chinese}
    return {"date": moment.isoformat(), "weekday": english, "星期": chinese}
