#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = []
# ///
"""Prometheus alert rules as a Kubernetes readiness probe.

An LLM server answers 200 on its own health route while its queue is an hour long or
its engine is stuck.  Its metrics tell the truth.  This program runs beside it, reads
those metrics on each ``GET /health`` and answers ``200 Healthy`` or ``503 Unhealthy``:

    environ -> Config -> scrape -> samples -> rules (PromQL) -> Verdict -> /health
                                                                      \\-> /metrics, /

A rule is a PromQL alert expression and means what it means to Prometheus: the server
is unhealthy while the expression returns at least one series.  One rule a line, or
separated by ``;``; a line goes on inside brackets, before and after an operator, and
before ``for``; ``#`` comments:

    [Name: ] EXPRESSION [for DURATION] [keep_firing_for DURATION]

    UNHEALTHY_WHEN='
      QueueFull: vllm:num_requests_waiting > 10 for 30s
      CacheFull: vllm:kv_cache_usage_perc > 0.95
    '

Healthy means: a scrape has succeeded once, every rule could be evaluated, and none is
firing.  ``/health`` fails closed, for readiness.  ``/health/Name`` asks for one rule
and fails open, for liveness: a fault of this program must not restart an engine.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

if __name__ == "__main__":
    # Before the imports, which take a while: PID 1 never sees a signal without this.
    # Only a server ends well by a signal: a check that is stopped found nothing out.
    _EXIT = 0 if sys.argv[1:] in ([], ["--demo"]) else 1
    signal.signal(signal.SIGTERM, lambda *_: os._exit(_EXIT))
    signal.signal(signal.SIGINT, lambda *_: os._exit(_EXIT))
    # What is made until main() stays: to look for garbage in it takes 10 ms of CPU.
    gc.disable()

import base64
import collections
import email.utils
import errno
import gzip
import hashlib
import html
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import operator
import queue
import re
import selectors
import socket
import ssl
import string
import threading
import time
import urllib.parse
import urllib.request
import zlib
from array import array
from bisect import bisect_left, bisect_right
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache, partial, reduce
from select import POLLOUT, poll
from select import select as ready_of
from types import MappingProxyType
from typing import (
    AbstractSet,
    Any,
    Callable,
    Container,
    Dict,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Sequence,
    Tuple,
    TypeVar,
    Union,
    cast,
)

__version__ = "1.0.0"
STARTED = time.time()

T = TypeVar("T")

# --- 1. Vocabulary: the nouns, from Expr to Verdict, and how they are printed --------

Labels = Tuple[Tuple[str, str], ...]
"""Label pairs sorted by name, the metric's name among them as ``__name__``."""


class Sample(NamedTuple):
    """One line of an exposition: a series and its value."""

    labels: Labels
    value: float


# How far back the newest sample counts (--query.lookback-delta of Prometheus).
LOOKBACK = 300.0
MAX_POINTS, MAX_STEPS = 2048, 11000
NONE = array("I")
"""Shared by all series that have no gap, or no fall: few have one."""


class Points(NamedTuple):
    """The samples of one series in a window, oldest first; times are monotonic.

    ``falls`` has, for each value less than the one before, the one before: a counter's
    resets.
    """

    times: Sequence[float]
    values: Sequence[float]
    falls: Sequence[float] = ()


class Series:
    """The remembered samples of one series.

    ``checks`` are the times of the checks, a column that all series of a metric share;
    value ``i`` is of check ``first + i``.  ``gaps`` has each ``i`` that had no sample:
    there the value before is repeated.  ``falls`` has each ``i`` below the one before,
    found once and not by each rule at each check.
    """

    __slots__ = ("checks", "falls", "first", "gaps", "values")

    def __init__(self, checks: array[float]) -> None:
        self.checks, self.first = checks, len(checks) - 1
        self.values, self.falls, self.gaps = array("d"), NONE, NONE

    @property
    def time(self) -> float:
        """When its newest sample was found."""
        return self.checks[self.first + len(self.values) - 1]

    def window(self, start: float, end: float) -> Points:
        """Return the samples after a moment, up to another."""
        begin = max(bisect_right(self.checks, start) - self.first, 0)
        stop = bisect_right(self.checks, end) - self.first
        stop = max(min(stop, len(self.values)), begin)
        gaps = self.gaps[bisect_left(self.gaps, begin) : bisect_left(self.gaps, stop)]
        while gaps and gaps[0] == begin:
            del gaps[0]
            begin += 1
        times = self.checks[self.first + begin : self.first + stop]
        values = self.values[begin:stop]
        for gap in reversed(gaps):
            del times[gap - begin], values[gap - begin]
        # From a sample that is not in the window nothing has fallen.
        falls = bisect_right(self.falls, begin), bisect_left(self.falls, stop)
        before = [self.values[fall - 1] for fall in self.falls[slice(*falls)]]
        return Points(times, values, before)

    def newest(
        self, count: int, start: float, end: float
    ) -> tuple[Sequence[float], Sequence[float]] | None:
        """Return times and values of the newest samples of a window, if it has so many.

        Mostly they are the last ones that there are, and need no search.
        """
        last = self.first + len(self.values)
        times: Sequence[float] = self.checks[max(last - count, 0) : last]
        values: Sequence[float] = self.values[-count:]
        if self.gaps or times[-1] > end:
            times, values, _ = self.window(start, end)
        if len(values) < count or times[-count] <= start:
            return None
        return times[-count:], values[-count:]

    def sample_at(self, moment: float) -> tuple[float, float] | None:
        """Return the time and the value that an instant selector sees at a moment.

        A check that did not find the series ends it, as Prometheus' stale marker does.
        """
        if self.checks[self.first + len(self.values) - 1] == moment:
            return moment, self.values[-1]
        check = bisect_right(self.checks, moment) - 1
        index = check - self.first
        if not 0 <= index < len(self.values) or index in self.gaps:
            return None
        time = self.checks[check]
        return (time, self.values[index]) if time > moment - LOOKBACK else None

    def add(self, value: float) -> None:
        """Remember the value that the newest check has found, in place of any other."""
        values, index = self.values, len(self.checks) - 1 - self.first
        if len(values) > index:
            values.pop()
            if self.gaps or self.falls:
                self._trim()
        while len(values) < index:
            self.gaps = self.gaps or array("I")
            self.gaps.append(len(values))
            values.append(values[-1])
        if values and value < values[-1]:
            self.falls = self.falls or array("I")
            self.falls.append(index)
        values.append(value)

    def keep(self, start: int, step: int = 1) -> bool:
        """Forget all checks but each ``step``-th from one on; tell if a sample is left.

        The column of checks is cut in the same way by its owner.
        """
        skipped = max(0, -((start - self.first) // step))
        offset = start + skipped * step - self.first
        places = range(offset, len(self.values), step)
        self.first, self.values = skipped, self.values[offset::step]
        gaps, falls = ([places.index(i) for i in column if i in places]
                       for column in (self.gaps, self.falls))  # fmt: skip
        if step > 1:
            for gap in filter(None, gaps):
                self.values[gap] = self.values[gap - 1]
            pairs = zip(self.values, self.values[1:])
            falls = [i for i, (one, other) in enumerate(pairs, 1) if other < one]
        self.gaps = array("I", gaps) if gaps else NONE
        self.falls = array("I", filter(None, falls)) if falls else NONE
        self._trim()
        return bool(self.values)

    def _trim(self) -> None:
        # At the end stands a sample, and no fall that is gone.
        while self.gaps and self.gaps[-1] == len(self.values) - 1:
            self.gaps.pop()
            self.values.pop()
        while self.falls and self.falls[-1] >= len(self.values):
            self.falls.pop()


SeriesByName = Mapping[str, Mapping[Labels, Series]]
Vector = Dict[Labels, float]


class Lookback(NamedTuple):
    """How far back a metric is looked at, and by its shortest range.

    At each multiple of ``step`` since 1970, if there is one, it is looked at alone.
    """

    seconds: float = 0.0
    shortest: float = 0.0
    step: float = 0.0

    @property
    def least(self) -> float:
        """How many seconds the samples are apart that are kept, at least."""
        wanted = min(self.seconds / MAX_POINTS, self.shortest / 4)
        return max(wanted, self.seconds / MAX_STEPS)

    @property
    def most(self) -> int:
        """How many samples of a series are kept, at most."""
        steps = self.seconds / self.step if self.step else 0
        return math.ceil(self.seconds / self.least + steps) if self.seconds else 1


class Number(NamedTuple):
    """A scalar literal."""

    value: float


class Text(NamedTuple):
    """A string literal: the name of a label, or what becomes of it."""

    value: str


class Matcher(NamedTuple):
    """One condition of a selector: ``label op value`` with op ``= != =~ !~``."""

    label: str
    op: str
    value: str


class Selector(NamedTuple):
    """The series of one metric; over the last ``window`` seconds if that is not 0.

    It looks at a moment ``offset`` seconds ago, or before the Unix time ``at``.
    """

    name: str
    matchers: tuple[Matcher, ...] = ()
    window: float = 0.0
    offset: float = 0.0
    at: float | None = None


class Subquery(NamedTuple):
    """What an expression gave at each multiple of ``step`` in a range."""

    expr: Expr
    window: float
    step: float
    offset: float = 0.0
    at: float | None = None


class Grouping(NamedTuple):
    """``by`` or ``on`` these labels, or ``without`` or ``ignoring`` them.

    ``many`` is group_left or group_right if that side of an operator may have many
    series for one of the other side, from which results get the labels ``included``.
    """

    keep: bool = False
    labels: tuple[str, ...] = ()
    many: str = ""
    included: tuple[str, ...] = ()


class Operation(NamedTuple):
    """An operator, a function or an aggregation, and what it is applied to."""

    name: str
    operands: tuple[Expr, ...]
    grouping: Grouping = Grouping()
    returns_bool: bool = False


Expr = Union[Number, Text, Selector, Subquery, Operation]


class Rule(NamedTuple):
    """An alert rule: fires for each series that ``expr`` gives for ``hold`` seconds."""

    name: str
    expr: Expr
    hold: float = 0.0
    keep_firing_for: float = 0.0
    builtin: bool = False


class Alert(NamedTuple):
    """One series of a rule's result: pending since when, and firing from when on."""

    labels: Labels
    value: float
    since: float
    fired: float | None = None
    absent_since: float | None = None

    @property
    def state(self) -> str:
        """``pending`` or ``firing``."""
        return "pending" if self.fired is None else "firing"

    @property
    def began(self) -> float:
        """When the alert came into its state."""
        return self.since if self.fired is None else self.fired


class Part(NamedTuple):
    """What of a rule concerns the metrics of these ``names``, and what evaluates it.

    ``visible`` is what people are shown, None if nothing does; it has ``selectors``.
    """

    names: frozenset[str]
    measure: Callable[..., Any]
    selectors: tuple[Selector, ...]
    visible: Expr | None


class _RuleStatus(NamedTuple):
    rule: Rule
    alerts: tuple[Alert, ...] = ()
    error: str = ""
    matched: int = 0
    value: float | None = None
    limit: float | None = None
    last_words: str = ""
    part: Part | None = None


class RuleStatus(_RuleStatus):
    """What a check found for one rule; ``error`` if it could not be evaluated.

    ``value`` is the worst of the series where the rule is ``EXPR OP NUMBER``, and
    ``limit`` the number; ``matched`` counts the series that its selectors found, of a
    built-in rule the metrics.  ``last_words`` is what they did before it began to fire,
    ``part`` what of the rule has been evaluated, None before the first time.
    """

    @cached_property
    def counts(self) -> collections.Counter[str]:
        """How many alerts are pending and firing; there may be 20,000 to count."""
        return collections.Counter(alert.state for alert in self.alerts)

    @cached_property
    def state(self) -> str:
        """``error``, ``firing``, ``pending`` or ``inactive``: the worst there is.

        >>> RuleStatus(Rule("Down", Number(1))).state
        'inactive'
        """
        if self.error:
            return "error"
        if not self.alerts:
            return "inactive"
        fires = any(alert.fired is not None for alert in self.alerts)
        return "firing" if fires else "pending"

    def reads_only(self, names: Container[str]) -> bool:
        """Whether it has read metrics, and none but these."""
        selectors = self.part.selectors if self.part else ()
        return bool(selectors) and all(s.name in names for s in selectors)

    @property
    def fires(self) -> bool:
        """Whether the rule makes ``/health/Name`` Unhealthy, too."""
        return self.state == "firing"

    @property
    def fails(self) -> bool:
        """Whether the rule makes ``/health`` Unhealthy."""
        return self.state in ("error", "firing")


class TargetStatus(NamedTuple):
    """How the last scrape of one target went; ``reason`` is empty if it succeeded."""

    instance: str
    reason: str = ""
    message: str = ""
    seconds: float = 0.0
    size: int = 0
    series: int = 0
    since: float = 0.0
    samples: int = 0
    remark: str = ""
    watched: bool = True

    @property
    def up(self) -> bool:
        """Whether it succeeded."""
        return not self.reason


# Why a scrape can have failed, as the label reason of scrape_error has it.
SCRAPE_REASONS = (
    "refused", "timeout", "dns", "tls", "reset", "network", "http_status", "redirect",
    "bad_http", "truncated", "not_metrics", "bad_line", "too_large", "credentials",
    "bug",
)  # fmt: skip
# What a scrape adds, and the labels that it can have beside those of its target.
SYNTHETIC: Mapping[str, tuple[Labels, ...]] = {
    "up": ((),),
    "scrape_error": tuple((("reason", reason),) for reason in SCRAPE_REASONS),
    "scrape_duration_seconds": ((),),
    "scrape_body_size_bytes": ((),),
    "scrape_samples_scraped": ((),),
}
# What a probe adds, where there is one.
PROBED = (
    "probe_success", "probe_error", "probe_duration_seconds", "probe_http_status_code",
)  # fmt: skip


class ProbeStatus(NamedTuple):
    """What a request of our own found last, of blackbox_exporter's names and meaning.

    ``success`` is None where it shows nothing about the server, and ``stands`` tells
    whether rules may go by it now; ``code`` is 0 without an answer; ``sent`` is when
    it was, in monotonic seconds, and ``about`` what stood still then.
    """

    probe: str
    instance: str
    success: bool | None = None
    code: int = 0
    reason: str = ""
    message: str = ""
    seconds: float = 0.0
    sent: float = -math.inf
    stands: bool = True
    about: frozenset[tuple[Labels, float]] = frozenset()

    def samples(self, labels: Labels) -> dict[Labels, float]:
        """Return what rules see of it."""
        found = {
            "probe_http_status_code": float(self.code),
            "probe_duration_seconds": self.seconds,
        }
        if self.success is not None and self.stands:
            found["probe_success"] = float(self.success)
        own = ("instance", self.instance), ("probe", self.probe), *labels
        return label_all(found, own, "probe_error", self.reason)


class Verdict(NamedTuple):
    """The outcome of one check, and all that is known about why.

    ``fault`` says why there is no verdict of the rules, if there is none.  ``time`` is
    monotonic and ``wall`` the Unix time of the same moment: a jump of the system clock
    moves what is shown and nothing that is decided.  ``left`` is what DRAIN_WHILE still
    gives, None where nobody asked for it.
    """

    sequence: int
    fault: str
    time: float
    wall: float
    rules: tuple[RuleStatus, ...] = ()
    targets: tuple[TargetStatus, ...] = ()
    probes: tuple[ProbeStatus, ...] = ()
    left: str | None = None

    def failing_rules(self, excluded: Container[str] = ()) -> tuple[str, ...]:
        """Return the names of the rules that make it Unhealthy."""
        names = (status.rule.name for status in self.rules if status.fails)
        return tuple(name for name in names if name not in excluded)

    @property
    def reason(self) -> str:
        """Why it is Unhealthy, empty if it is Healthy."""
        return self.fault or name_some(self.failing_rules())

    @property
    def healthy(self) -> bool:
        """Whether ``/health`` is 200."""
        return not self.fault and not any(status.fails for status in self.rules)

    def state_of(self, status: RuleStatus) -> str:
        """Return the state of a rule, ``unknown`` if only a scrape that fails tells it.

        Ranges may still hold what was scraped before: of now that says nothing.
        """
        if status.state != "inactive" or not self.failed_scrapes:
            return status.state
        seen = status.matched and self.failed_scrapes < len(self.targets)
        known = seen or status.reads_only((*SYNTHETIC, *PROBED))
        return "inactive" if known else "unknown"

    @property
    def failed_scrapes(self) -> int:
        """How many of the targets could not be scraped."""
        return len([target for target in self.targets if target.reason])

    def wall_of(self, moment: float) -> float:
        """Return the Unix time of a monotonic moment."""
        return self.wall - self.time + moment


# With re.ASCII and re.IGNORECASE.
FLOAT = r"(?:[+-]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?|inf(?:inity)?)|nan)"
_FLOAT = re.compile(FLOAT + r"\Z", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(
    "".join(rf"(?:(\d{{1,12}}){unit})?" for unit in "y w d h m s ms".split()) + r"\Z",
    re.ASCII,
)
_UNIT_SECONDS = (31536000, 604800, 86400, 3600, 60, 1, 0.001)
# Go counts nanoseconds in 64 bits.
MAX_DURATION = 2**63 / 1e9
MAX_TEXT, MAX_NAMED = 1000, 20


def parse_float(text: str) -> float:
    """Return the number that Prometheus reads in ``text``; ValueError if it is none.

    Stricter than ``float``: no underscores, no foreign digits, no signed NaN, nothing
    that overflows (Go's strconv.ParseFloat without the hexadecimal form).

    >>> parse_float("1.5e3"), parse_float("+Inf")
    (1500.0, inf)
    """
    value = float(text) if _FLOAT.match(text) else None
    if value is None or (math.isinf(value) and "n" not in text.lower()):
        raise ValueError(f"{text!r} is not a number")
    return value


def label_all(
    values: Mapping[str, float], labels: Labels, error: str, reason: str
) -> dict[Labels, float]:
    """Return the samples of some metrics, and of an error if it has a reason."""
    named = {_named(name, labels): value for name, value in values.items()}
    if reason:
        named[_named(error, (("reason", reason), *labels))] = 1.0
    return named


@lru_cache(maxsize=1024)
def _named(name: str, labels: Labels) -> Labels:
    return tuple(sorted((("__name__", name), *labels)))


def float_or_nan(text: str) -> float:
    """Return the number in ``text``, NaN if it is none."""
    try:
        return parse_float(text)
    except ValueError:
        return math.nan


def format_float(value: float) -> str:
    """Return ``value`` without an exponent; it parses to the same number.

    >>> format_float(10.0), format_float(1.5e-07), format_float(math.inf)
    ('10', '0.00000015', '+Inf')
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    mantissa, _, exponent = repr(value).partition("e")
    digits = len(mantissa.partition(".")[2].rstrip("0"))
    return f"{value:.{max(0, digits - int(exponent or 0))}f}"


@lru_cache(maxsize=64)
def parse_duration(text: str) -> float:
    """Return seconds: a bare number of them, or Prometheus' ``1m30s`` or ``500ms``.

    >>> parse_duration("1m30s"), parse_duration("0.8")
    (90.0, 0.8)
    """
    match = _DURATION.match(text)
    if match and text:
        units = zip(_UNIT_SECONDS, match.groups("0"))
        seconds = float(sum(size * int(count) for size, count in units))
    else:
        seconds = parse_float(text)
    if not 0 <= seconds < MAX_DURATION:
        raise ValueError(f"{text!r} is not a duration")
    return seconds


def format_duration(seconds: float) -> str:
    """Return seconds in Prometheus' form, to the millisecond.

    >>> format_duration(90), format_duration(0.25), format_duration(0)
    ('1m30s', '250ms', '0s')
    """
    rest, text = round(seconds * 1000), ""
    for unit, size in (("d", 86400000), ("h", 3600000), ("m", 60000), ("s", 1000)):
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return text + (f"{rest}ms" if rest else "") or "0s"


def format_time(seconds: float) -> str:
    """Return a Unix time as in RFC 3339, to the millisecond.

    >>> format_time(0.25)
    '1970-01-01T00:00:00.250Z'
    """
    whole, part = divmod(round(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{part:03d}Z"


def quote(text: str) -> str:
    r"""Return ``text`` as a PromQL string, control characters escaped.

    >>> print(quote('a"b'))
    "a\"b"
    """
    body = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escape_controls(body)}"'


def escape_controls(text: str) -> str:
    """Return ``text`` with all that could move a cursor or end a line made visible."""
    if text.isprintable():
        return text
    controls = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(controls, lambda match: f"\\u{ord(match[0]):04x}", text)


def format_series(labels: Labels) -> str:
    """Return a series as Prometheus writes it.

    >>> format_series((("__name__", "up"), ("job", "vllm")))
    'up{job="vllm"}'
    """
    pairs = [(name, "=", value) for name, value in labels if name != "__name__"]
    return format_selector(dict(labels).get("__name__", ""), pairs) or "{}"


def shorten(text: str, most: int = MAX_TEXT) -> str:
    """Return at most 1,000 characters of a text for people, or as many as are given."""
    return text if len(text) <= most else text[: most - 3] + "..."


def name_some(names: Sequence[str], most: int = MAX_NAMED) -> str:
    """Return at most 20 names in a row, or ``most``, and how many more there are.

    >>> name_some(["Down", "Full"])
    'Down, Full'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def most_like(text: str, others: Iterable[str], most: int, least: float) -> list[str]:
    """Return at most so many texts, the likest first; the same is 1.0 like it."""
    import difflib  # noqa: PLC0415

    return difflib.get_close_matches(text, others, most, least)


def format_selector(name: str, matchers: Iterable[tuple[str, str, str]]) -> str:
    """Return a selector; a name that is not plain stands among the matchers."""
    pairs = [f"{format_name(k)}{op}{quote(v)}" for k, op, v in matchers]
    if name and name != format_name(name, ":"):
        name, pairs = "", [quote(name), *pairs]
    return f"{name}{{{', '.join(pairs)}}}" if pairs else name


def format_name(name: str, colon: str = "") -> str:
    """Return a label's name, with ``colon`` a metric's, in quotes if it needs them."""
    plain = re.match(rf"[a-zA-Z_{colon}][\w{colon}]*\Z", name, re.ASCII)
    return name if plain else quote(name)


# --- 2. Regex: pattern x text -> whether all of it matches ---------------------------
# Python's re can take time exponential in the length of a label value, which comes from
# outside.  Here a pattern becomes instructions that all states walk at once (Thompson's
# construction), so a match takes at most the two lengths multiplied.


class Instruction(NamedTuple):
    """Jumps, the likeliest first, or takes a character.

    ``mark`` is that of the group which begins here, and negative where it ends.
    """

    jumps: tuple[int, ...] = ()
    test: Callable[[str], object] | None = None
    anchor: str = ""
    mark: int = 0


class OpenGroup(NamedTuple):
    """A group whose end is not read yet; ``mark`` is 0 if it captures nothing."""

    flags: int
    mark: int
    branches: list[list[Instruction]]


Program = Sequence[Instruction]
Threads = Dict[int, Dict[int, int]]
"""What could match, best first: the next instruction, and the marks before it."""
MAX_PATTERN, MAX_INSTRUCTIONS, MAX_REPEAT = 4000, 1000, 1000
_FLAGS = {"i": re.IGNORECASE, "s": re.DOTALL}
_REFERENCE = r"(?a)\$(\$|\w+|\{\w+\})"
_COUNT = "(?:0|[1-9][0-9]*)(?:,(?:0|[1-9][0-9]*)?)?"
# Of escapes, those that RE2 and Python read alike.  Most starts need no regex, so this
# is compiled when it is used.
_PIECE = rf"""(?xs)(?P<bar>\|)
    |(?P<open>\()(?:(?!\?)|\?(?:P?<(?P<name>[A-Za-z_][A-Za-z0-9_]*)>
        |(?P<on>[A-Za-z]*)(?:-(?P<off>[A-Za-z]+))?(?P<flags>[:)])))
    |(?:(?P<close>\))|(?P<atom>\\[dDwWsSnrtfv\W_]|(?!\{{{_COUNT}\}})[^\\[(*+?]
        |\[\^?\]?(?:\\[dDwWnrtfv\W_]|\\s(?!-[^]])|(?!--|&&|~~|\|\|)[^][\\])*\]))
     (?:(?:(?P<sign>[*+?])|\{{(?P<count>{_COUNT})\}})(?P<lazy>\??))?
    |(?P<wrong>.)"""
_SIGNS = {"*": "0,", "+": "1,", "?": "0,1"}


@lru_cache(maxsize=256)
def compile_regex(pattern: str) -> Program:
    r"""Return the program of an RE2 pattern; ValueError says what it may not contain.

    Left out are the flags ``m`` and ``U``, ``\b``, ``\p`` and POSIX classes.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError("this regular expression is too large")
    groups = [OpenGroup(re.DOTALL, 0, [[]])]
    for piece in re.finditer(_PIECE, pattern):
        _add_piece(piece, groups)
        sizes = (len(branch) + 1 for group in groups for branch in group.branches)
        if sum(sizes) > MAX_INSTRUCTIONS:
            raise ValueError("this regular expression is too large")
    if len(groups) > 1:
        raise ValueError("missing ) in this regular expression")
    return (*_program(groups[0]), Instruction(anchor="end"))


def regex_expand(pattern: str, text: str, template: str) -> str | None:
    """Return a template with what groups match in it, as Go's Regexp.Expand does; None
    if not all of the text matches.

    >>> regex_expand("(?P<host>.*):(.*)", "a:b:80", "$host-${2}x$$")
    'a:b-80x$'
    """
    program = compile_regex(pattern)
    threads = _follow(program, {0: {}}, "^" if text else "^$")
    for place, character in enumerate(text, 1):
        anchors = "$" if place == len(text) else ""
        threads = _step(program, threads, character, anchors, place)
    marks = threads.get(len(program) - 1)
    if marks is None:
        return None
    groups = {"$": "$", "0": text}
    opened = (p for p in re.finditer(_PIECE, pattern) if p["open"] and not p["flags"])
    for number, piece in enumerate(opened, 1):
        found = text[marks.get(piece.end(), 0) : marks.get(-piece.end(), 0)]
        groups[str(number)] = groups[piece["name"] or str(number)] = found
    return re.sub(_REFERENCE, lambda m: groups.get(m[1].strip("{}"), ""), template)


def regex_matches(pattern: str, text: str) -> bool:
    """Tell whether the whole text matches, in time linear in its length.

    >>> regex_matches("5..|4.*", "503"), regex_matches("5..", "5031")
    (True, False)
    """
    program = compile_regex(pattern)
    states = frozenset(_follow(program, {0: {}}, "^" if text else "^$"))
    for character in text:
        states = _known_step(pattern, states, character)
        if not states:
            return False
    ends = _follow(program, {state: {} for state in states}, "$" if text else "^$")
    return len(program) - 1 in ends


@lru_cache(maxsize=1024)
def _known_step(pattern: str, states: frozenset[int], character: str) -> frozenset[int]:
    threads: Threads = {state: {} for state in states}
    return frozenset(_step(compile_regex(pattern), threads, character))


def _step(
    program: Program, threads: Threads, taken: str, anchors: str = "", place: int = 0
) -> Threads:
    starts = {
        state + 1: marks
        for state, marks in threads.items()
        if (test := program[state].test) and test(taken)
    }
    return _follow(program, starts, anchors, place)


def _follow(program: Program, starts: Threads, anchors: str, place: int = 0) -> Threads:
    threads: Threads = {}
    todo = [*reversed(starts.items())]
    while todo:
        state, marks = todo.pop()
        if state not in threads:
            threads[state], step = marks, program[state]
            marks = {**marks, step.mark: place} if step.mark else marks
            if step.anchor in anchors:
                todo += [(state + jump, marks) for jump in reversed(step.jumps)]
    return threads


def _add_piece(piece: re.Match[str], groups: list[OpenGroup]) -> None:
    """Begin or end a group, or add to what the innermost one holds."""
    group = groups[-1]
    if piece["bar"]:
        group.branches.append([])
    elif piece["flags"] == ")":
        groups[-1] = group._replace(flags=_flags(piece, group.flags))
    elif piece["open"]:
        mark = 0 if piece["flags"] else piece.end()
        groups.append(OpenGroup(_flags(piece, group.flags), mark, [[]]))
    elif piece["atom"]:
        group.branches[-1] += _repeated([_atom(piece["atom"], group.flags)], piece)
    elif piece["close"] and len(groups) > 1:
        groups[-2].branches[-1] += _repeated(_program(groups.pop()), piece)
    else:
        wrong = piece.string[piece.start() :][:4]
        raise ValueError(f"{wrong!r} is not supported here")


def _program(group: OpenGroup) -> list[Instruction]:
    *others, program = group.branches
    for branch in reversed(others):
        either = Instruction((1, len(branch) + 2))
        program = [either, *branch, Instruction((len(program) + 1,)), *program]
    if group.mark:
        begin, end = (Instruction((1,), mark=m) for m in (group.mark, -group.mark))
        program = [begin, *program, end]
    return program


def _flags(piece: re.Match[str], flags: int) -> int:
    given, taken = piece["on"] or "", piece["off"] or ""
    for flag in given + taken:
        if flag not in _FLAGS:
            raise ValueError(f"the flag {flag} is not supported here")
        flags = flags | _FLAGS[flag] if flag in given else flags & ~_FLAGS[flag]
    return flags


def _repeated(atom: list[Instruction], piece: re.Match[str]) -> list[Instruction]:
    count = piece["count"] or _SIGNS.get(piece["sign"], "1")
    low, comma, high = count.partition(",")
    least, most = int(low), int(high or low)
    if most > MAX_REPEAT or most * len(atom) > MAX_INSTRUCTIONS or most < least:
        raise ValueError("bad repeat count in this regular expression")
    # A question mark behind it makes it prefer to leave.
    order = -1 if piece["lazy"] else 1
    program = atom * least
    program += [Instruction((1, len(atom) + 1)[::order]), *atom] * (most - least)
    if comma and not high:
        enter = Instruction((1, len(atom) + 2)[::order])
        program += [enter, *atom, Instruction((-len(atom) - 1,))]
    return program


def _atom(text: str, flags: int) -> Instruction:
    if text in ("^", "$"):
        return Instruction((1,), anchor=text)
    if text.isalnum() and flags == re.DOTALL:
        return Instruction(test=text.__eq__)
    # Python's blanks have a vertical tab that RE2's have not.
    blanks = r"\t\n\f\r " if text[0] == "[" else r"[\t\n\f\r ]"
    meanings = {r"\s": blanks, r"\S": r"[^\t\n\f\r ]"}
    text = re.sub(r"(?s)\\.", lambda pair: meanings.get(pair[0], pair[0]), text)
    # Without ASCII, which the classes need, letters of any script have two cases.
    flags |= 0 if flags & re.IGNORECASE and "\\" not in text else re.ASCII
    try:
        return Instruction(test=re.compile(text, flags).match)
    except re.error as error:
        raise ValueError(f"bad {text!r} in this regular expression: {error}") from None


# --- 3. Evaluate: operators and functions, Expr x History -> Vector ------------------
# What an operator or a function gives is what engine.go, functions.go and quantile.go
# of Prometheus 3 (promql/) give.  FUNCTIONS, at the end of the section, is the one
# table of all functions: the parser takes the types of their operands from it.

SCALAR, STRING = "scalar", "string"
VECTOR, RANGE = "instant vector", "range vector"
SET_OPERATORS = ("and", "or", "unless")
COMPARISONS = ("==", "!=", "<=", "<", ">=", ">")
METADATA = ("__name__", "__type__", "__unit__")
MAX_POINTS_OF_SUBQUERY, MAX_REPLACED = 1_000_000, 200_000


class EvaluationError(ValueError):
    """An expression has no answer on the series that are there."""


class Evaluation(NamedTuple):
    """The moment an expression is about, in monotonic and in Unix seconds.

    ``selected`` keeps which series selectors match, and ``computed`` what expressions
    gave at this one moment, for all rules.  ``names`` are the metrics that are there,
    ``thinned`` those with samples forgotten for their size: how far apart the others
    are, in seconds.
    """

    now: float
    wall: float
    history: SeriesByName
    selected: dict[object, Any]
    computed: dict[object, Any]
    names: frozenset[str] = frozenset()
    thinned: Mapping[str, float] = MappingProxyType({})


class Range(NamedTuple):
    """A range vector: of each series the samples after ``start``, up to ``end``."""

    series: Mapping[Labels, Series]
    start: float
    end: float

    def windows(self) -> Iterator[tuple[Labels, Points]]:
        """Yield the series that have samples in the range, and these."""
        for labels, series in self.series.items():
            points = series.window(self.start, self.end)
            if points.times:
                yield labels, points


Value = Union[float, str, Vector, Range]
Numbers = Sequence[float]
Real = Callable[..., float]
Compute = Callable[[Evaluation], Any]
Apply = Callable[..., Any]
"""From an Operation, an Evaluation and the values of operands to a Value."""


def evaluate(expr: Expr, evaluation: Evaluation) -> Any:
    """Return what an expression gives: a number, a text, a Vector or a Range.

    Raises EvaluationError where Prometheus does.
    """
    return compiled(expr, False)(evaluation)


@lru_cache(maxsize=4096)
def compiled(expr: Expr, lazy: bool) -> Compute:
    """Return what evaluates an expression.

    Equal ones do so once for each evaluation, unless to keep all that they give would
    take much memory.  A ``lazy`` one looks for no error that cannot change the answer.
    """
    if isinstance(expr, (Number, Text)):
        constant = expr.value
        return lambda _: constant
    if isinstance(expr, Selector):
        compute: Compute = partial(_selected, expr)
        kept = lazy or not expr.matchers
    elif isinstance(expr, Subquery):
        compute, kept = partial(_subquery, expr, compiled(expr.expr, lazy)), True
    else:
        compute = _applied(expr, [compiled(part, lazy) for part in expr.operands], lazy)
        function = FUNCTIONS.get(expr.name)
        kept = lazy or bool(function and RANGE in function.operands)

    def once(evaluation: Evaluation) -> Any:
        known = evaluation.computed
        if once not in known:
            known[once] = compute(evaluation)
        return known[once]

    return once if kept else compute


def _applied(expr: Operation, operands: Sequence[Compute], lazy: bool) -> Compute:
    function = FUNCTIONS.get(expr.name)
    if function:
        apply = function.apply
        return lambda now: apply(expr, now, *[operand(now) for operand in operands])
    left, right = operands
    if lazy and expr.name in ("and", "unless"):
        return lambda now: (found := left(now)) and operate(expr, found, right(now))
    if is_filter(expr) and isinstance(expr.operands[1], Number):
        keep = partial(keep_those, OPERATORS[expr.name], expr.operands[1].value)
        return lambda now: keep(left(now))
    return lambda now: operate(expr, left(now), right(now))


def _selected(selector: Selector, evaluation: Evaluation) -> Vector | Range:
    moment, found = moment_of(selector, evaluation), select(selector, evaluation)
    if selector.window:
        apart = evaluation.thinned.get(selector.name, 0.0)
        if 2 * apart > selector.window:
            kept, wanted = map(format_duration, (apart, selector.window))
            problem = f"samples {kept} apart are too few for {selector.name}[{wanted}]"
            raise EvaluationError(problem)
        # Prometheus counts in milliseconds, and so 4 - 1.001 is 2.999.
        return Range(found, round(moment - selector.window, 9), moment)
    samples = ((labels, series.sample_at(moment)) for labels, series in found.items())
    return {labels: sample[1] for labels, sample in samples if sample}


def moment_of(expr: Selector | Subquery, evaluation: Evaluation) -> float:
    """Return the monotonic moment that ``offset`` and ``@`` make a selector look at."""
    if expr.at is None:
        return evaluation.now - expr.offset
    return expr.at - (evaluation.wall - evaluation.now) - expr.offset


def select(selector: Selector, evaluation: Evaluation) -> Mapping[Labels, Series]:
    """Return the remembered series, fresh or not, that a selector matches."""
    if not selector.matchers:
        return evaluation.history.get(selector.name, {})
    key, known = (selector.name, selector.matchers), evaluation.selected
    if key not in known:
        found = evaluation.history.get(selector.name, {})
        for place, matcher in enumerate(selector.matchers if found else ()):
            fits = _matched(selector.name, matcher, evaluation)
            found = {k: fits[k] for k in found if k in fits} if place else fits
        known[key] = found
    return cast("Mapping[Labels, Series]", known[key])


def _matched(
    name: str, matcher: Matcher, evaluation: Evaluation
) -> dict[Labels, Series]:
    """Return the series of a metric that one matcher lets through.

    What a matcher said of a value is known to the next checks, too.
    """
    label, known = matcher.label, evaluation.selected
    if (name, label) not in known:
        values: dict[str, dict[Labels, Series]] = {}
        for labels, series in evaluation.history.get(name, {}).items():
            values.setdefault(dict(labels).get(label, ""), {})[labels] = series
        known[name, label] = values
    values, fits = known[name, label], _known_values(name, matcher)
    if len(fits) > 2 * len(values):
        fits.clear()
    matched: dict[Labels, Series] = {}
    for value, found in values.items():
        if value not in fits:
            fits[value] = matches(matcher, value)
        if fits[value]:
            matched.update(found)
    return matched


@lru_cache(maxsize=256)
def _known_values(*pattern: object) -> dict[str, Any]:
    """Return what is known of label values; the caller keeps it as small as these."""
    return {}


def matches(matcher: Matcher, value: str) -> bool:
    """Tell whether a matcher lets a value of its label through."""
    if "~" in matcher.op:
        fits = regex_matches(matcher.value, value)
    else:
        # Rules that are older than Prometheus 3 have le="1" for le="1.0".
        bound = matcher.label in ("le", "quantile")
        numbers = bound and float_or_nan(value) == float_or_nan(matcher.value)
        fits = numbers or value == matcher.value
    return fits == (matcher.op[0] == "=")


def count_matched(selector: Selector, evaluation: Evaluation) -> int:
    """Return how many series a selector finds."""
    known = evaluation.computed
    if selector not in known:
        found = evaluate(selector, evaluation)
        fresh = found
        if isinstance(found, Range):
            fresh = [s for s in found.series.values() if s.time > found.start]
        known[selector] = len(fresh)
    return cast(int, known[selector])


def lookbacks(expressions: Iterable[Expr]) -> dict[str, Lookback]:
    """Return each metric that expressions read, and how far back they look."""
    found: dict[str, Lookback] = {}
    depths = itertools.chain.from_iterable(map(_depths, dict.fromkeys(expressions)))
    for selector, seconds, step in depths:
        known, age = found.get(selector.name, Lookback()), seconds + selector.offset
        depth = age + (selector.window or (LOOKBACK if age > 0 else 0.0))
        # At its steps a subquery sees what is there, however long it looks back.
        window = selector.window or (depth if step else min(max(depth, 0.0), LOOKBACK))
        shortest = min(window or known.shortest, known.shortest or window)
        # All steps are multiples of one.
        steps = math.gcd(round(step * 1000), round(known.step * 1000)) / 1000
        found[selector.name] = Lookback(max(known.seconds, depth), shortest, steps)
    return found


def _depths(
    expr: Expr, before: float = 0.0, step: float = 0.0
) -> Iterator[tuple[Selector, float, float]]:
    """Yield each selector, how long before now it is asked, and at which steps."""
    if isinstance(expr, Selector):
        yield expr, before, step
    elif isinstance(expr, Subquery):
        yield from _depths(expr.expr, before + expr.offset + expr.window, expr.step)
    elif isinstance(expr, Operation):
        for operand in expr.operands:
            yield from _depths(operand, before, step)


def _subquery(expr: Subquery, compute: Compute, evaluation: Evaluation) -> Range:
    """Evaluate an expression at each multiple of a step, as if it were asked then."""
    end, shift = moment_of(expr, evaluation), evaluation.wall - evaluation.now
    # Steps are multiples since 1970, and Prometheus counts in milliseconds.
    step, last = round(expr.step * 1000), round((end + shift) * 1000)
    first = last - round(expr.window * 1000)
    series: dict[Labels, Series] = {}
    checks, count = array("d"), 0
    for number in range(first // step + 1, last // step + 1):
        wall = number * step / 1000
        then = evaluation._replace(now=min(wall - shift, end), wall=wall, computed={})
        vector = compute(then)
        checks.append(then.now)
        count += len(vector)
        if count > MAX_POINTS_OF_SUBQUERY:
            most = f"more than {MAX_POINTS_OF_SUBQUERY} points"
            raise EvaluationError(f"a subquery gives {most}: its step is too short")
        for labels, value in vector.items():
            if labels not in series:
                series[labels] = Series(checks)
            series[labels].add(value)
    return Range(series, end - expr.window, end)


def operate(expr: Operation, left: Value, right: Value) -> Value:
    """Return what an operator gives; what a comparison filters keeps its name."""
    if expr.name in SET_OPERATORS:
        return _combine(expr, cast(Vector, left), cast(Vector, right))
    apply = OPERATORS[expr.name]
    if isinstance(left, float) and isinstance(right, float):
        return float(apply(left, right))
    pairs = _pairs(expr, left, right)
    if is_filter(expr):
        return {labels: kept for labels, kept, a, b in pairs if apply(a, b)}
    # A group may give its many series the name of another metric.
    finish = _distinct if expr.grouping.many else _nameless
    return finish((labels, float(apply(a, b))) for labels, _, a, b in pairs)


def keep_those(holds: Real, limit: float, vector: Vector) -> Vector:
    """Return the series whose values compare so with a limit."""
    return {labels: value for labels, value in vector.items() if holds(value, limit)}


def is_filter(expr: Operation) -> bool:
    """Tell whether an operator only keeps series or drops them."""
    return expr.name in COMPARISONS and not expr.returns_bool


def _pairs(
    expr: Operation, left: Value, right: Value
) -> Iterable[tuple[Labels, float, float, float]]:
    """Return what belongs together: labels, the value a filter keeps, two operands."""
    if isinstance(right, float):
        return [(k, v, v, right) for k, v in cast(Vector, left).items()]
    if isinstance(left, float):
        return [(k, v, left, v) for k, v in cast(Vector, right).items()]
    sides = cast(Vector, left), cast(Vector, right)
    if expr.grouping.many == "group_right":
        return [(k, a, a, b) for k, b, a in _matched_pairs(expr, *sides[::-1])]
    return [(k, a, a, b) for k, a, b in _matched_pairs(expr, *sides)]


def _matched_pairs(
    expr: Operation, many: Vector, one: Vector
) -> Iterator[tuple[Labels, float, float]]:
    """Yield the pairs of two vectors by their labels.

    Each side has one series of the same labels, unless a group lets it have many: more
    are an error also where a filter would drop them, since Prometheus 3.9.
    """
    grouping = expr.grouping
    partners, keys = _grouped(one if many else {}, grouping), set()
    for key, group in partners.items():
        if len(group) > 1:
            raise EvaluationError(f"many-to-many matching, on {format_series(key)}")
    for labels, value in many.items():
        key = _signature(labels, grouping)
        for partner, other in partners.get(key, {}).items():
            result = labels
            if grouping.many:
                result = key = _included(expr, labels, partner)
            elif grouping.keep or grouping.labels:
                result = _filtered(labels, grouping.keep, grouping.labels)
            if key in keys:
                raise EvaluationError(f"many-to-one matching, on {format_series(key)}")
            keys.add(key)
            yield result, value, other


def _included(expr: Operation, labels: Labels, partner: Labels) -> Labels:
    """Return the labels of a result, with those of a partner that its group names."""
    names, others = expr.grouping.included, dict(partner)
    dropped = names if is_filter(expr) else (*names, *METADATA)
    wanted = [(name, others[name]) for name in names if name in others]
    return tuple(sorted([*_filtered(labels, False, dropped), *wanted]))


def _combine(expr: Operation, left: Vector, right: Vector) -> Vector:
    """Return what ``and``, ``or`` or ``unless`` keeps of two vectors."""
    if not right:
        return {} if expr.name == "and" else left
    wanted, other = (right, left) if expr.name == "or" else (left, right)
    there = {_signature(labels, expr.grouping) for labels in other}
    kept = {
        labels: value
        for labels, value in wanted.items()
        if (_signature(labels, expr.grouping) in there) == (expr.name == "and")
    }
    return {**left, **kept} if expr.name == "or" else kept


def _nameless(items: Iterable[tuple[Labels, float]]) -> Vector:
    # Whatever computes a value drops what says of which kind it was.
    return _distinct([(_filtered(labels, False, METADATA), v) for labels, v in items])


def _distinct(items: Iterable[tuple[Labels, float]]) -> Vector:
    pairs = list(items)
    vector = dict(pairs)
    if len(vector) < len(pairs):
        counts = collections.Counter(labels for labels, _ in pairs)
        ((twice, _),) = counts.most_common(1)
        problem = "vector cannot contain metrics with the same labelset"
        raise EvaluationError(f"{problem}: {format_series(twice)}")
    return vector


def unnamed(labels: Labels) -> Labels:
    """Return the labels of a series without its metric's name."""
    return _filtered(labels, False, ("__name__",))


def _grouped(vector: Vector, grouping: Grouping) -> dict[Labels, Vector]:
    groups: dict[Labels, Vector] = {}
    for labels, value in vector.items():
        groups.setdefault(_signature(labels, grouping), {})[labels] = value
    return groups


def _filtered(labels: Labels, keep: bool, names: Sequence[str]) -> Labels:
    return tuple([pair for pair in labels if (pair[0] in names) == keep])


def _signature(labels: Labels, grouping: Grouping) -> Labels:
    """Return the labels that a series is matched or grouped by."""
    keep, names, _, _ = grouping
    return _filtered(labels, keep, names if keep else (*names, "__name__"))


def _divide(left: float, right: float) -> float:
    return left / right if right else left * math.copysign(math.inf, right)


def _power(left: float, right: float) -> float:
    try:
        return math.pow(left, right)
    except (OverflowError, ValueError):
        # Python refuses what C and Go answer: 10 ^ 999, 0 ^ -1 and (-8) ^ 0.5.
        if left < 0 and not right.is_integer():
            return math.nan
        return math.copysign(math.inf, left if right % 2 == 1 else 1)


def _total(function: Real, *poles: tuple[float, float], most: float = math.inf) -> Real:
    # Where Python raises, C and Go have NaN or an infinity, as each pole says.
    def total(value: float) -> float:
        try:
            return function(value)
        except (OverflowError, OSError):
            return math.copysign(most, value)
        except ValueError:
            return dict(poles).get(value, math.nan)

    return total


def _whole(function: Real) -> Real:
    # What rounds to 0 keeps its sign.
    return _total(lambda value: math.copysign(function(value), value))


def _round(value: float, nearest: float = 1.0) -> float:
    inverse = _divide(1.0, nearest)
    return _divide(_floor(value * inverse + 0.5), inverse)


def _greater(left: float, right: float) -> float:
    # Go's math.Max: an infinity goes before NaN, and NaN before a number.
    return max(left, right, key=lambda v: (v == math.inf, math.isnan(v), v))


def _less(left: float, right: float) -> float:
    return -_greater(-left, -right)


def _sum(values: Numbers) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        # It overflows on the way, or there are infinities of both signs.
        return float(sum(values))


def _average(values: Numbers) -> float:
    # Where the sum overflows, the mean need not.
    mean = _sum(values) / len(values)
    return _sum([v / len(values) for v in values]) if math.isinf(mean) else mean


def _variance(values: Numbers) -> float:
    mean = _average(values)
    return _average([(value - mean) * (value - mean) for value in values])


def _quantile(values: Numbers, quantile: float) -> float:
    if not 0 <= quantile <= 1:
        return math.inf * quantile
    # NaN is less than any number.
    ordered = sorted(values, key=lambda value: (not math.isnan(value), value))
    rank = quantile * (len(ordered) - 1)
    low, weight = int(rank), math.fmod(rank, 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - weight) + ordered[high] * weight


def _changes(values: Numbers) -> float:
    # NaN differs from itself, but two of them in a row are no change.
    nans = list(map(math.isnan, values))
    alike = sum(map(operator.and_, nans, nans[1:]))
    return float(sum(map(operator.ne, values, values[1:])) - alike)


def _increase(points: Points, start: float, end: float, counter: bool = True) -> float:
    times, values = points.times, points.values
    result = values[-1] - values[0]
    if counter:
        # One by one, as Prometheus rounds; sum() would not since Python 3.12.
        result = reduce(operator.add, points.falls, result)
    covered = times[-1] - times[0]
    interval = covered / (len(times) - 1)
    # A series that begins or ends inside the window is extended by half an interval.
    gaps = times[0] - start, end - times[-1]
    lead, tail = (gap if gap < interval * 1.1 else interval / 2 for gap in gaps)
    if counter and result > 0 and values[0] >= 0:
        lead = min(lead, covered * (values[0] / result))
    return result * ((covered + lead + tail) / covered)


def _irate(times: Numbers, values: Numbers) -> float:
    before = 0.0 if values[1] < values[0] else values[0]
    return (values[1] - before) / (times[1] - times[0])


def _regression(points: Points, origin: float) -> tuple[float, float]:
    """Return the slope of the line of least squares, and its value at a moment."""
    values, ages = points.values, [at - origin for at in points.times]
    if all(value == values[0] for value in values):
        return (math.nan, math.nan) if math.isinf(values[0]) else (0.0, values[0])
    age, value = _average(ages), _average(values)
    ages = [one - age for one in ages]
    slope = _sum([a * (v - value) for a, v in zip(ages, values)])
    slope /= _sum([a * a for a in ages])
    return slope, value - slope * age


def _each(function: Real) -> Apply:
    """Apply to the value of each series, or to the time if there is no operand."""
    return lambda expr, now, vector=None, *others: _nameless(
        (labels, function(value, *others))
        for labels, value in ({(): now.wall} if vector is None else vector).items()
    )


def _of_time(part: Callable[[time.struct_time], float]) -> Apply:
    """Apply to the date of each value as a Unix time."""
    return _each(_total(lambda at: float(part(time.gmtime(int(at)))), most=math.nan))


def _days_in_month(date: time.struct_time) -> int:
    import calendar  # noqa: PLC0415

    return calendar.monthrange(*date[:2])[1]


def _over_range(function: Real, least: int = 1, named: bool = False) -> Apply:
    """Apply to the samples of each series that has enough of them in the range.

    What a series gave is remembered for rules that differ in their matchers.
    """
    dropped = () if named else METADATA

    def apply(expr: Operation, evaluation: Evaluation, *values: Any) -> Vector:
        *others, (found, *bounds) = values
        known = evaluation.computed.setdefault((expr.name, *bounds, *others), {})
        for labels, series in found.items():
            if series not in known:
                points = series.window(*bounds)
                known[series] = len(points.times) >= least and (
                    _filtered(labels, False, dropped),
                    function(points, *bounds, *others),
                )
        return _distinct(filter(None, map(known.get, found.values())))

    return apply


def _of_newest(
    function: Real, count: int, finish: Callable[..., Vector] = _nameless
) -> Apply:
    """Apply to the newest samples of each series that has so many in the range."""

    def apply(_: Operation, __: Evaluation, found: Range) -> Any:
        results: list[tuple[Labels, float]] = []
        for labels, series in found.series.items():
            newest = series.newest(count, found.start, found.end)
            if newest:
                results.append((labels, function(*newest)))
        return finish(results)

    return apply


def _over_values(function: Real, named: bool = False) -> Apply:
    return _over_range(lambda p, _, __, *more: function(p.values, *more), named=named)


def _aggregate(function: Real) -> Apply:
    """Apply to the values of each group, and to the parameter if there is one."""
    return lambda expr, evaluation, *values: {
        key: function(list(group.values()), *values[:-1])
        for key, group in _grouped(values[-1], expr.grouping).items()
    }


def _top(sign: float) -> Apply:
    """Keep the series of each group whose value times ``sign`` is greatest."""

    def apply(expr: Operation, _: Evaluation, most: float, vector: Vector) -> Vector:
        if not abs(most) < 2**63:
            raise EvaluationError(f"{expr.name} of {format_float(most)} series")
        # NaN comes last.
        ranks = {k: (math.isnan(value), -sign * value) for k, value in vector.items()}
        groups = _grouped(vector, expr.grouping).values()
        tops = (sorted(group, key=ranks.__getitem__) for group in groups)
        return {k: vector[k] for top in tops for k in top[: max(0, int(most))]}

    return apply


def _count_values(expr: Operation, _: Evaluation, label: str, vector: Vector) -> Vector:
    grouping = expr.grouping
    if grouping.keep:
        grouping = Grouping(True, (*grouping.labels, label))
    labeled = (_relabeled(k, label, format_float(vector[k])) for k in vector)
    counts = collections.Counter(_signature(labels, grouping) for labels in labeled)
    return {labels: float(count) for labels, count in counts.items()}


def _relabeled(labels: Labels, label: str, value: str | None) -> Labels:
    if value is None:
        return labels
    if not label:
        raise EvaluationError("a label needs a name")
    pairs = {**dict(labels), label: value}.items()
    return tuple(sorted((name, text) for name, text in pairs if text))


def _label_replace(_: Operation, __: Evaluation, vector: Vector, *texts: str) -> Vector:
    label, replacement, source, pattern = texts
    known, olds = _known_values(texts), [dict(k).get(source, "") for k in vector]
    if len(known) > 2 * len(vector):
        known.clear()
    unread = {*olds}.difference(known)
    for text, letters in zip(unread, itertools.accumulate(map(len, unread))):
        if letters > MAX_REPLACED:
            raise EvaluationError(f"more than {MAX_REPLACED} letters to replace")
        known[text] = regex_expand(pattern, text, replacement)
    pairs = zip(vector.items(), map(known.get, olds))
    return _distinct((_relabeled(k, label, new), v) for (k, v), new in pairs)


def _label_join(_: Operation, __: Evaluation, vector: Vector, *texts: str) -> Vector:
    label, joint, *names = texts
    joined = {k: joint.join(dict(k).get(name, "") for name in names) for k in vector}
    return _distinct((_relabeled(k, label, joined[k]), vector[k]) for k in vector)


def _timestamp(expr: Operation, evaluation: Evaluation, vector: Vector) -> Vector:
    operand, shift = expr.operands[0], evaluation.wall - evaluation.now
    if not isinstance(operand, Selector):
        return _nameless((labels, evaluation.wall) for labels in vector)
    moment, found = moment_of(operand, evaluation), select(operand, evaluation)
    samples = ((labels, found[labels].sample_at(moment)) for labels in vector)
    return _nameless((labels, seen[0] + shift) for labels, seen in samples if seen)


def _absent(expr: Operation, _: Evaluation, found: Vector | Range) -> Vector:
    if any(found.windows()) if isinstance(found, Range) else found:
        return {}
    selector, labels = expr.operands[0], {}
    matchers = selector.matchers if isinstance(selector, Selector) else ()
    for label, op, value in matchers:
        # What is said of a label after its first "=" takes that back for good.
        if op == "=" or label in labels:
            labels[label] = "" if label in labels else value
    return {tuple(sorted(pair for pair in labels.items() if pair[1])): 1.0}


def _of_buckets(function: Real) -> Apply:
    """Apply to the bounds and cumulative counts of each classic histogram."""

    def apply(_: Operation, __: Evaluation, *values: Any) -> Vector:
        results: Vector = {}
        for key, group in _grouped(values[-1], Grouping(labels=("le",))).items():
            buckets: dict[float, float] = collections.defaultdict(float)
            for labels, count in group.items():
                buckets[float_or_nan(dict(labels).get("le", ""))] += count
            bounds = sorted(_without_nan(buckets))
            if bounds:
                counts = [buckets[bound] for bound in bounds]
                results[key] = function(bounds, counts, *values[:-1])
        return results

    return apply


def _bucket_quantile(bounds: Numbers, counts: Numbers, quantile: float) -> float:
    if not 0 <= quantile <= 1:
        return math.inf * quantile
    last = len(bounds) - 1
    counts = list(itertools.accumulate(counts, _rising))
    if last < 1 or bounds[last] != math.inf or counts[last] == 0:
        return math.nan
    rank = quantile * counts[last]
    # Go's binary search, which says where a rank falls when a count is NaN.
    low = bisect_left([count >= rank for count in counts], True, 0, last)
    if low == last or (low == 0 and bounds[0] <= 0):
        return bounds[max(low - 1, 0)]
    start, before = (bounds[low - 1], counts[low - 1]) if low else (0.0, 0.0)
    return start + (bounds[low] - start) * _divide(rank - before, counts[low] - before)


def _rising(before: float, count: float) -> float:
    # A count may not fall, and what differs by rounding alone does not differ.
    near = abs(count - before) < 1e-12 * (abs(count) + abs(before))
    return before if near or count < before else count


def _share(bounds: Numbers, counts: Numbers, lower: float, upper: float) -> float:
    total = counts[-1]
    if bounds[-1] != math.inf or not total or math.isnan(lower) or math.isnan(upper):
        return math.nan
    # The first bucket begins at 0 if it can.
    edges = [0.0 if bounds[0] > 0 else -math.inf, *bounds]
    low, high = (_below(edges, (0.0, *counts), each) for each in (lower, upper))
    return 0.0 if lower >= upper else (min(high, total) - min(low, total)) / total


def _below(edges: Numbers, counts: Numbers, value: float) -> float:
    """Return how many observations are less: in a bucket they lie on a line."""
    high = bisect_left(edges, value)
    low = max(high - 1, 0)
    if edges[high] == value or edges[low] == -math.inf:
        return counts[high]
    share = (value - edges[low]) / (edges[high] - edges[low]) if high else 0.0
    return counts[low] + (counts[high] - counts[low]) * share


OPERATORS: dict[str, Real] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul,
    "/": _divide, "^": _power, "atan2": math.atan2,
    "%": lambda a, b: math.nan if math.isinf(a) or b == 0 else math.fmod(a, b),
    "==": operator.eq, "<": operator.lt, "<=": operator.le,
    "!=": operator.ne, ">": operator.gt, ">=": operator.ge,
}
_floor = _whole(math.floor)
_without_nan: Callable[..., Any] = partial(itertools.filterfalse, math.isnan)
REDUCERS: dict[str, Real] = {
    "avg": _average, "sum": _sum, "count": lambda values: float(len(values)),
    "max": lambda values: max(_without_nan(values), default=math.nan),
    "min": lambda values: min(_without_nan(values), default=math.nan),
    "stdvar": _variance, "stddev": lambda values: math.sqrt(_variance(values)),
}


class Function(NamedTuple):
    """A function: the types of its operands and of its result, and what it does.

    The last ``optional`` operands may be left out; -1: the last may come often, or not.
    """

    operands: tuple[str, ...]
    apply: Apply
    returns: str = VECTOR
    optional: int = 0
    aggregates: bool = False


def _rows(
    operands: tuple[str, ...], wrap: Callable[..., Apply], rows: Mapping[str, Any],
    **fields: Any,
) -> dict[str, Function]:  # fmt: skip
    return {name: Function(operands, wrap(rows[name]), **fields) for name in rows}


FUNCTIONS: dict[str, Function] = {
    **_rows((VECTOR,), _each, {
        "abs": abs, "ceil": _whole(math.ceil), "floor": _floor,
        "sgn": lambda value: float((value > 0) - (value < 0)) or value,
        "deg": math.degrees, "rad": math.radians,
        "ln": _total(math.log, (0, -math.inf)),
        "log2": _total(math.log2, (0, -math.inf)),
        "log10": _total(math.log10, (0, -math.inf)),
        **{name: _total(getattr(math, name)) for name in """exp sqrt
            sin cos tan asin acos atan sinh tanh asinh acosh""".split()},
        "atanh": _total(math.atanh, (1, math.inf), (-1, -math.inf)),
        "cosh": lambda value: _total(math.cosh)(abs(value)),
    }),
    **_rows((VECTOR, SCALAR), _each, {"round": _round}, optional=1),
    **_rows((VECTOR, SCALAR), _each, {"clamp_min": _greater, "clamp_max": _less}),
    **_rows((VECTOR,), _of_time, {
        "minute": lambda date: date.tm_min, "hour": lambda date: date.tm_hour,
        "day_of_month": lambda date: date.tm_mday, "month": lambda date: date.tm_mon,
        "day_of_week": lambda date: (date.tm_wday + 1) % 7,
        "day_of_year": lambda date: date.tm_yday, "year": lambda date: date.tm_year,
        "days_in_month": _days_in_month,
    }, optional=1),
    **_rows((RANGE,), _over_values, {
        "changes": _changes, "present_over_time": lambda values: 1.0,
        **{f"{name}_over_time": REDUCERS[name] for name in REDUCERS},
    }),
    **_rows((SCALAR, RANGE), _over_values, {"quantile_over_time": _quantile}),
    "first_over_time": Function((RANGE,), _over_values(lambda v: v[0], named=True)),
    "last_over_time": Function((RANGE,), _of_newest(lambda _, v: v[0], 1, dict)),
    "resets": Function((RANGE,), _over_range(lambda p, *_: float(len(p.falls)))),
    **_rows((RANGE,), partial(_over_range, least=2), {
        "increase": _increase, "delta": partial(_increase, counter=False),
        "rate": lambda points, a, b: _increase(points, a, b) / (b - a),
        "deriv": lambda points, start, end: _regression(points, end)[0],
    }),
    **_rows((RANGE,), partial(_of_newest, count=2), {
        "irate": _irate, "idelta": lambda times, values: values[1] - values[0],
    }),
    **_rows((VECTOR,), _aggregate, {
        "group": lambda values: 1.0, **REDUCERS,
    }, aggregates=True),
    **_rows((SCALAR, VECTOR), _aggregate, {"quantile": _quantile}, aggregates=True),
    **_rows((SCALAR, VECTOR), _top, {"topk": 1.0, "bottomk": -1.0}, aggregates=True),
    "count_values": Function((STRING, VECTOR), _count_values, aggregates=True),
    **_rows((SCALAR, VECTOR), _of_buckets, {"histogram_quantile": _bucket_quantile}),
    **_rows((SCALAR, SCALAR, VECTOR), _of_buckets, {"histogram_fraction": _share}),
    # Its seconds count from now, also where the range ends before.
    "predict_linear": Function((RANGE, SCALAR), lambda expr, now, ranged, seconds: (
        _over_range(lambda points, start, end, then: _regression(points, then)[1], 2)(
            expr, now, now.now + seconds, ranged
        )
    )),
    "absent": Function((VECTOR,), _absent),
    "absent_over_time": Function((RANGE,), _absent),
    "clamp": Function((VECTOR, SCALAR, SCALAR), lambda expr, now, vector, low, high: (
        _each(lambda value: _greater(low, _less(high, value)))(
            expr, now, {} if low > high else vector
        )
    )),
    "label_join": Function((VECTOR, STRING, STRING, STRING), _label_join, optional=-1),
    "label_replace": Function((VECTOR, STRING, STRING, STRING, STRING), _label_replace),
    # A rule has no order.
    "sort": Function((VECTOR,), lambda expr, evaluation, vector: vector),
    "sort_desc": Function((VECTOR,), lambda expr, evaluation, vector: vector),
    "pi": Function((), lambda expr, evaluation: math.pi, SCALAR),
    "time": Function((), lambda expr, evaluation: evaluation.wall, SCALAR),
    "scalar": Function((VECTOR,), lambda expr, evaluation, vector: (
        next(iter(vector.values())) if len(vector) == 1 else math.nan
    ), SCALAR),
    "timestamp": Function((VECTOR,), _timestamp),
    "vector": Function((SCALAR,), lambda expr, evaluation, number: {(): number}),
}


# --- 4. PromQL: text -> Expr ---------------------------------------------------------
# The language is that of Prometheus 3.14 (promql/parser/lex.go, generated_parser.y) as
# it comes, without experimental features, less what REFUSED has.

_LEVELS = ("or", "and unless", "== != <= < >= >", "+ -", "* / % atan2", "^")
PRECEDENCE = {op: level for level, ops in enumerate(_LEVELS) for op in ops.split()}
POWER = PRECEDENCE["^"]
SIGN = POWER - 0.5  # less than a power, more than a product
AGGREGATORS = {name for name, function in FUNCTIONS.items() if function.aggregates}
_FLAG = "Prometheus has it behind a flag"
_NATIVE = "native histograms are not read, classic ones with buckets are"
REFUSED = {
    **dict.fromkeys("""anchored double_exponential_smoothing fill fill_left fill_right
        histogram_quantiles info limit_ratio limitk mad_over_time max_of min_of range
        smoothed sort_by_label sort_by_label_desc step ts_of_first_over_time
        ts_of_last_over_time ts_of_max_over_time ts_of_min_over_time""".split(), _FLAG),
    **dict.fromkeys(("start", "end"), "in a rule it is the moment of the check"),
    **dict.fromkeys("""histogram_avg histogram_count histogram_stddev histogram_stdvar
        histogram_sum </ >/""".split(), _NATIVE),
    "holt_winters": "Prometheus 3 has it no more; see deriv and predict_linear",
}
# What other languages write, and PromQL otherwise.
HINTS = {
    "&": "write 'and'", "|": "write 'or'", "!": "write 'unless' or '!='",
    "=": "'==' compares", ":": "a rule's name stands right before its colon",
    **dict.fromkeys("\"'`", "unterminated string"),
}
RULE_WORDS = ("for", "keep_firing_for")
MODIFIERS = ("bool", "on", "ignoring", "group_left", "group_right", "atan2")
NO_NAMES = (*MODIFIERS, "inf", "nan")
JOINERS = {*PRECEDENCE, *MODIFIERS, *RULE_WORDS, "offset", "@", "["}
MAX_OPERATORS, MIN_RANGE, SUBQUERY_STEP = 150, 0.001, 60.0

_TOKEN = re.compile(
    r"""(?:[ \t\r]|\#[^\n]*)*(?:
    (?P<word>[a-z_:][\w:]*)
    |(?P<op>=~|!~|==|!=|<=|>=|</|>/|[-+*/%^<>=(){}\[\],;@])
    |(?P<number>(?:0x(?:_?[0-9a-f])+|(?:\d+(?-i:ms|[smhdwy]))+
        |(?:\d(?:_?\d)*(?:\.(?:\d(?:_?\d)*)?)?|\.\d(?:_?\d)*)
         (?:e[+-]?\d(?:_?\d)*)?)(?![\w.]))
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`[^`]*`)
    |(?P<newline>\n(?:[ \t\r\n]|\#[^\n]*)*)
    |(?P<end>\Z)|(?P<wrong>.))""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)
_DEPTHS = {**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}
_IN_RANGE = {"[": True, "]": False}
_BRACKET = re.compile(r"\s*\(")
_ESCAPES = dict(zip("abfnrtv\\", "\a\b\f\n\r\t\v\\"))
_ESCAPE = r"(?s)\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-3][0-7]{2}|.)"


class PromQLError(ValueError):
    """A text that is no rule: says what is wrong, and shows where with a caret."""


class Token(NamedTuple):
    """A piece of ``source``; ``key`` is its text in lower case."""

    kind: str
    text: str
    key: str
    position: int
    source: str

    def error(self, message: str) -> PromQLError:
        """Return an error that points at this token."""
        line = self.source.count("\n", 0, self.position) + 1
        start = self.source.rfind("\n", 0, self.position) + 1
        left = max(start, self.position - 60)
        shown = self.source[left : self.position + 30].partition("\n")[0]
        where = f"(at line {line}, column {self.position - start + 1})"
        caret = "^".rjust(self.position - left + 1)
        shown = re.sub("[^ -~]", " ", shown)
        return PromQLError(f"{message} {where}\n    {shown}\n    {caret}")

    def unexpected(self, expected: str) -> PromQLError:
        """Return the error for this token in the place of ``expected``."""
        key = self.key
        if key in REFUSED:
            return self.error(f"{key!r} is not supported: {REFUSED[key]}")
        shown = {"end": "the end", "newline": "the end of the line"}.get(self.kind)
        hint = f" ({HINTS[key]})" if key in HINTS else ""
        shown = (shown or repr(self.text[:40])) + hint
        return self.error(f"expected {expected}, found {shown}")

    def wrong(self) -> PromQLError:
        """Return the error for a character that no token begins with."""
        if self.text.isdigit():
            return self.error("bad number or duration")
        names = "a name is made of the letters A to Z, digits and _"
        hint = HINTS.get(self.text, names if self.text.isalpha() else "no operator")
        return self.error(f"bad character {self.text!r}: {hint}")


def parse_expression(text: str) -> Expr:
    """Return the syntax tree of one PromQL expression.

    Raises PromQLError for what PromQL refuses and for what REFUSED has.

    >>> parse_expression("up == 0").name
    '=='
    """
    parser = Parser(tokenize(text, 1))
    expr = parser.expression()
    parser.require(parser.token.kind == "end", "an operator or the end")
    return expr


def tokenize(text: str, depth: int = 0) -> Iterator[Token]:
    """Yield the tokens of one or more rules, the last of kind ``end``.

    A newline inside brackets, of which ``depth`` are open, between a function and its
    bracket, or before a word of JOINERS only continues a rule and is left out; where an
    expression cannot end yet, the parser skips it.  Raises PromQLError.
    """
    newline, last, kind, in_range, rest = None, "", "", False, _TOKEN.finditer(text)
    while kind != "end":
        match = next(rest)
        kind, at = str(match.lastgroup), match.end()
        found = match[kind]
        if in_range and found[:1] == ":":
            # A colon in square brackets begins no name.
            kind, at, found = "op", at - len(found) + 1, ":"
            rest = _TOKEN.finditer(text, at)
        token = Token(kind, found, found.lower(), at - len(found), text)
        if kind == "wrong":
            raise token.wrong()
        if kind == "op":
            depth += _DEPTHS.get(found, 0)
            in_range = _IN_RANGE.get(found, in_range)
        if kind != "newline":
            if newline and not _goes_on(token, last):
                yield newline
            newline, last = None, token.key
            yield token
        elif depth <= 0:
            newline = token._replace(key="\n")


def _goes_on(token: Token, last: str) -> bool:
    """Tell whether a token on a line of its own goes on with the line before."""
    joins = token.key in JOINERS or (token.key == "(" and last in FUNCTIONS)
    groups = token.key in ("by", "without")
    behind = token.position + len(token.text)
    return joins or (groups and bool(_BRACKET.match(token.source, behind)))


class Parser:
    """A descent through the tokens of one or more rules; ``token`` is the next one.

    Tokens are made as they are taken: a long text is refused at its first fault.
    """

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._rest = iter(tokens)
        self.token = next(self._rest)
        self.following = next(self._rest, self.token)
        self._operators = 0

    def take(self) -> Token:
        """Return the next token and go on behind it, if it is not the end."""
        token = self.token
        if token.key in PRECEDENCE or token.key == "(":
            self._operators += 1
            if self._operators > MAX_OPERATORS:
                raise token.error(f"more than {MAX_OPERATORS} operators and brackets")
        self.token = self.following
        self.following = next(self._rest, self.token)
        return token

    def accept(self, key: str) -> bool:
        """Take the next token if that is this one."""
        found = self.token.key == key
        if found:
            self.take()
        return found

    def require(self, fits: bool, expected: str) -> Token:
        """Take the next token, or raise PromQLError if it does not fit."""
        if not fits:
            raise self.token.unexpected(expected)
        return self.take()

    def expect(self, key: str) -> None:
        """Take the next token, or raise PromQLError if that is another one."""
        self.require(self.token.key == key, repr(key))

    def expression(self) -> Expr:
        """Return the expression that starts here; it ends where no operator is."""
        self._operators = 0
        return self._binary()

    def _binary(self, floor: float = 0) -> Expr:
        left = self._unary()
        while PRECEDENCE.get(self.token.key, -1) >= floor:
            token = self.take()
            returns_bool = self.accept("bool")
            grouping = self._matching()
            # Only the power is right-associative.
            right = self._binary(PRECEDENCE[token.key] + (token.key != "^"))
            left = Operation(token.key, (left, right), grouping, returns_bool)
            _check_operator(left, token)
        return left

    def _unary(self) -> Expr:
        self.accept("\n")
        if self.token.key not in ("+", "-"):
            return self._looking_back()
        sign, operand = self.take(), self._binary(POWER)
        _check_operator(Operation(sign.key, (operand, operand)), sign)
        return operand if sign.key == "+" else _negative(operand)

    def _looking_back(self) -> Expr:
        """Return an operand with what stands behind it: a range, ``offset``, ``@``."""
        plain, expr = self.token.key != "(", self._operand()
        while self.token.key in ("[", "offset", "@"):
            word = self.take()
            if word.key == "[":
                expr, plain = self._range(expr, word, plain), True
                continue
            if not plain or not isinstance(expr, (Selector, Subquery)):
                raise word.error(f"{word.key!r} stands behind a selector or a subquery")
            given = {"offset": expr.offset or None, "@": expr.at}
            if given[word.key] is not None:
                raise word.error(f"{word.key!r} is given twice")
            if word.key == "offset":
                expr = expr._replace(offset=self._signed("a duration"))
            else:
                expr = expr._replace(at=self._signed("a Unix time"))
        return expr

    def _range(self, expr: Expr, bracket: Token, plain: bool) -> Expr:
        window = self._duration()
        if not self.accept(":"):
            self.expect("]")
            if not plain or not isinstance(expr, Selector) or expr[2:] != (0, 0, None):
                raise bracket.error("only a selector has a range, a subquery is [5m:]")
            return expr._replace(window=window)
        step = SUBQUERY_STEP if self.token.key == "]" else self._duration()
        self.expect("]")
        if type_of(expr) != VECTOR:
            raise bracket.error(f"a subquery is of an {VECTOR}, no {type_of(expr)}")
        subquery = Subquery(expr, window, step)
        if count_steps(subquery) > MAX_STEPS:
            raise bracket.error(f"more than {MAX_STEPS} points: make the step longer")
        return subquery

    def _duration(self) -> float:
        """Return the seconds of a length of time, which may be computed."""
        start = self.token
        if start.key == "]":
            raise start.unexpected("a duration")
        seconds = _constant(self._binary(PRECEDENCE["+"]), start, "a duration")
        if not MIN_RANGE <= seconds < MAX_DURATION:
            raise start.error("a range must be longer than 0, and shorter than 292y")
        return seconds

    def _signed(self, expected: str) -> float:
        """Return a number or a duration, which in brackets may be computed."""
        start, sign = self.token, -1.0 if self.token.key == "-" else 1.0
        if start.key in ("-", "+"):
            self.take()
        value = sign * _constant(self._operand(), start, expected)
        if not abs(value) < MAX_DURATION:
            raise start.error(f"expected {expected} of less than 292 years")
        return value

    def _operand(self) -> Expr:
        token, following = self.token, self.following.key
        if self.accept("("):
            expr = self._binary()
            self.expect(")")
            return expr
        if token.kind == "string":
            return Text(_unquote(self.take()))
        if token.kind == "number" or token.key in ("inf", "nan"):
            return Number(_number(self.take()))
        aggregates = token.key in AGGREGATORS
        if token.kind == "word" and following in ("(", *("by", "without") * aggregates):
            return self._call(token.key if aggregates else token.text)
        return self._selector()

    def _list(
        self, brackets: str, item: Callable[[], T], *, trailing: bool = True
    ) -> list[T]:
        items: list[T] = []
        self.accept("\n")
        self.expect(brackets[0])
        while self.token.key != brackets[1] or (items and not trailing):
            items.append(item())
            if not self.accept(","):
                break
        self.expect(brackets[1])
        return items

    def _grouping(self, *words: str) -> Grouping | None:
        if self.token.key not in words:
            return None
        keep = self.take().key == words[0]
        return Grouping(keep, tuple(self._list("()", self._label)))

    def _matching(self) -> Grouping:
        grouping, word = self._grouping("on", "ignoring"), self.token
        if not grouping or word.key not in ("group_left", "group_right"):
            return grouping or Grouping()
        self.take()
        self.accept("\n")
        included = self._list("()", self._label) if self.token.key == "(" else []
        if grouping.keep and {*included} & {*grouping.labels}:
            raise word.error("a label is in on and in group")
        return grouping._replace(many=word.key, included=tuple(included))

    def _label(self, besides: Sequence[str] = ("inf", "nan", "without")) -> str:
        token = self.token
        if token.kind == "string":
            return _unquote(self.take())
        plain = token.kind == "word" and ":" not in token.text
        return self.require(plain and token.key not in besides, "a label name").text

    def _call(self, name: str) -> Operation:
        if name not in FUNCTIONS:
            near = most_like(name.lower()[:40], FUNCTIONS, 1, 0.6)
            hint = f": is {near[0]} meant?" if near else ""
            raise self.token.unexpected(f"a function{hint}")
        token, function = self.take(), FUNCTIONS[name]
        grouping = self._grouping("by", "without")
        operands = self._list("()", self._binary, trailing=False)
        if function.aggregates and not grouping:
            grouping = self._grouping("by", "without") or Grouping(True)
        call = Operation(name, tuple(operands), grouping or Grouping())
        _check_operands(call, token)
        return call

    def _selector(self) -> Selector:
        start, matchers = self.token, []
        if start.kind == "word" and start.key not in MODIFIERS:
            matchers.append(Matcher("__name__", "=", self.take().text))
        elif start.key != "{":
            raise start.unexpected("an expression")
        if self.token.key == "{":
            matchers += self._list("{}", self._matcher)
        names = [matcher for matcher in matchers if matcher.label == "__name__"]
        if [name.op for name in names] != ["="] or not names[0].value:
            raise start.error("a selector must name its metric, once and exactly")
        matchers.remove(names[0])
        return Selector(names[0].value, tuple(matchers))

    def _matcher(self) -> Matcher:
        token, label, op = self.token, self._label(()), self.token
        if token.kind == "string" and op.key in (",", "}"):
            return Matcher("__name__", "=", label)
        self.require(op.key in ("=", "!=", "=~", "!~"), "=, !=, =~ or !~")
        value = self.require(self.token.kind == "string", "a string in quotes")
        matcher = Matcher(label, op.key, _unquote(value))
        if "~" in op.key:
            _check_regex(matcher.value, value)
        return matcher


def _check_operator(expr: Operation, token: Token) -> None:
    op, types = token.key, set(map(type_of, expr.operands))
    for wrong, problem in (
        (RANGE in types, "{!r} takes no range vector"),
        (STRING in types, "{!r} takes no string"),
        (op in SET_OPERATORS and SCALAR in types, "{!r} takes no scalar"),
        (op in SET_OPERATORS and expr.grouping.many, "{!r} has no group"),
        (op not in COMPARISONS and expr.returns_bool, "bool stands after a comparison"),
        (types == {SCALAR} and is_filter(expr), "{!r} between scalars must use bool"),
        (SCALAR in types and expr.grouping.labels, "on and ignoring take no scalar"),
    ):  # fmt: skip
        if wrong:
            raise token.error(problem.format(op))


def _check_operands(expr: Operation, token: Token) -> None:
    function, found = FUNCTIONS[expr.name], tuple(map(type_of, expr.operands))
    types = function.operands
    if function.optional < 0:
        types = types[:-1] + types[-1:] * max(0, len(found) - len(types) + 1)
    elif len(found) < len(types):
        types = types[: max(len(found), len(types) - function.optional)]
    if found != types:
        wanted, given = (" and ".join(t) or "nothing" for t in (types, found))
        raise token.error(f"{token.text} takes {wanted}, not {given}")
    if expr.name == "label_replace":
        _check_regex(cast(Text, expr.operands[4]).value, token)


def _check_regex(pattern: str, token: Token) -> None:
    try:
        compile_regex(pattern)
    except ValueError as error:
        raise token.error(str(error)) from None


def _constant(expr: Expr, token: Token, expected: str) -> float:
    """Return the value of an expression of numbers alone."""
    if isinstance(expr, Operation) and expr.name in OPERATORS:
        left, right = (_constant(each, token, expected) for each in expr.operands)
        return float(OPERATORS[expr.name](left, right))
    if not isinstance(expr, Number):
        raise token.unexpected(expected)
    return expr.value


def count_steps(expr: Expr) -> int:
    """Return how many moments the subqueries in an expression look at."""
    if isinstance(expr, Subquery):
        return int(expr.window / expr.step + 1) * max(1, count_steps(expr.expr))
    operands = expr.operands if isinstance(expr, Operation) else ()
    return sum(map(count_steps, operands))


def _negative(operand: Expr) -> Expr:
    # A minus is a multiplication, also in what becomes of the metric's name.  As a
    # literal -0 would equal 0, by which it does not divide.
    if isinstance(operand, Number) and operand.value:
        return Number(-operand.value)
    return Operation("*", (Number(-1.0), operand))


def _number(token: Token) -> float:
    text = token.key.replace("_", "")
    try:
        if re.match(r"0(?:x|[0-7]+\Z)", text):
            number = int(text, 16 if "x" in text else 8)
            # What does not fit an integer of 64 bits is read as a decimal.
            return float(number) if number < 1 << 63 else parse_float(text)
        return parse_duration(text) if text[-1] in "smhdwy" else parse_float(text)
    except (ValueError, OverflowError):
        raise token.error("bad number or duration") from None


def _unquote(token: Token) -> str:
    mark, body = token.text[0], token.text[1:-1]
    known = {**_ESCAPES, mark: mark}

    def unescaped(match: re.Match[str]) -> str:
        code, base = match[1], 8 if match[1].isdigit() else 16
        if code in known:
            return known[code]
        number = int(code.lstrip("xuU"), base) if code[1:] else sys.maxunicode + 1
        if number > sys.maxunicode:
            raise token.error(f"unknown escape \\{code}")
        # \x and octal numbers are bytes of UTF-8; a surrogate stands for one.
        return chr(number + 0xDC00 * (code[0] not in "uU" and number > 127))

    try:
        text = body if mark == "`" else re.sub(_ESCAPE, unescaped, body)
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise token.error("this string is not UTF-8") from None


def type_of(expr: Expr) -> str:
    """Return the type of what an expression gives, in Prometheus' words.

    >>> type_of(parse_expression("rate(x[5m])"))
    'instant vector'
    """
    if isinstance(expr, (Number, Text)):
        return SCALAR if isinstance(expr, Number) else STRING
    if isinstance(expr, (Selector, Subquery)):
        return RANGE if expr.window else VECTOR
    if expr.name in FUNCTIONS:
        return FUNCTIONS[expr.name].returns
    return VECTOR if VECTOR in map(type_of, expr.operands) else SCALAR


def find_selectors(expr: Expr, besides: tuple[str, ...] = ()) -> Iterator[Selector]:
    """Yield the selectors of an expression, besides those inside some functions."""
    return (part for part in find_parts(expr, besides) if isinstance(part, Selector))


def find_parts(expr: Expr, besides: tuple[str, ...] = ()) -> Iterator[Expr]:
    """Yield an expression and all within it, besides some functions."""
    if not isinstance(expr, Operation):
        yield expr
        if isinstance(expr, Subquery):
            yield from find_parts(expr.expr, besides)
    elif expr.name not in besides:
        yield expr
        for operand in expr.operands:
            yield from find_parts(operand, besides)


def format_expression(expr: Expr, floor: float = 0) -> str:
    """Return the canonical text of an expression; it parses to the same tree.

    Durations are written to the millisecond.

    >>> format_expression(parse_expression("a>1  OR (b)"))
    'a > 1 or b'
    """
    if isinstance(expr, (Selector, Subquery)):
        return _format_looking_back(expr)
    if isinstance(expr, Text):
        return quote(expr.value)
    level: float = POWER + 1
    if isinstance(expr, Number):
        text = format_float(expr.value)
        level = SIGN if text.startswith("-") else level
    elif expr.name in FUNCTIONS:
        operands = ", ".join(map(format_expression, expr.operands))
        grouping = _format_grouping(expr, "by", "without")
        text = f"{expr.name}{grouping and grouping + ' '}({operands})"
    elif expr == _negative(expr.operands[1]):
        level, text = SIGN, "-" + format_expression(expr.operands[1], SIGN)
    else:
        level, power = PRECEDENCE[expr.name], expr.name == "^"
        left = format_expression(expr.operands[0], level + power)
        right = format_expression(expr.operands[1], level + (not power))
        grouping = _format_grouping(expr, "on", "ignoring")
        text = f"{left} {expr.name}{' bool' * expr.returns_bool}{grouping} {right}"
    return f"({text})" if level < floor else text


def _format_looking_back(expr: Selector | Subquery) -> str:
    if isinstance(expr, Subquery):
        text = format_expression(expr.expr, POWER + 1)
        text += f"[{format_duration(expr.window)}:{format_duration(expr.step)}]"
    else:
        name, matchers, window = expr[:3]
        if name.lower() in NO_NAMES:
            name, matchers = "", (Matcher("__name__", "=", name), *matchers)
        text = format_selector(name, matchers)
        text += f"[{format_duration(window)}]" if window else ""
    text += "" if expr.at is None else f" @ {format_float(expr.at)}"
    length = "-" * (expr.offset < 0) + format_duration(abs(expr.offset))
    return f"{text} offset {length}" if expr.offset else text


def _format_grouping(expr: Operation, kept: str, dropped: str) -> str:
    if expr.grouping == Grouping(expr.name in AGGREGATORS):
        return ""
    keep, labels, many, included = expr.grouping
    text = f" {kept if keep else dropped} ({', '.join(map(format_name, labels))})"
    return text + f" {many} ({', '.join(map(format_name, included))})" * bool(many)


# --- 5. Rules: text -> Rules; Vector -> inactive, pending, firing --------------------

MAX_FOUND = 20000
MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
# What answers to the absence of a metric.
SEE_ABSENCE = ("absent", "absent_over_time", "scalar")
RULE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*:\Z")
_PASTED = re.compile(r"(?:-\s+)?(?:alert|expr|groups|record)\s*:\s")


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Return the rules of a text, in order; nameless ones are Rule1, Rule2, ...

    Raises PromQLError, also for a name that is given twice.

    >>> [rule.name for rule in parse_rules("Down: up == 0; up > 1 for 5m")]
    ['Down', 'Rule2']
    """
    parser = Parser(tokenize(text))
    rules: dict[str, Rule] = {}
    while parser.token.kind != "end":
        if parser.accept("\n") or parser.accept(";"):
            continue
        start = parser.token
        rule = _rule(parser, f"Rule{len(rules) + 1}")
        if rule.name in rules:
            raise start.error(f"there is a rule named {rule.name} already")
        rules[rule.name] = rule
    return tuple(rules.values())


@lru_cache(maxsize=256)
def format_rule(rule: Rule) -> str:
    """Return a rule as text that gives the same rule again."""
    return f"{rule.name}: {format_expression(rule.expr)}{format_clauses(rule)}"


def format_clauses(rule: Rule) -> str:
    """Return what follows the expression of a rule."""
    clauses = zip(RULE_WORDS, (rule.hold, rule.keep_firing_for))
    return "".join(f" {word} {format_duration(s)}" for word, s in clauses if s)


def judge(before: RuleStatus, evaluation: Evaluation) -> RuleStatus:
    """Return the status of a rule now, from its status before.

    Where it cannot be evaluated, the alerts stay as they were and ``error`` says why.
    """
    rule, part = before.rule, _part(before, evaluation)
    try:
        found, value, limit = part.measure(evaluation)
        same = rule.builtin and (part, value) == (before.part, before.value)
        if same and not found and before.state == "inactive":
            return before
        samples, matched = _samples(found), _count_found(rule, part, evaluation)
    except EvaluationError as error:
        return before._replace(error=str(error), value=None, part=part)
    alerts = {unnamed(alert.labels): alert for alert in before.alerts}
    now_there = _advanced(rule, alerts, samples, evaluation.now)
    if len(now_there) > MAX_FOUND:
        problem = f"more than {MAX_FOUND} alerts: label values change with each scrape"
        # Those that were known go on, and so end in time and make room again.
        known = tuple(a for a in now_there if unnamed(a.labels) in alerts)
        return before._replace(alerts=known, error=problem, value=None, part=part)
    return RuleStatus(rule, now_there, "", matched, value, limit, part=part)


def _samples(found: Vector) -> dict[Labels, Sample]:
    # An alert is known by the labels of its series without the name, and these must
    # differ (AlertingRule.Eval in Prometheus' rules/alerting.go).
    samples = {unnamed(labels): Sample(labels, v) for labels, v in found.items()}
    if len(samples) < len(found):
        raise EvaluationError("two series differ in nothing but their name")
    return samples


def _count_found(rule: Rule, part: Part, evaluation: Evaluation) -> int:
    # Of a built-in rule it is enough to know whether anything is there.
    if rule.builtin:
        return sum(selector.name in evaluation.names for selector in part.selectors)
    return sum(count_matched(selector, evaluation) for selector in part.selectors)


def unholdable(expressions: Sequence[Expr]) -> Iterator[str]:
    """Yield what no history that begins now and has a bound can answer.

    >>> print(*unholdable([parse_expression("rate(x[5m]) > x offset 60d")]))
    x is looked at 60d5m back: so far, too few samples are kept for 5m
    """
    for expr in expressions:
        for part in find_parts(expr):
            if isinstance(part, (Selector, Subquery)) and part.at is not None:
                text = format_expression(part)
                yield f"{text} is about a moment of which nothing is remembered"
    for name, back in lookbacks(expressions).items():
        if back.least > back.shortest / 2:
            seconds, shortest = map(format_duration, (back.seconds, back.shortest))
            why = f"so far, too few samples are kept for {shortest}"
            yield f"{name} is looked at {seconds} back: {why}"


def restart_clocks(status: RuleStatus) -> RuleStatus:
    """Return a status without what is pending, as after a gap between checks."""
    firing = tuple(alert for alert in status.alerts if alert.state == "firing")
    return status._replace(alerts=firing)


def visible_rule(status: RuleStatus) -> Rule | None:
    """Return a rule, of a built-in one what concerns the metrics there, if any does."""
    rule, part = status.rule, status.part
    if not part or not rule.builtin:
        return rule
    return rule._replace(expr=part.visible) if part.visible else None


def prune(expr: Expr, names: Container[str]) -> Expr | None:
    """Return what is left of an expression where only these metrics are there.

    That gives the same answer; None if it is always empty.

    >>> format_expression(prune(parse_expression("(a or b) > 1 unless c"), ["b"]))
    'b > 1'
    """
    if isinstance(expr, Selector):
        return expr if expr.name in names else None
    if not isinstance(expr, Operation) or expr.name in SEE_ABSENCE:
        return expr
    operands = [prune(operand, names) for operand in expr.operands]
    if None not in operands:
        return expr._replace(operands=tuple(filter(None, operands)))
    if expr.name == "or":
        return operands[0] or operands[1]
    return operands[0] if expr.name == "unless" else None


def without(expr: Expr, name: str) -> Expr:
    """Return an expression that finds less, not more, where a metric is not read.

    >>> print(format_expression(without(parse_expression("a unless (b or c)"), "b")))
    a and b
    """
    if not isinstance(expr, Operation):
        return expr
    operands = tuple(without(operand, name) for operand in expr.operands)
    if expr.name == "unless" and name in lookbacks([expr.operands[1]]):
        return Operation("and", (operands[0], Selector(name)))
    return expr._replace(operands=operands)


def renamed(expr: Expr, labels: Container[str]) -> Expr:
    """Return an expression that means the labels which targets themselves give.

    Those that TARGET_LABELS has, too, have another name.  It looks into no subquery and
    at no labels of a group, which built-in rules have not.

    >>> print(format_expression(renamed(parse_expression("sum by (a) (x)"), ["a"])))
    sum by (exported_a) (x)
    """

    def new(label: str) -> str:
        return f"exported_{label}" if label in labels else label

    if isinstance(expr, Selector) and expr.matchers:
        matchers = (m._replace(label=new(m.label)) for m in expr.matchers)
        return expr._replace(matchers=tuple(matchers))
    if not isinstance(expr, Operation):
        return expr
    operands = tuple(renamed(part, labels) for part in expr.operands)
    grouping = expr.grouping._replace(labels=tuple(map(new, expr.grouping.labels)))
    return expr._replace(operands=operands, grouping=grouping)


def _part(status: RuleStatus, evaluation: Evaluation) -> Part:
    rule, part = status.rule, status.part
    names = evaluation.names if rule.builtin else frozenset()
    if part and part.names == names:
        return part
    if not rule.builtin:
        selectors = tuple(find_selectors(rule.expr))
        return Part(names, _measuring(rule.expr), selectors, rule.expr)
    # What scrapes and probes add is always meant, there or not.
    visible = prune(rule.expr, names.union(SYNTHETIC, PROBED))
    left, shown = prune(rule.expr, names), find_selectors(visible) if visible else ()
    wanted = {selector.name: selector for selector in shown}
    measure = _measuring(left, lazy=True) if left else lambda _: Measure({})
    return Part(names, measure, tuple(wanted.values()), visible)


class Measure(NamedTuple):
    """What an expression gives; where it is ``EXPR OP NUMBER``, its worst value too."""

    found: Vector
    value: float | None = None
    limit: float | None = None


def _measuring(expr: Expr, lazy: bool = False) -> Callable[[Evaluation], Measure]:
    """Return what evaluates a rule, and finds the worst value that it limits."""
    compute, name, left, right = compiled(expr, lazy), "", expr, expr
    if isinstance(expr, Operation) and is_filter(expr):
        name, (left, right) = expr.name, expr.operands
    if isinstance(left, Number):
        name, left, right = MIRRORED[name], right, left
    if not isinstance(right, Number):
        return lambda evaluation: Measure(compute(evaluation))
    compute, limit, holds = compiled(left, lazy), right.value, OPERATORS[name]
    worst = REDUCERS["min" if name in ("<", "<=") else "max"]

    def measure(evaluation: Evaluation) -> Measure:
        measured = compute(evaluation)
        found = keep_those(holds, limit, measured)
        # With == and != the worst is neither the greatest nor the least.
        value = worst([*(found or measured).values()]) if measured else None
        return Measure(found, value, limit)

    return measure


def _advanced(
    rule: Rule, alerts: Mapping[Labels, Alert], samples: Mapping[Labels, Sample],
    now: float,
) -> tuple[Alert, ...]:  # fmt: skip
    found = (
        _advance(rule, alerts.get(key), samples.get(key), now)
        for key in {**alerts, **samples}
    )
    return tuple(filter(None, found))


def _advance(
    rule: Rule, alert: Alert | None, sample: Sample | None, now: float
) -> Alert | None:
    """Return what becomes of a series' alert, None for inactive: the state machine.

    A series that is there makes its alert pending, and firing once it has lasted
    ``for``.  One that is gone ends a pending alert at once, and a firing one after
    ``keep_firing_for``.  (AlertingRule.Eval in Prometheus' rules/alerting.go.)
    """
    if not sample:
        if not alert or alert.state == "pending":
            return None
        since = now if alert.absent_since is None else alert.absent_since
        keeps = now - since < rule.keep_firing_for
        return alert._replace(absent_since=since) if keeps else None
    alert = alert or Alert(*sample, since=now)
    if (*alert[:2], alert.absent_since) != (*sample, None):
        labels, value = sample
        alert = alert._replace(labels=labels, value=value, absent_since=None)
    if alert.state == "pending" and now - alert.since >= rule.hold:
        return alert._replace(fired=now)
    return alert


def _rule(parser: Parser, name: str) -> Rule:
    start, end = parser.token, parser.token.position + len(parser.token.text)
    if _PASTED.match(start.source, start.position):
        raise start.error("a rule stands on a line here: Name: EXPRESSION for 5m")
    if RULE_NAME.match(start.text) and not start.source[end : end + 1].strip():
        name = parser.take().text[:-1]
    first, expr = parser.token, parser.expression()
    if type_of(expr) != VECTOR:
        raise first.error(f"a rule is an {VECTOR}, this is a {type_of(expr)}")
    seconds = {
        word: _seconds(parser.take()) if parser.accept(word) else 0.0
        for word in RULE_WORDS
    }
    if parser.token.kind != "end" and parser.token.key not in ("\n", ";"):
        if first.source[: parser.token.position].rstrip().endswith(":"):
            raise first.error("a rule's name is made of A to Z, digits and _")
        raise parser.token.unexpected("an operator, 'for', ';' or the end of the line")
    return Rule(name, expr, seconds["for"], seconds["keep_firing_for"])


def _seconds(token: Token) -> float:
    try:
        return parse_duration(token.text)
    except ValueError:
        raise token.unexpected("a duration such as 30s") from None


# --- 6. Servers: table -> the text of the built-in rules -----------------------------
# One failed scrape is no news: these rules read the last value known, and compare the
# last two samples, however far apart the checks of a prober are.

LATE = 'scrape_error{reason="timeout"}'
# A time out counts when it has lasted 30 s, or if no scrape succeeded in 10 minutes, as
# where checks are that rare, and at the very first; anything else counts at once.
DOWN = f"""scrape_error{{reason!="timeout"}}
  or {LATE} and ignoring (reason) last_over_time(up[5m] offset 30s) == 0
    unless ignoring (reason) max_over_time(up[31s]) > 0
  or {LATE} unless ignoring (reason) max_over_time(up[10m]) > 0
"""
NOT_SERVING = """probe_success{probe="health"} == 0
  unless on (instance) (probe_error{probe="health", reason="timeout"}
    and on (instance) (max_over_time(probe_success{probe="health"}[31s]) > 0
      or last_over_time(probe_success{probe="health"}[5m] offset 30s) > 0))
"""
NOWHERE = Grouping(True, ())
LATEST, MOVED = "last_over_time({}[2m10s])", "idelta({}[5m]) != 0"
# Nobody listened: what was seen before is of a process that has ended.
GONE = 'count_over_time(scrape_error{reason="refused"}[2m10s])'
GENERATE = "/v1/(chat/)?completions|/v1/responses|/v1/messages"
PROBES = "/livez|/readyz|/healthz"


class KnownServer(NamedTuple):
    """A server, and what tells of its metrics; empty where nothing does.

    ``at`` is where they are by default, ``seen`` the version that was, and how.
    ``waiting`` and ``running`` are gauges of requests, ``moving`` what changes with a
    step of the engine, ``prefill`` what changes in the prefill of a long prompt, and
    ``match`` how their series belong together; ``open`` is a gauge of requests in the
    API, without labels of an engine.  ``queue`` and ``stuck`` stand for what follows
    from these, where it does not fit.  Requests that end count as ``answered``,
    as ``failed``, or as ``abandoned`` by a client whom they may have answered or not;
    ``accepted`` changes when one reaches the engine.  Without ``beside`` there is no
    stall.  ``own`` is there with no other server, as those of ``known_by`` are.
    ``no_model`` has series where no model is loaded, ``asleep`` is 0 where the server
    sleeps on purpose.  ``ports`` are those that it needs besides.  Several names are
    separated by blanks.
    """

    name: str
    at: str
    seen: str
    remark: str = ""
    waiting: str = ""
    running: str = ""
    moving: str = ""
    prefill: str = ""
    match: str = "on (instance)"
    open: str = ""
    queue: str = ""
    stuck: str = ""
    answered: str = ""
    failed: str = ""
    abandoned: str = ""
    accepted: str = ""
    beside: str = ""
    own: str = ""
    known_by: str = ""
    no_model: str = ""
    asleep: str = ""
    ports: str = ""

    @property
    def watched(self) -> bool:
        """Whether a rule asks what its requests do."""
        return bool(self.waiting or self.running or self.moving)


def builtin_rules(names: Iterable[str], limit: float) -> Iterator[Rule]:
    """Yield the built-in rules of these names; the limit is that of QueueFull.

    >>> [format_rule(rule)[:41] for rule in builtin_rules(["Down"], 10)]
    ['Down: scrape_error{reason!="timeout"} or ']
    """
    shown = format_float(limit)
    for name in names:
        clauses, text_for = BUILTIN[name]
        expr = _union(text_for(server, shown) for server in SERVERS)
        expr = _seen_twice(expr) if name in HUNG else expr
        (rule,) = parse_rules(f"{name}: up {clauses}")
        yield rule._replace(expr=expr, builtin=True)


def canary_rules(after: float) -> tuple[Rule, ...]:
    """Return when a canary is asked for by default: nothing moves anywhere.

    Idle: nothing has run, waited or moved for ``after`` seconds.  Stuck: what Stalling
    fires for, and soon enough for the answer to be there before that does.
    """
    moving = [server for server in SERVERS if server.moving]
    moved = _union(text for server in moving for text in _changed(server, MOVED))
    stuck = _seen_twice(_union(_stuck(server, "") for server in SERVERS))
    return tuple(
        Rule(name, Operation("unless", (expr, moved), NOWHERE), hold, 0.0, True)
        for name, expr, hold in (("Idle", _idle(moving), after), ("Stuck", stuck, 40.0))
    )


def without_recovered(status: RuleStatus, evaluation: Evaluation) -> RuleStatus:
    """Return a status without what Unanswered keeps firing though something moves.

    Or though the server has been started again: its clients went with the one before.
    """
    rule = status.rule
    if not (status.alerts and rule.builtin and rule.name == "Unanswered"):
        return status
    there = {dict(labels)["instance"] for labels in evaluate(_recovery(), evaluation)}
    alerts = (a for a in status.alerts if dict(a.labels)["instance"] not in there)
    return status._replace(alerts=tuple(alerts))


def _recovery() -> Expr:
    servers = [server for server in SERVERS if server.abandoned]
    moved = (text for s in servers for text in _changed(s, MOVED, s.accepted))
    return _union([*moved, GONE])


def _idle(servers: Iterable[KnownServer]) -> Expr:
    gauges = " ".join(f"{s.running} {s.waiting} {s.open}" for s in servers).split()
    idle = _union(f"{LATEST.format(gauge)} == 0" for gauge in gauges)
    busy = [f"{LATEST.format(gauge)} > 0" for gauge in gauges]
    asleep = (text for server in SERVERS for text in _sleeps(server))
    return _seen_twice(Operation("unless", (idle, _union([*busy, *asleep])), NOWHERE))


def _seen_twice(expr: Expr) -> Expr:
    # From one sample nothing is known, whatever the rest says of it.
    known = f"sum_over_time(up[5m]) > 1 unless ignoring (reason) {GONE}"
    both = expr, parse_expression(known)
    return Operation("and", both, Grouping(True, ("instance",)))


def with_canary(rule: Rule, labels: tuple[str, ...]) -> Rule:
    """Return a built-in rule that a canary may answer, matched on these labels."""
    clause = ANSWERED_BY_CANARY.get(rule.name)
    if not clause:
        return rule
    operands = rule.expr, parse_expression(clause)
    return rule._replace(expr=Operation("unless", operands, Grouping(True, labels)))


def servers_there(names: Iterable[str]) -> Iterator[KnownServer]:
    """Return the known servers that have one of these metrics.

    >>> [server.name for server in servers_there(["vllm:num_requests_waiting"])]
    ['vLLM']
    """
    there = set(names)
    return (server for server in SERVERS if there.intersection(own_names(server)))


def nearest_server(names: Iterable[str]) -> KnownServer | None:
    """Return the server that rules know with metrics most like these, None if none has.

    >>> nearest_server(["sglang_num_queue_reqs", "python_info"]).name
    'SGLang'
    """
    plain = [name.replace(":", "_") for name in names]
    alike = {server: _likeness(server, plain) for server in SERVERS if server.watched}
    nearest = max(alike, key=alike.__getitem__)
    return nearest if alike[nearest] else None


def _likeness(server: KnownServer, names: Iterable[str]) -> int:
    own = [name.replace(":", "_") for name in own_names(server)]
    alike = sum(any(name in other for other in names) for name in own)
    first, others = ({n.partition("_")[0] for n in some} for some in (own, names))
    return 2 * alike or not first.isdisjoint(others)


def port_conflict(port: int, servers: Iterable[KnownServer] = ()) -> str:
    """Return which of some servers, or of all, need a port of their own; mostly none.

    >>> port_conflict(8081), port_conflict(8000)
    ('APP_PORT=8081 is a port of MLServer or TorchServe or KServe: set another', '')
    """
    names = [s.name for s in servers or SERVERS if str(port) in s.ports.split()]
    text = f"APP_PORT={port} is a port of {' or '.join(names)}: set another"
    return text if names else ""


def drain_expression(
    expressions: Iterable[Expr], labels: Container[str] = ()
) -> Expr | None:
    """Return what gives the requests that run or wait, of servers that have gauges.

    None if these expressions read no such server's: what they read costs nothing more.

    >>> rules = [parse_expression("tgi_queue_size + tgi_batch_current_size")]
    >>> print(format_expression(drain_expression(rules)))
    tgi_queue_size > 0 or tgi_batch_current_size > 0
    """
    names = lookbacks(expressions).keys()
    found = [
        text for text in map(_in_flight, SERVERS)
        if text and lookbacks([parse_expression(text)]).keys() <= names
    ]  # fmt: skip
    return renamed(parse_expression(" or ".join(found)), labels) if found else None


def _in_flight(server: KnownServer) -> str:
    gauges = f"{server.waiting} {server.running} {server.open}".split()
    if not server.running:
        return ""
    # A sole gauge that counts the scrape itself is corrected for the queue.
    if server.queue and not server.waiting:
        return f"({server.queue}) > 0"
    return " or ".join(f"{name} > 0" for name in dict.fromkeys(gauges))


@lru_cache(maxsize=None)
def own_names(server: KnownServer) -> frozenset[str]:
    """Return the metrics by which a server is known."""
    fields = server.waiting, server.running, server.moving, server.prefill, server.own
    names = re.sub(r"\{[^}]*\}", "", " ".join(fields)).split()
    return frozenset((*names, *server.known_by.split()))


def _union(texts: Iterable[str]) -> Expr:
    return _union_of(tuple(dict.fromkeys(filter(None, texts))))


@lru_cache(maxsize=64)
def _union_of(texts: tuple[str, ...]) -> Expr:
    exprs = map(parse_expression, texts)
    return reduce(lambda left, right: Operation("or", (left, right)), exprs)


def _queue_full(server: KnownServer, limit: str) -> str:
    kept = (f"last_over_time({name}[1m])" for name in server.waiting.split())
    queue = server.queue or " or ".join(kept)
    return f"({queue}) > {limit}" if queue else ""


def _stuck(server: KnownServer, _: str) -> str:
    gauges = f"{server.running} {server.waiting}"
    standing = _standing(server, gauges, server.match), _standing(server, server.open)
    stuck = server.stuck or " or ".join(filter(None, standing))
    stuck += _unless("ignoring (pid, sleep_state)", _sleeps(server))
    return stuck and f"({stuck}){_only_with(server.beside)}"


def _standing(server: KnownServer, gauges: str, match: str = "on (instance)") -> str:
    names = dict.fromkeys(gauges.split()) if server.moving else ()
    busy = " or ".join(f"{LATEST.format(name)} > 0" for name in names)
    return busy and f"({busy}){_unless(match, _changed(server, MOVED))}"


def _unanswered(server: KnownServer, _: str) -> str:
    if not server.abandoned:
        return ""
    # What moved counts for longer, so that a scrape may come between it and the end.
    moved = _changed(server, "changes({}[2m10s]) > 0", server.accepted)
    ended = f"sum by (instance) (increase({server.abandoned}[1m10s])) > 1.5"
    quiet = _unless("on (instance)", [*moved, *_sleeps(server)])
    two = _counted(server.abandoned, "1m10s", 2)
    return f"{ended}{quiet}{two}{_only_with(server.own)}"


def _failing(server: KnownServer, _: str) -> str:
    ended = "sum by (instance) (increase({}[4m30s]))"
    failed, answered = map(ended.format, (server.failed, server.answered))
    three = f"{_counted(server.failed, '4m30s', 3)}{_only_with(server.own)}"
    return server.failed and f"{failed} >= 3 unless {answered} > 0{three}"


def _counted(name: str, window: str, least: int) -> str:
    # Where few samples are in the window increase() makes two requests of one.
    ended = f"{LATEST.format(name)} - min_over_time({name}[{window}])"
    return f" and sum by (instance) ({ended}) >= {least}"


def _changed(server: KnownServer, form: str, more: str = "") -> list[str]:
    names = f"{server.moving} {server.prefill} {more}".split()
    return [form.format(name) for name in dict.fromkeys(names)]


def _unless(match: str, texts: Iterable[str]) -> str:
    # One after the other: mostly the first tells, and the others cost nothing then.
    return "".join(f" unless {match} {text}" for text in texts)


def _sleeps(server: KnownServer) -> list[str]:
    return [f"{LATEST.format(server.asleep)} == 0"] if server.asleep else []


def _only_with(own: str) -> str:
    return f" and on (instance) {LATEST.format(own)}" if own else ""


BUILTIN: dict[str, tuple[str, Callable[[KnownServer, str], str]]] = {
    "QueueFull": ("for 30s keep_firing_for 30s", _queue_full),
    # Since the sample before: 90 s at a check each 10 s.
    "Stalling": ("for 80s", _stuck),
    "Stalled": ("for 5m", _stuck),
    # It ends with the last client, and nobody comes to a pod that is not ready.
    "Unanswered": ("keep_firing_for 10m", _unanswered),
    # With what it looks back, five minutes.
    "Failing": ("for 30s", _failing),
    "NoModel": ("for 30s keep_firing_for 30s", lambda server, _: server.no_model),
    "Down": ("", lambda server, _: DOWN),
    "NotServing": ("", lambda server, _: NOT_SERVING),
    # At least two failures, as one is repeated within a minute.
    "Unresponsive": ("for 2m", lambda server, _: 'probe_success{probe="canary"} == 0'),
}
# Those that fire while nothing moves.
HUNG = ("Stalling", "Stalled")
# When each fires, for people.
ABOUT = {
    "QueueFull": "when too many requests wait",
    **dict.fromkeys(HUNG, "when requests run or wait and nothing moves"),
    "Unanswered": "when requests end and nothing moves",
    "Failing": "when three or more have failed within 5m and none was answered",
    "NoModel": "when no model, or no worker that works, is there",
    "Down": "when a scrape fails; a timeout counts once it has lasted 30s",
    "NotServing": "when the server's own health route fails; a timeout counts once it"
                  " has lasted 30s",
    "Unresponsive": "when the canary is not answered",
}  # fmt: skip
# Gauges that stand still on a sound engine are no stall, and the server counts a canary
# that gave up as a client that did.
ANSWERED_BY_CANARY = {
    **dict.fromkeys(HUNG, 'probe_success{probe="canary"} == 1'),
    "Unanswered": 'count_over_time(probe_error{probe="canary"}[2m10s])',
}


def _like_vllm(prefix: str, name: str, at: str, seen: str, **more: str) -> KnownServer:
    """Return the row of a server that has vLLM's names behind a prefix of its own."""
    prefill = "prompt_tokens_total", "kv_cache_usage_perc", "gpu_cache_usage_perc"
    names = {
        "waiting": f"{prefix}num_requests_waiting",
        "running": f"{prefix}num_requests_running",
        "moving": f"{prefix}generation_tokens_total",
        "prefill": " ".join(prefix + name for name in prefill),
        "match": "ignoring (pid)",
    }
    return KnownServer(name, at, seen, **{**names, **more})


def _alive(gauge: str) -> str:
    """Return what gives a gauge, unless it has stood still for ten minutes."""
    stale = f"changes({gauge}[10m]) == 0 and last_over_time({gauge}[1m] offset 9m)"
    return f"last_over_time({gauge}[1m]) unless ({stale})"


def _ended(series: str) -> dict[str, str]:
    """Return how requests end, ``#`` being the first digit of their status."""
    return {"answered": series.replace("#", "2"), "failed": series.replace("#", "5")}


_VLLM_ENDED = f'http_requests_total{{handler=~"{GENERATE}",status="#xx"}}'
_BENTOML_RUNNING = f'bentoml_service_request_in_progress{{endpoint!~"{PROBES}"}}'
_TRITON = "nv_inference_"
_LITELLM = "litellm_proxy_total_requests_metric_total"

SERVERS: tuple[KnownServer, ...] = (
    _like_vllm(
        "vllm:", "vLLM", ":8000/metrics", "0.7, 0.26, 0.32, run",
        remark="not with --disable-log-stats; nothing tells of a hang while it is idle"
               " until two clients have given up",
        **_ended(_VLLM_ENDED), abandoned=_VLLM_ENDED.replace("#", "2"),
        accepted="vllm:prefix_cache_queries_total", own="vllm:prompt_tokens_total",
        asleep='vllm:engine_sleep_state{sleep_state="awake"}',
    ),
    _like_vllm("ray_vllm:", "vLLM in Ray", ":8080/metrics", "2.32, a captured page"),
    _like_vllm("ray_vllm_", "vLLM in Ray 2.4x", ":8080/metrics", "2.60, source"),
    KnownServer(
        "SGLang", ":30000/metrics", "0.5.23, run", "with --enable-metrics",
        waiting="sglang:num_queue_reqs", running="sglang:num_running_reqs",
        moving="sglang:realtime_tokens_total", prefill="sglang:token_usage",
        match="ignoring (mode, pid, priority)",
        # The prefill of a sole request shows only here.
        open=f'sglang:http_requests_active{{endpoint=~"{GENERATE}|/generate"}}',
        **_ended(f'sglang:http_responses_total{{endpoint=~"{GENERATE}|/generate",'
                 'status_code=~"#.."}'),
        abandoned="sglang:num_aborted_requests_total",
        known_by="sglang:scheduler_idle_seconds_total",
    ),
    KnownServer(
        "TGI", ":80/metrics", "3.3, source",
        "nothing moves within one step of a long prefill",
        waiting="tgi_queue_size", running="tgi_batch_current_size",
        moving="tgi_batch_inference_success tgi_batch_inference_count",
        answered="tgi_request_success",
        failed='tgi_request_failure{err!~"overloaded|template|validation"}',
    ),
    KnownServer(
        "llama-server", ":8080/metrics", "b11434, run",
        "with --metrics; counters above a million have six digits, and seem to stand",
        waiting="llamacpp:requests_deferred", running="llamacpp:requests_processing",
        moving="llamacpp:n_decode_total llamacpp:tokens_predicted_total",
        prefill="llamacpp:prompt_tokens_total",
    ),
    # Others have these names, and no counter of tokens.
    _like_vllm("", "NIM", ":8000/v1/metrics", "1.x, a captured page",
               beside="generation_tokens_total"),
    KnownServer(
        "Triton", ":8002/metrics", "pytriton 0.7, run",
        "an execution longer than 5 minutes, with others waiting, is taken for a stall;"
        " a request that hangs alone shows nowhere",
        waiting=f"{_TRITON}pending_request_count",
        moving=f"{_TRITON}exec_count {_TRITON}request_success",
        match="ignoring (gpu_uuid)", answered=f"{_TRITON}request_success",
        failed=f'{_TRITON}request_failure{{reason!~"CANCELED|REJECTED"}}',
    ),
    KnownServer(
        "Triton, TensorRT-LLM", ":8002/metrics", "25.x, documentation",
        waiting='nv_trt_llm_request_metrics{request_type="waiting"}',
        running='nv_trt_llm_request_metrics{request_type="active"}',
        moving='nv_trt_llm_general_metrics{general_type="iteration_counter"}',
        match="ignoring (general_type, request_type)",
    ),
    KnownServer(
        "Triton, TensorRT-LLM 23.11", ":8002/metrics", "documentation",
        running='nv_trt_llm_request_statistics{request_type="active"}',
        moving='nv_trt_llm_general_statistics{general_type="iteration_counter"}',
        match="ignoring (general_type, request_type)",
    ),
    KnownServer(
        "trtllm-serve", ":8000/prometheus/metrics", "1.x, source",
        "with return_perf_metrics and enable_iter_perf_stats",
        waiting="trtllm_num_requests_waiting", running="trtllm_num_requests_running",
        moving="trtllm_kv_cache_gen_alloc_blocks_total trtllm_iteration_latency_seconds"
               " trtllm_num_requests_completed_total",
        prefill="trtllm_kv_cache_utilization",
    ),
    _like_vllm(
        "lmdeploy:", "LMDeploy", ":23333/metrics", "0.18, rendered by its own module",
        waiting="lmdeploy:num_requests_waiting lmdeploy:num_api_requests_waiting",
        running="lmdeploy:num_requests_running lmdeploy:num_api_requests_routed",
        moving="lmdeploy:generation_tokens_total lmdeploy:iteration_tokens_total_count",
        queue="last_over_time(lmdeploy:num_requests_waiting[1m])"
              " + last_over_time(lmdeploy:num_api_requests_waiting[1m])"
              " or last_over_time(lmdeploy:num_requests_waiting[1m])",
    ),
    KnownServer(
        "Dynamo frontend", ":8000/metrics", "1.6.1, run",
        "a prefill shows nowhere; a restart of it mends no worker",
        waiting="dynamo_frontend_queued_requests",
        running="dynamo_frontend_inflight_requests",
        moving="dynamo_frontend_output_tokens_total"
               " dynamo_frontend_output_sequence_tokens_sum",
        stuck="last_over_time(dynamo_frontend_inflight_requests[2m10s])"
              " - last_over_time(dynamo_frontend_queued_requests[2m10s]) > 0"
              " unless (idelta(dynamo_frontend_output_tokens_total[5m]) != 0"
              " or idelta(dynamo_frontend_output_sequence_tokens_sum[5m]) != 0)",
        answered='dynamo_frontend_requests_total{status="success"}',
        failed='dynamo_frontend_requests_total{status="error",error_type!~'
               '"validation|not_found|overload|cancelled|not_implemented"}',
        # Frontends before 1.5 have neither of the two last.  Where a scrape fails what
        # was there just before is.
        no_model="last_over_time(dynamo_frontend_disconnected_clients[25s])"
                 " and on (instance)"
                 " (last_over_time(dynamo_tokio_queue_overload_warnings_total[25s])"
                 " or max_over_time(dynamo_frontend_model_ready[1h]))"
                 " unless on (instance) (dynamo_frontend_model_ready > 0"
                 " or last_over_time(dynamo_frontend_model_ready[25s]) > 0"
                 " and on (instance) scrape_error)",
    ),
    KnownServer(
        "Dynamo worker", ":9090/metrics", "1.6.1, run",
        "the names of its engine stand on the same page, and are what is asked",
        running='dynamo_component_inflight_requests{dynamo_endpoint="generate"}',
        known_by="dynamo_component_request_bytes_total",
    ),
    KnownServer(
        "MAX", ":8001/metrics", "26.7, run",
        "the port answers while the API does not; gauges vanish at times",
        # Those that wait run, too, and their own gauge is gone once none does.
        waiting="maxserve_num_requests_running",
        running="maxserve_num_requests_running",
        queue="last_over_time(maxserve_num_requests_queued[1m])",
        moving="maxserve_batch_execution_time_milliseconds_count",
        **_ended('maxserve_request_count_total{code=~"#.."}'),
        abandoned='maxserve_request_count_total{code="499"}',
        known_by="maxserve_pipeline_load_total",
    ),
    KnownServer(
        "Ray Serve", ":8080/metrics", "2.60, run",
        "replaces a replica that hangs within two minutes",
        waiting="ray_serve_deployment_queued_queries",
        running="ray_serve_num_ongoing_requests_at_replicas",
        moving="ray_serve_num_http_requests_total"
               " ray_serve_deployment_processing_latency_ms_count",
        stuck="last_over_time(ray_serve_deployment_queued_queries[2m10s]) > 0"
              " unless on (instance, application)"
              " (idelta(ray_serve_num_http_requests_total[5m]) != 0"
              " or idelta(ray_serve_deployment_processing_latency_ms_count[5m]) != 0)"
              " unless on (instance) (idelta(ray_vllm:generation_tokens_total[5m]) != 0"
              " or idelta(ray_vllm_generation_tokens_total[5m]) != 0)",
        **_ended('ray_serve_num_http_requests_total{route!="/-/healthz",'
                 'status_code=~"#.."}'),
    ),
    KnownServer(
        "smg", ":29000/metrics", "1.13, run", "a gateway: hangs on its workers",
        waiting="smg_admission_queue_depth", running="smg_worker_requests_active",
        **_ended(f'smg_http_responses_total{{path=~"{GENERATE}|/generate",'
                 'status_code=~"#.."}'),
        no_model="max by (instance) (last_over_time(smg_worker_health[1m])) == 0",
        known_by="smg_worker_health",
    ),
    KnownServer(
        "vllm-router", ":29000/metrics", "0.1.17, run",
        "a gateway: hangs on its workers", running="vllm_router_running_requests",
        answered='vllm_router_cb_outcomes_total{outcome="success"}',
        failed='vllm_router_cb_outcomes_total{outcome="failure"}',
        no_model="max by (instance)"
                 " (last_over_time(vllm_router_worker_health[1m])) == 0",
        known_by="vllm_router_worker_health",
    ),
    KnownServer(
        "mosec", ":8000/metrics", "0.9.8, run",
        "a request longer than 5 minutes is taken for a stall; waiting has the running",
        waiting="mosec_service_remaining_task", running="mosec_service_remaining_task",
        moving='mosec_service_process_duration_second_count{stage="total"}',
        answered='mosec_service_throughput_total{code=~"2.."}',
        # Its own timeout: the only sign of a worker that hangs.
        failed='mosec_service_throughput_total{code=~"408|5.."}',
    ),
    KnownServer(
        "BentoML", ":3000/metrics", "1.4.40, run",
        "what a worker had when it was killed stays in its gauge: a stall is seen only"
        " while more requests come",
        waiting=_BENTOML_RUNNING, running=_BENTOML_RUNNING,
        queue=_alive(_BENTOML_RUNNING),
        moving="bentoml_service_request_total",
        stuck=f"delta({_BENTOML_RUNNING}[2m10s]) > 0"
              " unless on (instance, service_name, endpoint)"
              " changes(bentoml_service_request_total[2m10s]) > 0",
        **_ended(f'bentoml_service_request_total{{endpoint!~"{PROBES}",'
                 'http_response_code=~"#.."}'),
    ),
    KnownServer(
        "MLServer", ":8082/metrics", "1.7.1, run",
        "a request longer than 5 minutes is taken for a stall; 8081 is its gRPC port",
        waiting='rest_server_requests_in_progress{method="POST"}',
        running='rest_server_requests_in_progress{method="POST"}',
        moving="model_infer_request_duration_count",
        **_ended('rest_server_requests_total{method="POST",status_code=~"#.."}'),
        own="model_infer_request_duration_count", ports="8080 8081",
    ),
    KnownServer(
        "TorchServe", ":8082/metrics", "0.12, run",
        "with metrics_mode=prometheus; has no gauge of requests: a stall is seen only"
        " while more come; 8081 is its management port",
        moving="ts_inference_latency_microseconds", own="ts_inference_requests_total",
        known_by="WorkerLoadTime",
        stuck="changes(ts_inference_requests_total[2m10s]) > 0"
              " unless changes(ts_inference_latency_microseconds[2m10s]) > 0",
        answered="ts_inference_latency_microseconds", failed="Requests5XX",
        ports="7070 7071 8080 8081",
    ),
    KnownServer(
        "LiteLLM", ":4000/metrics", "1.106, run",
        'with callbacks: ["prometheus"]; a proxy; who has left counts until answered',
        running="litellm_in_flight_requests", moving=_LITELLM,
        queue="last_over_time(litellm_in_flight_requests[1m]) - 1",
        # The scrape counts as one.
        stuck="last_over_time(litellm_in_flight_requests[2m10s]) > 1 unless on"
              f" (instance) (idelta({_LITELLM}[5m]) != 0"
              f" or count_over_time({_LITELLM}[5m]) == 1)",
        **_ended(f'{_LITELLM}{{status_code=~"#.."}}'),
    ),
    KnownServer(
        "Xinference", ":9998/metrics", "4.1, run",
        "the exporter's port; what a model had when it was killed stays in its gauge: a"
        " stall is seen only while more requests come",
        waiting="xinference:model_serve_count", running="xinference:model_serve_count",
        queue=_alive("xinference:model_serve_count"),
        moving="xinference:model_request_total",
        stuck="delta(xinference:model_serve_count[2m10s]) > 0"
              " unless on (instance, model_uid, replica_index)"
              " changes(xinference:model_request_total[2m10s]) > 0",
    ),
    _like_vllm("gpustack:", "gpustack worker", ":10151/metrics", "2.3, source"),
    KnownServer(
        "OpenVINO Model Server", ":8000/metrics", "documentation",
        "has no gauge of what waits; a request longer than 5 minutes is taken for a"
        " stall", running="ovms_current_requests", moving="ovms_requests_success",
        match="on (instance, name)",
    ),
    KnownServer(
        "TEI", ":80/metrics", "1.x, a captured page",
        waiting="te_queue_size",
        moving="te_request_success te_embed_success te_predict_success",
    ),
    KnownServer(
        "KServe", ":8080/metrics", "0.21, run",
        "has no gauge of requests, and no rule; KServe's Hugging Face server has vLLM's"
        " names; 8081 is its gRPC port", known_by="request_predict_seconds_count",
        ports="8080 8081",
    ),
    KnownServer(
        "Infinity", ":7997/metrics", "0.0.78, run",
        "has no gauge of requests, and no rule: canary",
    ),
    KnownServer(
        "LitServe", ":8000/metrics", "0.2.19, run",
        "has no metrics but those of its user, and no rule: canary",
    ),
)


# --- 7. Settings: the text of a variable -> its value --------------------------------

GO_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_GO_PART = r"(?a)(\d{1,12}(?:\.\d{0,12})?|\.\d{1,12})(ms|us|ns|h|m|s)"
# Labels of what scrapes and probes add, and parts of a histogram and of a summary.
ADDED_LABELS = ("reason", "probe", "le", "quantile")
DEFAULT_PORTS = {"http": 80, "https": 443}
ALERTS_API = "/api/v2/alerts"
# With these a failure has happened twice before Unresponsive fires, see the rule.
LEAST_CANARY_AFTER, MOST_CANARY_TIMEOUT = 120.0, 60.0


class ConfigError(ValueError):
    """One or more settings are wrong; the text has a line for each."""


class Credentials(NamedTuple):
    """What a server may ask for before it answers; each is a path or empty."""

    token_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    skip_verify: bool = False


class Target(NamedTuple):
    """Whom to ask; all from ``query`` on is for the target's eyes."""

    instance: str
    url: str
    query: str = ""
    authorization: str = ""
    credentials: Credentials = Credentials()

    @property
    def address(self) -> str:
        """The URL with the query."""
        return f"{self.url}?{self.query}" if self.query else self.url


class Setting(NamedTuple):
    """An environment variable; its parser raises ValueError with what it expects."""

    name: str
    parse: Callable[[str], Any]
    default: str
    help: str


def parse_target(url: str) -> Target:
    """Return what a URL of HTTP or HTTPS names; ValueError if it is none.

    >>> parse_target("http://localhost/metrics").instance
    'localhost:80'
    """
    try:
        parts = urllib.parse.urlsplit(url)
        default = DEFAULT_PORTS[parts.scheme]
        port = default if parts.port is None else parts.port
        host = parts.hostname or "?"
        # Two URLs are parted by a comma, and by nothing else.
        odd = re.search(r"[^!-~]|://[^?]*://", url) or re.search(r"[^\w.:%-]", host)
        if not port or parts.fragment or odd:
            raise ValueError(url)
    except (ValueError, KeyError):
        raise ValueError("expected a URL as in http://localhost:8000/metrics") from None
    host = f"[{host}]" if ":" in host else host
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path or '/'}"
    return Target(f"{host}:{port}", address, parts.query, _basic(parts))


def parse_port(text: str) -> int:
    """Return the number of a port; ValueError if it is none."""
    if not re.match(r"\d{1,5}\Z", text, re.ASCII) or int(text) > 65535:
        raise ValueError("expected a port number from 0 (any free one) to 65535")
    return int(text)


def parse_vector(text: str) -> Expr:
    """Return an expression that gives an instant vector.

    Raises PromQLError, or ConfigError for another type.
    """
    expr = parse_expression(text)
    if type_of(expr) != VECTOR:
        raise ConfigError(f"expected an {VECTOR}, this is a {type_of(expr)}")
    return expr


def _items(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if text and not items:
        raise ValueError("expected more than commas")
    return items


def _endpoints(text: str) -> tuple[Target, ...]:
    targets = tuple(map(parse_target, _items(text)))
    instances = [target.instance for target in targets]
    twice = {instance for instance in instances if instances.count(instance) > 1}
    if twice:
        raise ValueError(f"expected each URL once, not so {', '.join(sorted(twice))}")
    return targets


def _basic(parts: urllib.parse.SplitResult) -> str:
    # RFC 7617 section 2.
    if parts.username is None:
        return ""
    user = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
    return "Basic " + base64.b64encode(user.encode()).decode()


def _builtin_names(text: str) -> tuple[str, ...]:
    names = tuple(_items(text))
    for name in names:
        if name not in BUILTIN:
            raise ValueError(f"{name} is no built-in rule: {', '.join(BUILTIN)}")
    return names


def _rule_names(text: str) -> tuple[str, ...]:
    names = tuple(_items(text))
    if not all(RULE_NAME.match(f"{name}:") for name in names):
        raise ValueError("expected names of rules as in Stalled,Unresponsive")
    return names


def _canary_body(text: str) -> bytes:
    body = None
    with suppress(ValueError, RecursionError):
        body = json.loads(text or "{}")
    if not isinstance(body, dict) or body.get("stream"):
        raise ValueError("expected a JSON object, without stream")
    return text.encode()


def _alertmanagers(text: str) -> tuple[Target, ...]:
    found: dict[str, Target] = {}
    for target in map(parse_target, _items(text)):
        url = re.sub(rf"(?:{ALERTS_API})?/*\Z", ALERTS_API, target.url, count=1)
        if target.authorization:
            raise ValueError("expected no user: use ALERTMANAGER_BEARER_TOKEN_FILE")
        if url in found:
            raise ValueError(f"expected each URL once, but {url} is there twice")
        found[url] = target._replace(url=url)
    return tuple(found.values())


def _label_pairs(taken: Sequence[str], text: str) -> Labels:
    pairs: dict[str, str] = {}
    for item in _items(text):
        name, value = _label_pair(item)
        if name in (*pairs, "instance", *taken) or name.startswith("__"):
            raise ValueError(f"the label {name} is set already")
        pairs[name] = value
    return tuple(sorted(pair for pair in pairs.items() if pair[1]))


def _label_pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if "{{" in item:
        raise ValueError("expected fixed values: templates are not expanded here")
    # An operator, labels that a blank or a semicolon parts, half a pair of quotes.
    wrong = re.match(r"[=~]|.*[\s;]\w+=", value) or value.count('"') % 2
    if wrong or not equals or not re.match(r"[a-zA-Z_]\w*\Z", name, re.ASCII):
        raise ValueError("expected labels as in job=vllm,namespace=prod")
    return name, value.strip().strip('"')


def _finite(text: str) -> float:
    if not math.isfinite(float_or_nan(text)):
        raise ValueError("expected a finite number as in 10 or 0.95")
    return parse_float(text)


def _optional(parse: Callable[[str], T], text: str) -> T | None:
    return parse(text) if text else None


def _duration(least: float, most: float, text: str) -> float:
    with suppress(ValueError):
        seconds = _go_duration(text)
        if least <= seconds <= most:
            return seconds
    low, high = format_duration(least), format_duration(most)
    raise ValueError(f"expected {low} to {high}, as in 0.8, 0.8s or 500ms")


def _go_duration(text: str) -> float:
    # Who writes manifests knows time.ParseDuration of Go: fractions have units, too.
    parts = re.findall(_GO_PART, text)
    if not parts or "".join(map("".join, parts)) != text:
        return parse_duration(text)
    return sum(float(number) * GO_UNITS[unit] for number, unit in parts)


def _one_of(choices: Sequence[str], text: str) -> str:
    if text.lower() not in choices:
        raise ValueError(f"expected one of {', '.join(choices)}")
    return text.lower()


def _bytes(text: str) -> int:
    match = re.match(r"(\d{1,12})(|Ki|Mi|Gi)\Z", text, re.ASCII)
    powers = {"": 0, "Ki": 10, "Mi": 20, "Gi": 30}
    size = int(match[1]) << powers[match[2]] if match else 0
    if not 1 << 20 <= size <= 1 << 32:
        raise ValueError(f"expected bytes from 1Mi to 4Gi, not {text!r}")
    return size


def _flag(text: str) -> bool:
    return _one_of(("true", "false"), text) == "true"


LEVELS, FORMATS = ("debug", "info", "warning", "error"), ("text", "json")
SETTINGS = tuple(itertools.starmap(Setting, (
    ("METRICS_ENDPOINT", _endpoints, "http://localhost:8080/metrics",
     "URL of the metrics, or several, separated by commas"),
    ("METRICS_BEARER_TOKEN_FILE", str, "", "file of a token, read at each scrape"),
    ("METRICS_CA_FILE", str, "", "certificates to trust instead of the system's"),
    ("METRICS_CERT_FILE", str, "", "certificate to show to the metrics server"),
    ("METRICS_KEY_FILE", str, "", "its key, if that is in a file of its own"),
    ("METRICS_TLS_SKIP_VERIFY", _flag, "false", "true: trust any certificate"),
    ("TARGET_LABELS", partial(_label_pairs, ADDED_LABELS), "",
     "labels for every series, as in job=vllm,namespace=prod"),
    ("METRIC_TO_CHECK", partial(_optional, parse_vector), "",
     "metric, or any PromQL expression, that may not exceed METRIC_THRESHOLD"),
    ("METRIC_THRESHOLD", partial(_optional, _finite), "",
     "highest healthy value; without METRIC_TO_CHECK that of the default rules"),
    ("METRICS_THRESHOLD", partial(_optional, _finite), "",
     "another spelling of METRIC_THRESHOLD"),
    ("UNHEALTHY_WHEN", parse_rules, "",
     "rules, one a line: [Name: ] EXPR [for DURATION] [keep_firing_for DURATION]"),
    ("WITHOUT_RULES", _builtin_names, "",
     "built-in rules to leave out, separated by commas"),
    ("HEALTH_ENDPOINT", _endpoints, "",
     "URL of the server's own health route, or several, asked beside each scrape"),
    ("CANARY_URL", partial(_optional, parse_target), "",
     "URL to ask for one token when no metric tells: http://HOST/v1/completions"),
    ("CANARY_BODY", _canary_body, "",
     "JSON to send there; by default a prompt with max_tokens 1"),
    ("CANARY_TIMEOUT", partial(_duration, 0.01, MOST_CANARY_TIMEOUT), "30",
     "seconds until it has failed"),
    ("CANARY_AFTER", partial(_duration, LEAST_CANARY_AFTER, 86400.0), "5m",
     "time without anything that moves, and between two that succeed"),
    ("CANARY_BEARER_TOKEN_FILE", str, "", "file of a token for it"),
    ("CANARY_WHEN", parse_rules, "",
     "EXPR [for DURATION] that asks for it, where the server is not a known one"),
    ("EXIT_WHEN", _rule_names, "",
     "rules at which to exit with 88, which restarts a pod of Kubernetes 1.36"),
    ("EXIT_AFTER", partial(_duration, 0.0, 86400.0), "10m",
     "time from the start in which it does not exit so"),
    ("LAST_WORDS", str, "",
     "file that has the reason then; /dev/termination-log where there is one"),
    ("DRAIN_TIMEOUT", partial(_duration, 0.1, 3600.0), "25",
     "seconds that /drain waits; keep it below the grace period of the pod"),
    ("DRAIN_WHILE", partial(_optional, parse_vector), "",
     "expression that gives what still runs or waits, where the server is not known"),
    ("ALERTMANAGER_URL", _alertmanagers, "",
     "URL of an Alertmanager, or several, each of which gets every alert"),
    ("ALERT_LABELS", partial(_label_pairs, ("alertname",)), "",
     "labels of alerts, as in severity=critical"),
    ("ALERTMANAGER_BEARER_TOKEN_FILE", str, "", "file of a token for it"),
    ("ALERTMANAGER_CA_FILE", str, "", "certificates to trust for it"),
    ("POD_NAME", str, "", "label pod of alerts; the host name if unset"),
    ("APP_PORT", parse_port, "8081", "port to answer on"),
    ("APP_HOST", str, "", "address to answer on; all addresses if unset"),
    ("METRICS_TIMEOUT", partial(_duration, 0.01, 60.0), "0.8",
     "seconds for a whole scrape; keep it below the timeout of the probe"),
    ("SCRAPE_INTERVAL", partial(_duration, 0.0, 3600.0), "0",
     "seconds between checks, to answer from memory; 0 checks on each request"),
    ("HISTORY_LIMIT", _bytes, "16Mi",
     "bytes that the remembered series may take, as in 16Mi"),
    ("LOG_LEVEL", partial(_one_of, LEVELS), "info", ", ".join(LEVELS)),
    ("LOG_FORMAT", partial(_one_of, FORMATS), "text", ", ".join(FORMATS)),
)))  # fmt: skip


# --- 8. Config: environ -> Config ----------------------------------------------------

DEFAULT_THRESHOLD = 10.0
MAX_VALUE_SHOWN = 60
# A variable that begins so is meant for this program.
OWN_PREFIXES = (
    "METRIC_", "METRICS_", "UNHEALTHY_", "SCRAPE_", "ALERTMANAGER_", "CANARY_",
    "EXIT_",
)  # fmt: skip
SHOWN_VALUES = 16
# A setting of such a name is a URL, which may hold a secret.
SECRET = ("_ENDPOINT", "_URL")
# What Kubernetes sets APP_PORT to where there is a Service named app.
SERVICE_LINKS = ("tcp://", "udp://", "sctp://")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
# Settings that change what another one asks for.
BESIDE = {
    "EXIT_AFTER": "EXIT_WHEN", "LAST_WORDS": "EXIT_WHEN",
    "ALERT_LABELS": "ALERTMANAGER_URL", "ALERTMANAGER_CA_FILE": "ALERTMANAGER_URL",
    "ALERTMANAGER_BEARER_TOKEN_FILE": "ALERTMANAGER_URL",
}  # fmt: skip
# Seconds; what is longer may be milliseconds.
MAX_INTERVAL = 300.0
# What Prometheus records of itself, which no target serves.
NEVER_THERE = {
    "ALERTS": "Prometheus keeps it of its own alerts; write what the alert asks",
    "ALERTS_FOR_STATE": "Prometheus keeps it of its own alerts; use 'for'",
    "scrape_samples_post_metric_relabeling":
        "nothing is relabeled here; use scrape_samples_scraped",
    "scrape_series_added": "new series are not counted here",
    "scrape_sample_limit": "the limit is the same for all targets",
    "scrape_timeout_seconds": "METRICS_TIMEOUT is the same for all targets",
}  # fmt: skip
Given = Mapping[str, str]
Values = Mapping[str, Any]


class Config(NamedTuple):
    """The settings, each by its name in lower case, and the rules they make.

    ``given`` has the text of those that are set, but of URLs, which may hold a secret.
    """

    metrics_endpoint: tuple[Target, ...]
    metrics_bearer_token_file: str
    metrics_ca_file: str
    metrics_cert_file: str
    metrics_key_file: str
    metrics_tls_skip_verify: bool
    target_labels: Labels
    metric_to_check: Expr | None
    metric_threshold: float | None
    metrics_threshold: float | None
    unhealthy_when: tuple[Rule, ...]
    without_rules: tuple[str, ...]
    health_endpoint: tuple[Target, ...]
    canary_url: Target | None
    canary_body: bytes
    canary_timeout: float
    canary_after: float
    canary_bearer_token_file: str
    canary_when: tuple[Rule, ...]
    exit_when: tuple[str, ...]
    exit_after: float
    last_words: str
    drain_timeout: float
    drain_while: Expr | None
    alertmanager_url: tuple[Target, ...]
    alert_labels: Labels
    alertmanager_bearer_token_file: str
    alertmanager_ca_file: str
    pod_name: str
    app_port: int
    app_host: str
    metrics_timeout: float
    scrape_interval: float
    history_limit: int
    log_level: str
    log_format: str
    given: Given
    rules: tuple[Rule, ...] = ()
    warnings: tuple[str, ...] = ()


def load_config(environ: Mapping[str, str]) -> Config:
    """Return the configuration that an environment asks for; an empty value is unset.

    Raises ConfigError with all that is wrong.
    """
    given = {name: text.strip() for name, text in environ.items() if text.strip()}
    warnings = [*_misspelt(given), *_doubtful(given)]
    if given.get("APP_PORT", "").startswith(SERVICE_LINKS):
        warnings.append("APP_PORT is Kubernetes' link to a Service named app: ignored")
        del given["APP_PORT"]
    values, problems = _parsed(given)
    for check in (
        _threshold_problems, _rule_problems, _scrape_problems, _port_problems,
        _canary_problems, _hopeless,
    ):  # fmt: skip
        problems += check(given, values)
    if problems:
        raise ConfigError("\n".join(problems + warnings))
    plain = (s.name for s in SETTINGS if not s.name.endswith(SECRET))
    values["given"] = {name: given[name] for name in plain if name in given}
    config = Config(**values, warnings=tuple(warnings))
    return _with_rules(_with_credentials(config))


def hopeless(
    expr: Expr, added: Mapping[str, Sequence[Labels]], own: Labels
) -> Iterator[str]:
    """Yield why an expression can never be answered, or one of its selectors.

    ``added`` has the series that come with scrapes and probes, ``own`` TARGET_LABELS.

    >>> up = parse_expression('up{job="vllm"} == 0')
    >>> print(*hopeless(up, {"up": [(("pod", "a"),)]}, (("pod", "a"),)))
    no target has up{job="vllm"}: it has no label job: set TARGET_LABELS=pod=a,job=vllm
    """
    for selector in dict.fromkeys(Selector(*s[:2]) for s in find_selectors(expr)):
        text, possible = format_expression(selector), added.get(selector.name)
        if selector.name in NEVER_THERE:
            yield f"{text} is never there: {NEVER_THERE[selector.name]}"
        fault = find_fault(selector.matchers, possible, own) if possible else ""
        if fault:
            yield f"no target has {text}: {fault}"
    yield from unholdable([expr])


def find_fault(
    matchers: Sequence[Matcher], series: Iterable[Labels], own: Labels
) -> str:
    """Return which label keeps matchers from all of these series, empty if none does.

    >>> find_fault((Matcher("job", "=", "a"),), [(("job", "b"),)], (("job", "b"),))
    'it has job="b", by TARGET_LABELS'
    """
    known = list(map(dict, series))
    met = [{m for m in matchers if matches(m, one.get(m.label, ""))} for one in known]
    if set(matchers) in met:
        return ""
    wrong = sorted(set(matchers).difference(*met))
    return _fault(wrong[0], known, own) if wrong else "it has not all labels at once"


def _fault(matcher: Matcher, known: Iterable[dict[str, str]], own: Labels) -> str:
    label, op, text = matcher
    values = sorted({series.get(label, "") for series in known} - {""})
    if values:
        by = "METRICS_ENDPOINT" if label == "instance" else "TARGET_LABELS"
        by = f", by {by}" if label in ("instance", *dict(own)) else ""
        shown = ", ".join(f"{label}={quote(v)}" for v in values[:SHOWN_VALUES])
        return f"it has {shorten(shown)}{by}"
    text = text if op[0] == "=" and re.match(r"[\w./-]+\Z", text, re.ASCII) else "..."
    pairs = ",".join(f"{name}={value}" for name, value in (*own, (label, text)))
    setting = "" if label in ADDED_LABELS else f": set TARGET_LABELS={pairs}"
    return f"it has no label {label}{setting}"


def added_series(values: Values) -> dict[str, list[Labels]]:
    """Return the series that scrapes and probes can add, without their names, by name.

    ``values`` are those of the settings by their names in lower case.
    """
    own, canary = values["target_labels"], values.get("canary_url")
    asked = [("health", target) for target in values.get("health_endpoint", ())]
    asked += [("canary", canary)] if canary else []
    probes = [(*own, ("instance", t.instance), ("probe", kind)) for kind, t in asked]
    # The reasons of probe_error are the server's too.
    found = {name: probes for name in PROBED if name != "probe_error"}
    for name, more in SYNTHETIC.items():
        targets = (("instance", t.instance) for t in values["metrics_endpoint"])
        each = itertools.product(targets, more)
        found[name] = [(*own, instance, *pairs) for instance, pairs in each]
    return found


def missing_files(config: Config) -> Iterator[str]:
    """Yield a line for each file of the settings that cannot be read now."""
    for name in (s.name for s in SETTINGS if s.name.endswith("_FILE")):
        path = getattr(config, name.lower())
        # Without opening it: another end of a pipe might be waited for.
        if path and (os.path.isdir(path) or not os.access(path, os.R_OK)):  # noqa: PTH112
            yield f"{name}={path}: there is no such file, or it cannot be read"


def _parsed(given: Given) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems = []
    for name, parse, default, _ in SETTINGS:
        text = given.get(name, default)
        try:
            values[name.lower()] = parse(text)
        except ValueError as error:
            problems.append(f"{name}={_shown(name, text)}: {error}")
    return values, problems


def _threshold_problems(given: Given, values: Values) -> Iterator[str]:
    limits = [n for n in ("METRIC_THRESHOLD", "METRICS_THRESHOLD") if n in given]
    if len({values.get(name.lower()) for name in limits}) > 1:
        yield "METRIC_THRESHOLD and METRICS_THRESHOLD differ: set one of them"
    if "METRIC_TO_CHECK" in given and not limits:
        yield "METRIC_TO_CHECK needs METRIC_THRESHOLD, the number it may reach"
    if limits and "UNHEALTHY_WHEN" in given and "METRIC_TO_CHECK" not in given:
        yield f"{limits[0]} needs METRIC_TO_CHECK beside UNHEALTHY_WHEN"


def _rule_problems(given: Given, values: Values) -> Iterator[str]:
    rules = values.get("unhealthy_when")
    if "UNHEALTHY_WHEN" in given and rules == ():
        yield "UNHEALTHY_WHEN has no rule: unset it for the default rules"
    names = [rule.name for rule in rules or ()]
    if "METRIC_TO_CHECK" in given and "AboveThreshold" in names:
        yield "UNHEALTHY_WHEN: AboveThreshold is the name of METRIC_TO_CHECK's rule"


def _hopeless(_: Given, values: Values) -> Iterator[str]:
    if not {"target_labels", "metrics_endpoint"} <= values.keys():
        return
    added, own = added_series(values), values["target_labels"]
    named = list(_expressions(values))
    found = [f"{n}: {text}" for n, expr in named for text in hopeless(expr, added, own)]
    yield from found or unholdable([expr for _, expr in named])


def _expressions(values: Values) -> Iterator[tuple[str, Expr]]:
    for name in "unhealthy_when", "canary_when":
        for rule in values.get(name, ()):
            yield f"the rule {rule.name}", rule.expr
    for name in "metric_to_check", "drain_while":
        if values.get(name):
            yield name.upper(), values[name]


def _scrape_problems(given: Given, values: Values) -> Iterator[str]:
    users = any(target.authorization for target in values.get("metrics_endpoint", ()))
    timeout, interval = values.get("metrics_timeout", 0), values.get("scrape_interval")
    if "METRICS_KEY_FILE" in given and "METRICS_CERT_FILE" not in given:
        yield "METRICS_KEY_FILE needs METRICS_CERT_FILE"
    if "METRICS_BEARER_TOKEN_FILE" in given and users:
        yield "METRICS_BEARER_TOKEN_FILE excludes user:password in METRICS_ENDPOINT"
    if interval and timeout > interval:
        longest, least = format_duration(timeout), format_duration(interval)
        yield f"METRICS_TIMEOUT ({longest}) may not exceed SCRAPE_INTERVAL ({least})"


def _port_problems(_: Given, values: Values) -> Iterator[str]:
    port = values.get("app_port")
    own = {f"{host}:{port}" for host in LOCAL_HOSTS if not values.get("app_host")}
    targets = values.get("metrics_endpoint", ())
    if own.intersection(target.instance for target in targets):
        yield f"METRICS_ENDPOINT is port {port}, which is this program's: set APP_PORT"


def _canary_problems(given: Given, values: Values) -> Iterator[str]:
    url = values.get("canary_url")
    for name in sorted(given) if "CANARY_URL" not in given else ():
        if name.startswith("CANARY_") and name.lower() in values:
            yield f"{name} needs CANARY_URL, where to send it"
    if "CANARY_BEARER_TOKEN_FILE" in given and url and url.authorization:
        yield "CANARY_BEARER_TOKEN_FILE excludes user:password in CANARY_URL"


def _with_credentials(config: Config) -> Config:
    """Let each target know what it is shown: a token to whom it was set for alone."""
    files = config.metrics_ca_file, config.metrics_cert_file, config.metrics_key_file
    tls = Credentials("", *files, config.metrics_tls_skip_verify)
    metrics = tls._replace(token_file=config.metrics_bearer_token_file)
    canary = tls._replace(token_file=config.canary_bearer_token_file)
    token, ca = config.alertmanager_bearer_token_file, config.alertmanager_ca_file
    return config._replace(
        metrics_endpoint=_showing(metrics, config.metrics_endpoint),
        health_endpoint=_showing(tls, config.health_endpoint),
        canary_url=config.canary_url and config.canary_url._replace(credentials=canary),
        alertmanager_url=_showing(Credentials(token, ca), config.alertmanager_url),
    )


def _showing(shown: Credentials, targets: Iterable[Target]) -> tuple[Target, ...]:
    return tuple(target._replace(credentials=shown) for target in targets)


def _with_rules(config: Config) -> Config:
    when = config.canary_when
    if config.canary_url and not when:
        when = canary_rules(config.canary_after)
    rules, when = (_for_targets(some, config) for some in (_rules(config), when))
    config = config._replace(rules=rules, canary_when=when)
    names = [rule.name for rule in config.rules]
    unknown = ", ".join(name for name in config.exit_when if name not in names)
    if unknown:
        raise ConfigError(f"EXIT_WHEN: no rule {unknown}: there are {', '.join(names)}")
    warnings = *config.warnings, *_sparse(config), *dict.fromkeys(_taken_port(config))
    return config._replace(warnings=warnings)


def _for_targets(rules: Iterable[Rule], config: Config) -> tuple[Rule, ...]:
    own = dict(config.target_labels)
    return tuple(
        rule._replace(expr=renamed(rule.expr, own)) if own and rule.builtin else rule
        for rule in rules
    )


def _taken_port(config: Config) -> Iterator[str]:
    for target in config.metrics_endpoint:
        at = f":{target.instance.rpartition(':')[2]}/{target.url.split('/', 3)[3]}"
        alike = [server for server in SERVERS if server.at == at]
        if alike and all(port_conflict(config.app_port, [s]) for s in alike):
            yield port_conflict(config.app_port, alike)


def _sparse(config: Config) -> Iterator[str]:
    interval, shown = config.scrape_interval, format_duration(config.scrape_interval)
    if interval > MAX_INTERVAL:
        yield f"SCRAPE_INTERVAL={shown}: an answer can be three times as old"
    for rule in config.rules if interval else ():
        for window in _windows(rule):
            what = f"{rule.name}: a range of {format_duration(window)}"
            if rule.builtin and window <= interval:
                yield f"{what} is too short for SCRAPE_INTERVAL={shown}: never fires"
            elif window < 2 * interval and not rule.builtin:
                yield f"{what} may have a single sample at SCRAPE_INTERVAL={shown}"


def _windows(rule: Rule) -> list[float]:
    seen = {*find_selectors(rule.expr)}
    if rule.builtin:  # Only what compares two samples needs more than one.
        besides = "increase", "min_over_time", "idelta"
        seen -= {*find_selectors(rule.expr, besides)}
    return sorted({selector.window for selector in seen} - {0})


def _rules(config: Config) -> tuple[Rule, ...]:
    own = config.unhealthy_when
    limits = (config.metric_threshold, config.metrics_threshold, DEFAULT_THRESHOLD)
    threshold = next(limit for limit in limits if limit is not None)
    if config.metric_to_check is not None:
        expr = Operation(">", (config.metric_to_check, Number(threshold)))
        own = (Rule("AboveThreshold", expr), *own)
    gone = left_out(config)
    rules = builtin_rules([name for name in BUILTIN if name not in gone], threshold)
    if config.canary_url:
        match = ("instance",) if len(config.metrics_endpoint) > 1 else ()
        rules = (with_canary(rule, match) for rule in rules)
    return (*own, *rules)


def left_out(config: Config) -> dict[str, str]:
    """Return which built-in rules are not in force, and the setting that says so."""
    own = {rule.name for rule in config.unhealthy_when}
    gone = {} if config.health_endpoint else {"NotServing": ""}
    if not config.canary_url:
        gone["Unresponsive"] = ""
    if config.metric_to_check is not None and not own:
        others = BUILTIN.keys() - {"Down", "NotServing", "Unresponsive"}
        gone.update(dict.fromkeys(others, "METRIC_TO_CHECK"))
    if own:
        gone["QueueFull"] = "UNHEALTHY_WHEN"
    gone.update(dict.fromkeys(own.intersection(BUILTIN), "UNHEALTHY_WHEN"))
    return {**gone, **dict.fromkeys(config.without_rules, "WITHOUT_RULES")}


def _misspelt(given: Iterable[str]) -> Iterator[str]:
    known = [setting.name for setting in SETTINGS]
    for name in sorted(set(given) - set(known)):
        # Kubernetes sets variables of its own for each Service it knows.
        if not re.search(r"_PORT\Z|_PORT_|_SERVICE_|_TCP|_UDP", name):
            near = most_like(name.upper(), known, 1, 0.85)
            if near:
                yield f"{name} is no setting: did you mean {near[0]}?"
            elif name.startswith(OWN_PREFIXES):
                yield f"{name} is no setting: --help lists them"


def _doubtful(given: Given) -> Iterator[str]:
    for name in ("TARGET_LABELS", "ALERT_LABELS"):
        for label in re.findall(r"(\w+)=\s*(?=,|\Z)", given.get(name, "")):
            yield f"{name}: {label} has no value, so it is left out"
    if given.get("METRICS_TLS_SKIP_VERIFY", "").lower() == "true":
        yield "METRICS_TLS_SKIP_VERIFY: ANYBODY can pose as the target"
    for name in sorted(BESIDE.keys() & given.keys()):
        if BESIDE[name] not in given:
            yield f"{name} does nothing without {BESIDE[name]}"
    # A manifest has "$(NAME)" as it is where NAME is not defined before it.
    for name in sorted({setting.name for setting in SETTINGS}.intersection(given)):
        found = re.search(r"\$\(\w+\)|\$\{\w+\}", given[name])
        if found:
            yield f"{name} has {found[0]}, which nothing has replaced by a value"


def _shown(name: str, text: str) -> str:
    if name.endswith(SECRET):
        # A password ends at the last @, and a query may hold a token.
        text = re.sub(r"(?s)\?.*", "?***", re.sub(r"(?s).*@", "***@", text))
    return repr(shorten(text, MAX_VALUE_SHOWN))


# --- 9. Scrape: URL -> bytes, or a reason why not ------------------------------------

MAX_HEAD, MAX_FIELDS = 64 * 1024, 250
MAX_REDIRECTS, REDIRECTS = 3, (301, 302, 303, 307, 308)
MAX_UNPACKED = 256 * 1024 * 1024
RECEIVE_BUFFER = 1024 * 1024
NEXT_ADDRESS = 0.25
AGENT = f"health_check.py/{__version__}"
# Of version 1.0.0 without allow-utf-8, prometheus_client 0.23 and later would serve
# sglang:x as sglang_x, at whatever q.
ACCEPT = (
    "text/plain;version=1.0.0;escaping=allow-utf-8,text/plain;version=0.0.4;q=0.9,"
    "*/*;q=0.1"
)
REASONS = (
    (socket.timeout, "timeout"), (socket.gaierror, "dns"), (ssl.SSLError, "tls"),
    (ConnectionRefusedError, "refused"), (ConnectionError, "reset"),
    (http.client.IncompleteRead, "truncated"), (EOFError, "truncated"),
    (http.client.HTTPException, "bad_http"), (ValueError, "bad_http"),
    (gzip.BadGzipFile, "bad_http"), (zlib.error, "bad_http"), (OSError, "network"),
)
_FAILURES = tuple(kind for kind, _ in REASONS)
_LINE = operator.methodcaller("rstrip", b"\r\n")
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?: .*)?")
FIELD_NAME = r"[\w!#$%&'*+.^`|~-]+"
_FIELD = re.compile(rf"^({FIELD_NAME}):([^\0\r\n]*)$", re.ASCII | re.MULTILINE)
_FOLD = re.compile(r"\n[ \t]+")
# Python would ignore what it does not understand of these two.
_FRAMING = (
    ("transfer-encoding", "(?i)chunked"),
    ("content-length", r"(?a)(\d{1,18})(?:[ \t]*,[ \t]*\1)*"),
)
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,16})[ \t]*(?:;[^\r\n]*)?\r?\n")


def redact(text: str) -> str:
    """Return ``text`` without query strings and credentials."""
    # A server may send back what it was sent.
    return re.sub(r"(?i)(\?|\b(?:basic|bearer)\s+)\S+", r"\1***", text)


class ScrapeError(Exception):
    """A scrape failed: ``reason`` is one word for rules, the text is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(redact(message))
        self.reason = reason


class Stream(NamedTuple):
    """A body that is being received.

    ``readinto`` fills a buffer and returns how much; 0 is the end.
    """

    content_type: str
    readinto: Callable[[memoryview], int]


@contextmanager
def open_stream(
    target: Target, deadline: float, overtime: float = 0.0
) -> Iterator[Stream]:
    """Give the metrics of a target; all of it happens before a monotonic deadline.

    ``overtime`` is that of ``fetch``.  Name lookup is the one part that cannot be
    interrupted.  Raises ScrapeError.
    """
    with fetch(target, deadline, None, overtime) as response:
        if response.status != 200:
            phrase = http.client.responses.get(response.status, "")
            see = ": see METRICS_BEARER_TOKEN_FILE" if response.status == 401 else ""
            text = f"HTTP {response.status} {phrase}{see}".strip()
            raise ScrapeError("http_status", text)
        body = reader_of(response, deadline)
        yield Stream(response.fields.get("content-type", ""), body)


def reader_of(response: Response, deadline: float) -> Callable[[memoryview], int]:
    """Return what fills a buffer with the body, unpacked; raises ScrapeError.

    Some servers pack what nobody asked them to (RFC 9110 section 8.4), and Prometheus
    reads it.
    """
    body: Response | gzip.GzipFile = response
    coding = response.fields.get("content-encoding", "identity").lower()
    if coding in ("gzip", "x-gzip"):
        body = gzip.GzipFile(fileobj=response, mode="rb")
    elif coding != "identity":
        raise ScrapeError("bad_http", f"unasked Content-Encoding {coding[:40]!r}")
    return partial(_readinto, response, body, deadline)


def _readinto(
    response: Response, body: Response | gzip.GzipFile, deadline: float,
    view: memoryview,
) -> int:
    with Translated():
        # A megabyte that has been received may unpack to a gigabyte.
        _left(deadline)
        count = body.readinto(view)
    if body is not response and body.tell() > MAX_UNPACKED:
        raise ScrapeError("too_large", f"unpacks to more than {MAX_UNPACKED} bytes")
    if not count and response.length:
        raise ScrapeError("truncated", f"{response.length} bytes less than announced")
    return count


def fetch(
    target: Target, deadline: float, body: bytes | None = None, overtime: float = 0.0
) -> Response:
    """Return the answer to a GET, or to a POST of JSON; raises ScrapeError.

    Redirects within the origin are followed, for a POST those that keep the method.
    With ``overtime`` the first byte of an answer is waited for so long past the
    deadline, to no avail but that the server is not sent another request meanwhile.
    """
    at, headers = target, {"Accept": ACCEPT}
    if body is not None:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if target.authorization:
        headers["Authorization"] = target.authorization
    for _ in range(MAX_REDIRECTS + 1):
        with Translated():
            response = _send(at, deadline, headers, body, overtime)
        location = response.fields.get("location")
        followed = REDIRECTS if body is None else REDIRECTS[-2:]
        if response.status not in followed or not location:
            return response
        response.close()
        at = _moved(at, location)
    raise ScrapeError("redirect", f"more than {MAX_REDIRECTS} redirects")


def _moved(target: Target, location: str) -> Target:
    with suppress(ValueError):
        url = urllib.parse.urljoin(target.address, location)
        moved = parse_target(url.partition("#")[0])
        schemes = {at.url.partition(":")[0] for at in (moved, target)}
        if moved.instance == target.instance and len(schemes) == 1:
            return moved._replace(credentials=target.credentials)
    raise ScrapeError("redirect", "redirected to another origin: not followed")


class Translated:
    """Raises what urllib raises as a ScrapeError.

    As a generator it would be part of a cycle that keeps the buffer of the body.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error and isinstance(error, _FAILURES):
            # urllib wraps what went wrong before the answer in a URLError.
            inner = getattr(error, "reason", None)
            cause = inner if isinstance(inner, Exception) else error
            reason = next(name for kind, name in REASONS if isinstance(cause, kind))
            message = str(getattr(cause, "strerror", None) or cause)[:200]
            message = "timed out" if reason == "timeout" else message
            raise ScrapeError(reason, message or type(cause).__name__) from error


def _send(
    target: Target, deadline: float, headers: Mapping[str, str], body: bytes | None,
    overtime: float,
) -> Response:  # fmt: skip
    """Send a GET, or a POST; return whatever answer comes.

    Raises ScrapeError for credentials that cannot be read, else what urllib raises.
    """
    url, credentials = target.address, target.credentials
    fields = {**headers, "User-Agent": AGENT}
    try:
        if credentials.token_file:
            fields["Authorization"] = f"Bearer {_token(credentials.token_file)}"
        secure = url[:6].lower() == "https:"
        context = _context(credentials, _versions(credentials)) if secure else None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or type(error).__name__
        name = getattr(error, "filename", None) or "a token, CA or certificate file"
        raise ScrapeError("credentials", f"{name}: {problem}") from None
    get = body is None
    request = _get(url, (*fields.items(),)) if get else _Request(url, body, fields)
    # An opener of urllib's would add proxies, redirects, other schemes, error pages.
    handler = urllib.request.AbstractHTTPHandler()
    options = {"context": context, "deadline": deadline, "overtime": overtime}
    return cast(Response, handler.do_open(_Connection, request, **options))


class _Request(urllib.request.Request):
    # That is a matter of the connection.
    timeout = None


# Each scrape asks for the same, and it takes longer to say that than to send it.
@lru_cache(maxsize=16)
def _get(url: str, fields: Labels) -> _Request:
    return _Request(url, headers=dict(fields))


def _token(path: str) -> str:
    with open(path, encoding="ascii") as file:
        token = file.read(MAX_HEAD).strip()
    if not re.match(r"[!-~]+\Z", token):
        # Python would show it in the error of a header that it cannot send.
        raise OSError(errno.EINVAL, "expected one token", path)
    return token


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise socket.timeout("timed out")
    return seconds


def _versions(credentials: Credentials) -> tuple[tuple[int, ...], ...]:
    # Certificates rotate, and it takes 20 ms to read those of the system.
    trusted = credentials.ca_file or ssl.get_default_verify_paths().cafile
    paths = trusted, credentials.cert_file, credentials.key_file
    files = [os.stat(path) for path in paths if path]
    return tuple((file.st_ino, file.st_mtime_ns, file.st_size) for file in files)


@lru_cache(maxsize=8)
def _context(
    credentials: Credentials, _: tuple[tuple[int, ...], ...]
) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=credentials.ca_file or None)
    context.sslsocket_class = _TLSSocket
    if credentials.cert_file:
        context.load_cert_chain(credentials.cert_file, credentials.key_file or None)
    if credentials.skip_verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class _Socket(socket.socket):
    """Gives each read of a socket what is left until one deadline, and bounds the head.

    ``http.client`` would wait ``timeout`` seconds for each byte of a header.
    """

    deadline: float
    overtime: float
    allowance: float
    cut = ""

    def makefile(self, *_: Any, **__: Any) -> Any:
        """Give a file whose first read takes a whole page, if that is a small one."""
        return super().makefile("rb", MAX_HEAD)

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        # What is read with the end of the head may be the body's.
        if self.allowance <= 0:
            raise ScrapeError("too_large", f"a head of more than {MAX_HEAD} bytes")
        self.settimeout(_left(self.deadline + self.overtime))
        count = super().recv_into(*arguments, **options)
        self.overtime = 0.0
        if not count and self.cut:
            # ``http.client`` takes a head, or a chunk's size 0a, that is cut for whole.
            raise ScrapeError(self.cut, "closed before the end")
        self.allowance -= count
        return count


class _TLSSocket(_Socket, ssl.SSLSocket):
    """The same over TLS."""


class Response(http.client.HTTPResponse):
    """An answer whose head is read strictly, and not by the e-mail parser: it is slow.

    Fields of one name are joined (RFC 9110 section 5.3), so each has one meaning.  A
    body is as long as RFC 9112 section 6 says.
    """

    fields: dict[str, str]

    def begin(self) -> None:
        """Read the head, and before it those of any interim answers (1xx)."""
        self.status = 100
        while self.status < 200:
            self.status, self.fields = _head(map(_LINE, self.fp))
        self.code, self.reason, self.will_close = self.status, "", True
        self.length = self.chunk_left = None
        self.chunked = "transfer-encoding" in self.fields
        for name, form in _FRAMING:
            value = self.fields.get(name)
            if value is not None and not re.fullmatch(form, value):
                raise http.client.HTTPException(f"bad {name.title()} {value[:40]!r}")
        if not self.chunked and "content-length" in self.fields:
            self.length = int(self.fields["content-length"].partition(",")[0])

    def _read_next_chunk_size(self) -> int:
        # RFC 9112 section 7.1, where http.client would take 0x8 and +8 for 8.
        line = self.fp.readline(MAX_HEAD)
        size = _CHUNK_SIZE.fullmatch(line)
        if not size:
            raise http.client.HTTPException(f"bad size of a chunk {line[:40]!r}")
        return int(size[1], 16)


def _head(lines: Iterator[bytes]) -> tuple[int, dict[str, str]]:
    # RFC 9112 sections 4 and 5; what is folded is one line (section 5.2).
    fields: dict[str, str] = {}
    status = _STATUS.fullmatch(next(lines, b""))
    if not status:
        raise http.client.BadStatusLine("not an answer of HTTP/1")
    head = itertools.islice(itertools.takewhile(bool, lines), MAX_FIELDS + 1)
    text = b"\n".join(head).decode("latin-1")
    if text.count("\n") >= MAX_FIELDS:
        raise http.client.HTTPException(f"more than {MAX_FIELDS} header lines")
    text = _FOLD.sub(" ", text)
    found = _FIELD.findall(text)
    if text and len(found) <= text.count("\n"):
        line = next(x for x in text.split("\n") if not _FIELD.fullmatch(x))
        raise http.client.HTTPException(f"not a header field: {line[:40]!r}")
    for key, text in found:
        name, value = key.lower(), text.strip(" \t")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return int(status[1]), fields


AddressInfo = Tuple[int, int, int, str, Any]


class _Writer(http.client.HTTPConnection):
    """Keeps what it is to send."""

    written = b""

    def send(self, data: Any) -> None:
        self.written += data


# As above: http.client takes a while, for what it has written for the scrape before.
@lru_cache(maxsize=16)
def _head_of(
    server: tuple[str, int, int], method: str, url: str, fields: Labels
) -> bytes:
    host, port, default_port = server
    writer = _Writer(host, port)
    writer.default_port = default_port
    writer.request(method, url, None, dict(fields))
    return writer.written


class _Connection(http.client.HTTPConnection):
    """Connects to the first address that answers, all before one deadline."""

    def __init__(self, host: str, **options: Any) -> None:
        self._context: ssl.SSLContext | None = options["context"]
        self._deadline: float = options["deadline"]
        self._overtime: float = options["overtime"]
        self.default_port = 443 if self._context else 80
        super().__init__(host)

    def request(
        self, method: str, url: str, body: Any = None, headers: Any = None, **_: Any
    ) -> None:
        """Send a request."""
        if body:
            headers["Content-Length"] = str(len(body))
        server = self.host, self.port, self.default_port
        head = _head_of(server, method, url, tuple(headers.items()))
        self.send(head + (body or b""))

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, 0, socket.SOCK_STREAM)
        trying: dict[int, _Socket] = {}
        try:
            self.sock = _connected(_interleaved(found), trying, self._deadline)
        finally:
            for sock in trying.values():
                sock.close()
        self.sock.settimeout(_left(self._deadline))
        if self._context:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)

    def getresponse(self) -> Response:
        """Read the head of the answer; its body keeps the socket open."""
        sock: Any = self.sock
        sock.deadline, sock.overtime = self._deadline, self._overtime
        sock.allowance, sock.cut = MAX_HEAD, "reset"
        response = Response(sock)
        try:
            response.begin()
        except Exception:
            response.close()
            raise
        finally:
            self.close()
        sock.allowance, sock.cut = math.inf, "truncated" if response.chunked else ""
        return response


def _interleaved(found: Sequence[AddressInfo]) -> list[AddressInfo]:
    # RFC 8305 section 4: where IPv6 is silent, the second address is of IPv4.
    first = [info for info in found if info[0] == found[0][0]]
    others = [info for info in found if info[0] != found[0][0]]
    turns = itertools.zip_longest(first, others)
    return [info for turn in turns for info in turn if info]


def _connected(
    untried: list[AddressInfo], trying: dict[int, _Socket], deadline: float
) -> _Socket:
    """Return a socket that is connected to the first address that answers.

    The next is tried once one has failed, or after 250 ms, while those before it go on
    (RFC 8305 section 5) and stay in ``trying``, by their descriptors.  Raises OSError:
    if none is left, that of the last.
    """
    problem = 0
    while untried or trying:
        if untried:
            try:
                sock = _begin(*untried.pop(0))
            except OSError as error:
                problem = error.errno or 0
                continue
            trying[sock.fileno()] = sock
        seconds = min(NEXT_ADDRESS if untried else math.inf, _left(deadline))
        poller = poll()
        for descriptor in trying:
            poller.register(descriptor, POLLOUT)
        for descriptor, _ in poller.poll(seconds * 1000):
            sock = trying.pop(descriptor)
            problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not problem:
                return sock
            sock.close()
    raise OSError(problem, os.strerror(problem))


def _begin(family: int, kind: int, protocol: int, _: str, address: Any) -> _Socket:
    sock = _Socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sock.setblocking(False)
    problem = sock.connect_ex(address)
    if problem not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(problem, os.strerror(problem))
    return sock


# --- 10. Exposition: bytes x wanted names -> samples ---------------------------------
# The text format 0.0.4 and OpenMetrics 1.0 as Prometheus' scraper reads them
# (model/textparse/promlex.l): only the lines of wanted names are looked at.  So a bare
# newline within a label of another metric, which no client library writes, ends a line.

CHUNK = 256 * 1024
NEWLINE = ord("\n")
MAX_SERIES, MAX_SERIES_TEXT = 5000, 2 * 1024 * 1024
# A regex takes up to 160 bytes for each byte of a text in which it repeats a string.
MAX_LABELS = 32 * 1024
MAX_NAMES = 2000

# None of these can be slow: where two repeats meet, no text fits both.
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_BRACES = rb'[ \t]*\{[^"}\n]*(?:' + _STRING + rb'[^"}\n]*)*\}'
_SERIES = re.compile(rb"[a-zA-Z_:][\w:]*(?:" + _BRACES + rb")?|" + _BRACES, re.DOTALL)
_PAIR = re.compile(
    rb"[ \t]*(?:(?:([a-zA-Z_]\w*)|(" + _STRING + rb"))[ \t]*=[ \t]*)?"
    rb"(" + _STRING + rb")[ \t]*,?", re.DOTALL
)
_NUMBER = rb"[ \t]*(" + FLOAT.encode() + rb")(?=[ \t\n])"
_VALUE = re.compile(_NUMBER + rb"(?:[ \t]+\d+)?[ \t]*\n", re.IGNORECASE)
_VALUE_OPENMETRICS = re.compile(
    _NUMBER + rb"(?:[ \t]+-?[\d.]+(?:e[-+]?\d+)?)?[ \t]*(?:# ?\{[^\n]*)?\n",
    re.IGNORECASE,
)
_OPEN_STRING = re.compile(
    rb'[^"\n]*(?:' + _STRING + rb'[^"\n]*)*"[^"\\]*(?:\\.[^"\\]*)*\Z', re.DOTALL
)
_LABEL_ESCAPE = re.compile(rb'\\([\\"n])')
_SAMPLE = re.compile(rb"\n[ \t]*[^ \t\n#]")
_LISTED_NAME = re.compile(
    rb'\n(?:\{[ \t]*")?([a-zA-Z_:][\w:./-]{0,199})(?![\w:./-])'
)
_TYPE_OPENMETRICS = re.compile(
    r"application/openmetrics-text[ \t]*(?:[;,]|\Z)", re.IGNORECASE
)
_NOT_BLANK = re.compile(rb"\S")
_NOTHING = re.compile(rb"\s*(?:null\s*)?\Z")


class Format(NamedTuple):
    """How to read a body: what to find, the labels that each sample gets, and where.

    ``names`` are the wanted ones; ``lines`` also finds the ``reserved`` ones.
    It has a buffer, so only one body can be read by it at a time.  Samples that nobody
    wants are counted if ``counts``.  Where there is no room for all, those of
    ``spare`` names are given up, the largest first, for good: they are ``dropped``.
    """

    names: frozenset[str]
    reserved: frozenset[str]
    lines: re.Pattern[bytes]
    labels: Labels
    buffer: bytearray
    counts: bool
    spare: frozenset[str]
    dropped: set[str]


def reserved_names(config: Config) -> tuple[str, ...]:
    """Return the names of metrics that are set here, and that no target may serve."""
    probed = config.canary_url or config.health_endpoint
    return (*SYNTHETIC, *PROBED) if probed else tuple(SYNTHETIC)


def format_for(
    names: Iterable[str], labels: Labels, reserved: Iterable[str] = SYNTHETIC,
    spare: frozenset[str] = frozenset(),
) -> Format:  # fmt: skip
    """Return the format that finds the series of some metrics and labels them."""
    asked = frozenset(names)
    wanted, counts = asked.difference(reserved), "scrape_samples_scraped" in asked
    lines, fixed = _lines_of(wanted.union(reserved)), frozenset(reserved)
    # Room for a newline on either side of the text.
    buffer = bytearray(CHUNK + 2)
    return Format(wanted, fixed, lines, labels, buffer, counts, spare, set())


def without_dropped(format: Format) -> Format:
    """Return a format that does not look for what is dropped."""
    names = format.names - format.dropped
    return format._replace(names=names, lines=_lines_of(names | format.reserved))


def _lines_of(names: Iterable[str]) -> re.Pattern[bytes]:
    # For Prometheus 3, blanks before a name are part of it: it is no wanted one.
    tree = _prefix_tree(sorted(names)).encode()
    return re.compile(rb"\n(?:" + tree + rb"|\{)(?:(?<=\{)|(?![\w:]))")


def too_many(names: Iterable[str]) -> str:
    """Return what to say of metrics that have more series than there is room for."""
    return f"too many series of {name_some(sorted(names))}: no built-in rule reads it"


def _prefix_tree(names: Sequence[str]) -> str:
    # As an alternation, 36 names are matched at half the speed of a tree.
    branches = []
    for _, group in itertools.groupby(names, key=lambda name: name[:1]):
        first, *more = group
        stem = first[: common_prefix(first, more[-1])] if more else first
        tails = [name[len(stem) :] for name in (first, *more)]
        rest = f"(?:{_prefix_tree(tails)})" if more else ""
        branches.append(re.escape(stem) + rest)
    return "|".join(branches)


def common_prefix(one: str, other: str) -> int:
    """Return how many letters two names have in common where they begin.

    >>> common_prefix("num_requests_running", "num_requests_waiting")
    13
    """
    pairs = enumerate(zip(one, other))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def read_samples(
    stream: Stream, format: Format, known: dict[bytes, Labels], list_names: bool = False
) -> Reading:
    """Read the wanted samples of a body, in memory that does not grow with the body.

    An empty body and ``null`` have no samples.  ``known`` has the labels of series by
    their text, from the scrape before.  Raises ScrapeError where Prometheus' scraper
    would, as far as the first line and the wanted ones show it.
    """
    openmetrics = bool(_TYPE_OPENMETRICS.match(stream.content_type))
    reading = Reading(format, known, openmetrics, list_names)
    buffer, view = format.buffer, memoryview(format.buffer)
    # Each line starts with a newline: what is kept of a chunk begins with one, too.
    buffer[0], filled, final = NEWLINE, 1, False
    while not final:
        count = fill(view[filled:-1], stream.readinto)
        filled, reading.size = filled + count, reading.size + count
        final = filled < len(view) - 1
        cut = final and buffer[filled - 1] != NEWLINE
        if cut:
            # Prometheus reads a last line that has no newline, too.
            buffer[filled], filled = NEWLINE, filled + 1
        kept = reading.take(buffer, filled, final)
        if cut:
            reading.check_last_line(buffer, filled)
        view[: filled - kept], filled = view[kept:filled], filled - kept
        if filled > CHUNK:
            raise ScrapeError("too_large", f"a line of more than {CHUNK - 1} bytes")
    return reading


def fill(view: memoryview, readinto: Callable[[memoryview], int]) -> int:
    """Fill a buffer as far as there is something; return how much that is."""
    filled = 0
    while filled < len(view):
        count = readinto(view[filled:])
        if not count:
            break
        filled += count
    return filled


class Reading:
    """What has been read of a body: samples, and the labels of series by their text.

    ``names`` are all there are, ``reserved`` those it may not have; ``size`` is bytes,
    ``lines`` the samples, wanted or not, if the format asks for their number.
    ``names`` are empty unless it ``lists_names``.
    For ``dropped`` ones, of this body or one before, there is no room.
    """

    def __init__(
        self, format: Format, known: dict[bytes, Labels], openmetrics: bool,
        list_names: bool,
    ) -> None:
        self.samples: dict[Labels, float] = {}
        self.series: dict[bytes, Labels] = {}
        self.names: set[bytes] = set()
        self.reserved: set[str] = set()
        self.dropped = format.dropped
        self.size = self.lines = self._text = 0
        # Thousands of series have the same few names and pairs.  Not sys.intern(), by
        # which Python 3.12 keeps a name for ever.
        self._shared: dict[Any, Any] = {}
        self._format, self._known = format, known
        self._openmetrics, self.lists_names = openmetrics, list_names
        self._value = _VALUE_OPENMETRICS if openmetrics else _VALUE
        self._started = self._ended = False

    @property
    def listed(self) -> frozenset[str] | None:
        """The names of all metrics, None if they were not asked for."""
        return frozenset(map(bytes.decode, self.names)) if self.lists_names else None

    def take(self, buffer: bytearray, filled: int, final: bool) -> int:
        """Take the samples of whole lines; return where the rest to keep begins."""
        end = buffer.rfind(b"\n", 0, filled) + 1
        if not self._started:
            if final and _NOTHING.match(buffer, 0, end):
                return end - 1
            # Some serve metrics as text/html, and pages as text/plain.
            problem = _problem(buffer, 0, end)
            if problem:
                raise ScrapeError("not_metrics", f"the first line is {problem}")
            self._started = bool(_NOT_BLANK.search(buffer, 0, end))
        kept = self._scan(buffer, end, final)
        self._survey(buffer, end, kept)
        # Of nothing but its newline the end of a body says no more.
        self._ended = buffer.endswith(b"\n# EOF\n", 0, end) if end > 1 else self._ended
        if final and self._openmetrics and not self._ended:
            raise ScrapeError("truncated", "no # EOF at the end of OpenMetrics text")
        return kept

    def check_last_line(self, buffer: bytearray, filled: int) -> None:
        """Raise ScrapeError if a last line without newline is only a part of one."""
        last = buffer.rfind(b"\n", 0, filled - 1) + 1
        problem = _problem(buffer, last, filled) if self._started else ""
        if problem:
            raise ScrapeError("truncated", f"the last line is {problem}")

    def _survey(self, buffer: bytearray, end: int, kept: int) -> None:
        room = MAX_NAMES - len(self.names)
        if self.lists_names and room:
            self.names.update(_LISTED_NAME.findall(buffer, 0, end)[:room])
        if self._format.counts:
            self.lines += len(_SAMPLE.findall(buffer, 0, kept))

    def _scan(self, buffer: bytearray, end: int, final: bool) -> int:
        match = self._format.lines.search(buffer, 0, end)
        while match:
            line = _line(buffer, match.start() + 1, end, final, self._value)
            if not line:
                return match.start()
            text, value, at = line
            labels = self._known.get(text) or self._labels(text)
            if labels:
                # Prometheus keeps the first of two samples of one series.
                self.samples.setdefault(labels, value)
                self.series[text], self._text = labels, self._text + len(text)
            if len(self.series) > MAX_SERIES or self._text > MAX_SERIES_TEXT:
                self._make_room()
            match = self._format.lines.search(buffer, at, end)
        return end - 1

    def _make_room(self) -> None:
        names = {text: dict(labels)["__name__"] for text, labels in self.series.items()}
        spare = self._format.spare.intersection(names.values())
        if not spare:
            limits = f"{MAX_SERIES} series, or {MAX_SERIES_TEXT} bytes of them"
            raise ScrapeError("too_large", f"more than {limits}, are wanted")
        largest = max(sorted(spare), key=[*names.values()].count)
        self.dropped.add(largest)
        self._known = {}
        for text in [text for text, name in names.items() if name == largest]:
            self.samples.pop(self.series.pop(text), None)
        self._text = sum(map(len, self.series))

    def _labels(self, text: bytes) -> Labels:
        # Without this, the labels of each of many series would be read.
        if text.partition(b"{")[0].decode() in self.dropped:
            return ()
        own = parse_series(text)
        name = own["__name__"]
        if name in self._format.reserved:
            self.reserved.add(name)
        if name not in self._format.names or name in self.dropped:
            return ()
        for bound in {"le", "quantile"}.intersection(own):
            own[bound] = normalize_bound(own[bound])
        labels = add_labels(own, dict(self._format.labels))
        share = self._shared.setdefault
        pairs = [(share(label, label), labels[label]) for label in sorted(labels)]
        return tuple(share(pair, pair) for pair in pairs)


def add_labels(own: dict[str, str], added: dict[str, str]) -> dict[str, str]:
    """Return labels with others added; those of the same name are renamed.

    >>> add_labels({"pod": "a", "exported_pod": "b"}, {"pod": "c"})
    {'pod': 'c', 'exported_pod': 'b', 'exported_exported_pod': 'a'}
    """
    labels = {**own, **added}
    for label in filter(own.__contains__, added):
        exported = "exported_" + label
        while exported in labels:
            exported = "exported_" + exported
        labels[exported] = own[label]
    return labels


def normalize_bound(text: str) -> str:
    """Return the value of a label ``le`` or ``quantile`` as Prometheus 3 stores it.

    >>> normalize_bound("1"), normalize_bound("2500000"), normalize_bound("many")
    ('1.0', '2.5e+06', 'many')
    """
    try:
        number = parse_float(text)
    except ValueError:
        return text
    shown = repr(number + 0.0) if math.isfinite(number) else format_float(number)
    if math.isfinite(number) and abs(number) >= 1e6 and "e" not in shown:
        # Go writes an exponent from 1e+06 on, Python from 1e+16.
        digits = len(shown.replace(".", "").strip("-0"))
        shown = f"{number:.{digits - 1}e}"
    return shown


def _problem(buffer: bytearray, start: int, end: int) -> str:
    # Why the first line that has something is neither a comment nor a sample.
    first = _NOT_BLANK.search(buffer, start, end)
    if first and first[0] != b"#":
        try:
            _line(buffer, first.start(), end, True, _VALUE_OPENMETRICS)
        except ScrapeError as error:
            return str(error)
    return ""


def _line(
    buffer: bytearray, start: int, end: int, final: bool, value: re.Pattern[bytes]
) -> tuple[bytes, float, int] | None:
    stop = min(end, start + MAX_LABELS)
    series = _SERIES.match(buffer, start, stop)
    number = series and value.match(buffer, series.end(), end)
    if series and number:
        amount = float(number[1])
        # What overflows is no number; an infinity and NaN have an n.
        if math.isfinite(amount) or b"n" in number[1].lower():
            return series[0], amount, number.end() - 1
    # A quoted label value may hold a newline, so a line may go on behind the end.
    if _OPEN_STRING.match(buffer, start, stop):
        if stop < end:
            raise ScrapeError("too_large", f"labels of more than {MAX_LABELS} bytes")
        if not final:
            return None
    shown = bytes(buffer[start : min(end, start + 80)]).partition(b"\n")[0]
    text = shown.decode(errors="backslashreplace")
    raise ScrapeError("bad_line", f"not a sample: {text!r}")


def parse_series(text: bytes) -> dict[str, str]:
    """Return the labels of a series from its text, the name as ``__name__``.

    Raises ScrapeError.

    >>> parse_series(b'x{a="b",}')
    {'__name__': 'x', 'a': 'b'}
    """
    name, _, rest = text.rstrip(b" \t").partition(b"{")
    labels = {"__name__": name.decode().strip()} if name else {}
    try:
        for label, value in _pairs_of(rest[:-1].rstrip(b" \t")):
            if not label or label in labels:
                raise ValueError("a label twice or without a name")
            labels[label] = value
        if not labels.get("__name__"):
            raise ValueError("no name")
    except ValueError as error:
        raise ScrapeError("bad_line", f"{error} in {text[:80]!r}") from None
    return {label: value for label, value in labels.items() if value}


def _pairs_of(text: bytes) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _PAIR.match(text, at)
        if not match:
            raise ValueError("a label without a value")
        plain, quoted, value = match.groups()
        # A quoted text alone is the metric's own name.
        label = _unescape(quoted) if quoted else (plain or b"__name__").decode()
        yield label, _unescape(value)
        at = match.end()


def _unescape(quoted: bytes) -> str:
    # Any other backslash stands for itself, as in Prometheus.
    text = _LABEL_ESCAPE.sub(lambda m: b"\n" if m[1] == b"n" else m[1], quoted[1:-1])
    return text.decode()


# --- 11. Log: what happens -> lines of stderr ----------------------------------------

LOG = logging.getLogger("health_check")
MAX_BACKLOG, FLUSH_TIME = 256 * 1024, 0.2
MAX_TOLD = 5
BUG = "this is a bug in health_check.py: please report it"
Message = Tuple[int, str, Dict[str, str]]
"""A line of the log: its level, its text, and its fields for LOG_FORMAT=json."""


def log_to_stderr(config: Config) -> None:
    """Log to stderr from here on, and first what is doubtful in the settings."""
    handler = _stderr_handler()
    formatter = JSONFormatter if config.log_format == "json" else TextFormatter
    handler.setFormatter(formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.handlers[:], LOG.propagate = [handler], False
    # Who wants errors only must see once what a setting risks.
    LOG.setLevel(logging.WARNING)
    for warning in (*config.warnings, *missing_files(config)):
        LOG.warning("%s", warning)
    LOG.setLevel(config.log_level.upper())
    threading.excepthook = report_thread


def log(level: int, message: str, **fields: object) -> None:
    """Log a message; with LOG_FORMAT=json the fields are keys beside it."""
    LOG.log(level, "%s", message, extra={"fields": fields})


def log_some(messages: Iterable[Message]) -> None:
    """Log the first of some messages, as it may take long to make each."""
    for level, message, fields in itertools.islice(messages, MAX_TOLD):
        log(level, message, **fields)


def report(error: Exception) -> str:
    """Log a bug with its traceback, and return what it is in a line."""
    LOG.error("%s", BUG, exc_info=error)
    return redact(f"{type(error).__name__}: {error}")


def report_thread(ended: threading.ExceptHookArgs) -> None:
    """Log that a thread has ended by an error; Python's own hook mixes in its lines."""
    name = ended.thread and ended.thread.name
    LOG.error("the thread %s has ended: %s", name, BUG, exc_info=ended.exc_value)


def _stderr_handler() -> logging.Handler:
    try:
        return LogWriter(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        # Descriptor 2 is closed, or stderr is no file.
        return logging.StreamHandler()


class LogWriter(logging.Handler):
    """Writes the log in a thread of its own, so that nobody waits for its reader.

    A terminal or a pipe that nobody reads keeps that thread alone; lines wait in a
    bounded backlog, and from when it is full until it is empty they are lost and
    counted.  To make the descriptor non-blocking would do so to each process that
    shares it.  The condition guards the backlog and the count.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._changed = descriptor, threading.Condition()
        self._lines: collections.deque[bytes] = collections.deque()
        self._size = self._lost = 0
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a line to the thread, or count it as lost."""
        line = b""
        # Memory may not do for a traceback: whoever logs an error is to go on.
        with suppress(Exception):
            line = self._encode(record)
        with self._changed:
            if not line or self._lost or self._size + len(line) > MAX_BACKLOG:
                self._lost += 1
            else:
                self._lines.append(line)
                self._size += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, a moment at most: the program may be ending."""
        with self._changed:
            self._changed.wait_for(lambda: not self._size, FLUSH_TIME)

    def _encode(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _work(self) -> None:
        while True:
            line = self._next_line()
            with suppress(OSError):
                self._write(line)
            with self._changed:
                self._size -= len(line)
                self._changed.notify_all()

    def _next_line(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._lost)
            if self._lines:
                return self._lines.popleft()
            text = f"lines lost, for want of a reader or of memory: {self._lost}"
            fields = {"msg": text, "levelname": "WARNING"}
            line = self._encode(logging.makeLogRecord(fields))
            self._size, self._lost = self._size + len(line), 0
            return line

    def _write(self, line: bytes) -> None:
        while line:
            # Another process that shares it may have made it non-blocking.
            ready_of([], [self._descriptor], [])
            with suppress(BlockingIOError):
                line = line[os.write(self._descriptor, line) :]


class TextFormatter(logging.Formatter):
    """One line a record, with whatever comes from outside made harmless."""

    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, control characters escaped."""
        lines = super().format(record).split("\n")
        lines = lines if record.exc_info else [" ".join(lines)]
        return "\n".join(map(escape_controls, lines))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return a traceback, whose errors may hold a secret."""
        return redact(super().formatException(ei)).replace("\n", "\n  ")


class JSONFormatter(TextFormatter):
    """One JSON object a line: time, level, message, fields, a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


# --- 12. Words: Verdict -> sentences, for the log and for answers --------------------

MAX_LAST_WORDS, MAX_RULE, MAX_READ = 2000, 160, 5
ANSWERED = "up", "scrape_error"


def log_transitions(before: Verdict, after: Verdict) -> None:
    """Log what has changed from one verdict to the next."""
    for level, message, fields in transitions(before, after):
        log(level, message, **fields)
    if LOG.isEnabledFor(logging.DEBUG):
        LOG.debug("check %s: %s", after.sequence, after.reason or "Healthy")


def transitions(before: Verdict, after: Verdict) -> Iterator[Message]:
    """Yield what is worth a log line between two verdicts."""
    reasons = {target.instance: target.reason for target in before.targets}
    for target in after.targets:
        yield from _target_transition(reasons.get(target.instance, ""), target)
    for probe in after.probes:
        yield from _probe_transition(before.probes, probe)
    known = {status.rule.name: status for status in before.rules}
    for status in after.rules:
        old = known.get(status.rule.name)
        if old is not status:
            yield from _rule_transition(old, status, after)
    yield from _verdict_transition(before, after)


def _verdict_transition(before: Verdict, after: Verdict) -> Iterator[Message]:
    if (before.healthy, before.sequence > 0) != (after.healthy, True):
        good, bad = ("Healthy", logging.INFO), ("Unhealthy", logging.WARNING)
        word, level = good if after.healthy else bad
        message = f"{word}: {after.reason}" if after.reason else word
        yield level, message, {"verdict": word, "reason": after.reason}


def _rule_transition(
    old: RuleStatus | None, status: RuleStatus, verdict: Verdict
) -> Iterator[Message]:
    old = old or RuleStatus(status.rule)
    if (status.state, status.error) != (old.state, old.error):
        level = logging.WARNING if status.fails else logging.INFO
        text = f"{status.rule.name}: {describe(status, verdict)}"
        if status.last_words not in ("", old.last_words):
            text += f"; {status.last_words}"
        fields = {"rule": status.rule.name, "state": verdict.state_of(status)}
        yield level, shorten(text, MAX_LAST_WORDS), fields


def last_words(rule: Rule, evaluation: Evaluation) -> str:
    """Return what is remembered of the series that a rule reads, in one line.

    A restart destroys it: the first and the last value, the least and the most, and for
    how long the last has stood still.  A single sample tells no more than its alert.
    """
    courses: dict[str, str] = {}
    for labels, points in _points_read(rule, evaluation):
        if len(points.times) == 1:
            continue
        series = format_series(labels)
        courses[series] = f"{series} {_course(points, evaluation.now)}"
        # Labels can be long, and slow to show.
        if sum(map(len, courses.values())) > MAX_LAST_WORDS:
            break
    return shorten("; ".join(courses.values()), MAX_LAST_WORDS)


def _points_read(
    rule: Rule, evaluation: Evaluation
) -> Iterator[tuple[Labels, Points]]:
    now, selectors = evaluation.now, dict.fromkeys(find_selectors(rule.expr))
    # Those over a range tell most.
    for selector in sorted(selectors, key=lambda selector: -selector.window):
        start = now - (selector.window or LOOKBACK)
        yield from Range(select(selector, evaluation), start, now).windows()


def _course(points: Points, now: float) -> str:
    """Return what a series did.

    >>> _course(Points([0, 30, 60, 90], [5, 7, 6, 6]), 90.0)
    'from 5 to 6, least 5, most 7, still for 30s'
    >>> _course(Points([0, 90], [5, 5]), 90.0)
    '5 for 1m30s or longer'
    """
    values, last = points.values, format_float(points.values[-1])
    moved = [at for at, value in enumerate(values[:-1]) if value != values[-1]]
    still = format_duration(int(now - points.times[moved[-1] + 1 if moved else 0]))
    if not moved:
        return f"{last} for {still} or longer"
    first, least, most = map(format_float, (values[0], min(values), max(values)))
    return f"from {first} to {last}, least {least}, most {most}, still for {still}"


def _target_transition(before: str, target: TargetStatus) -> Iterator[Message]:
    fields = {"target": target.instance, "reason": target.reason}
    if target.reason and target.reason != before:
        what = f"scrape failed: {target.reason}: {target.message}"
        yield logging.WARNING, f"{target.instance}: {what}", fields
    elif before and not target.reason:
        yield logging.INFO, f"{target.instance}: scraped again", fields


def _probe_transition(
    before: Iterable[ProbeStatus], probe: ProbeStatus
) -> Iterator[Message]:
    key = (probe.probe, probe.instance)
    old = next((p.reason for p in before if (p.probe, p.instance) == key), "")
    if old != probe.reason:
        names = {"probe": probe.probe, "target": probe.instance}
        level = logging.WARNING if probe.reason else logging.INFO
        yield level, describe_probe(probe), {**names, "reason": probe.reason}


def describe_probe(probe: ProbeStatus) -> str:
    """Return what a probe found last, in words.

    >>> describe_probe(ProbeStatus("canary", "localhost:8000"))
    'canary of localhost:8000: shows nothing now'
    >>> describe_probe(ProbeStatus("canary", "a:1", None, 0, "timeout", "", 2.004))
    'canary of a:1: timeout: no answer within 2s'
    """
    text = f"{probe.reason}: {probe.message}" if probe.reason else "shows nothing now"
    if probe.reason == "timeout":
        text = f"timeout: no answer within {format_duration(round(probe.seconds, 1))}"
    if probe.success:
        text = f"ok: HTTP {probe.code}, {probe.seconds:.4f} s"
    return f"{probe.probe} of {probe.instance}: {text}"


def describe(status: RuleStatus, verdict: Verdict) -> str:
    """Return the state of a rule in words, with its first series or its worst value.

    >>> status = RuleStatus(Rule("Full", Number(1)), (), "", 1, 3.0, 10.0)
    >>> describe(status, Verdict(1, "", 0.0, 0.0))
    'ok: 3 (limit 10)'
    """
    state = verdict.state_of(status)
    if state in ("error", "unknown"):
        return f"{state}: {why_unknown(status, verdict)}"
    if state == "inactive":
        return f"ok{_found(status, verdict)}"
    since, series = first_series(status, verdict.time)
    return f"{state} for {since}: {series}"


def why_unknown(status: RuleStatus, verdict: Verdict) -> str:
    """Return why it is not known whether a rule fires, empty if it is."""
    unknown = verdict.state_of(status) == "unknown"
    return (verdict.fault or "a scrape fails") if unknown else status.error


def _found(status: RuleStatus, verdict: Verdict) -> str:
    if not status.matched and not status.reads_only(ANSWERED):
        return " (no series)"
    if asks_for_an_answer(status):
        return " so far" * ok_so_far(status, verdict)
    if status.value is None or status.limit is None:
        return ""
    return f": {format_float(status.value)} (limit {format_float(status.limit)})"


def asks_for_an_answer(status: RuleStatus) -> bool:
    """Tell whether a rule asks whether there is an answer, as with ``up == 0``.

    That its value is 1 and its limit 0 says nothing to a person.
    """
    names = *ANSWERED, "probe_success", "probe_error"
    return status.limit in (None, 0.0) and status.reads_only(names)


def ok_so_far(status: RuleStatus, verdict: Verdict) -> bool:
    """Tell whether its answer is missing, maybe not for long enough to fire yet."""
    if status.reads_only(ANSWERED):
        return bool(verdict.failed_scrapes)
    return any(probe.reason for probe in verdict.probes)


def explain(status: RuleStatus, *, reads: bool = True) -> str:
    """Return when a rule fires, and what a built-in one ``reads``, in a line or two.

    >>> explain(RuleStatus(*parse_rules("Full: q > 1 for 30s")))
    'q > 1 for 30s'
    """
    rule, part, text = status.rule, status.part, expression_of(status)
    if text and (len(text) <= MAX_RULE or not rule.builtin):
        return text
    about = ",".join(filter(None, (ABOUT[rule.name], format_clauses(rule))))
    names = [selector.name for selector in part.selectors] if part and reads else []
    names = [name for name in names if name not in (*SYNTHETIC, *PROBED)]
    return f"{about}: {name_some(names, MAX_READ)}" if names else about


def expression_of(status: RuleStatus) -> str:
    """Return the text of a rule for the metrics that are there; empty if none is."""
    rule = visible_rule(status)
    return format_rule(rule).partition(": ")[2] if rule else ""


def first_series(status: RuleStatus, now: float) -> tuple[str, str]:
    """Return since when a rule is pending or firing, and for what, in words."""
    first = next(a for a in status.alerts if a.state == status.state)
    others = status.counts[status.state] - 1
    series = f"{shorten(format_series(first.labels))} {format_float(first.value)}"
    more = f" and {others} more" if others else ""
    return format_duration(int(now - first.began)), series + more


def remaining(
    expr: Expr, targets: Iterable[TargetStatus], evaluation: Evaluation
) -> str:
    """Return what an expression still gives, or why that is not known; else nothing."""
    for target in targets:
        if target.reason:
            return f"scrape of {target.instance}: {target.reason}: {target.message}"
    try:
        found = evaluate(expr, evaluation)
    except EvaluationError as error:
        return str(error)
    shown = (f"{format_series(k)} {format_float(v)}" for k, v in found.items())
    return shorten(", ".join(itertools.islice(shown, 10)))


# --- 13. Absence: what rules name and no scrape shows -> warnings --------------------
# What finds nothing never fires: a typo, a rename, a label, another server may be why.

REMIND, REMIND_OF_TARGET = 300.0, 3600.0
# Parts of a name that differ between metrics of one thing, and one that was renamed.
SUFFIXES = "total count sum bucket created seconds second bytes info".split()
RENAMED = {"gpu", "kv"}


class Search:
    """How far the search for the series of a selector has come.

    ``homes`` are the targets that have had some; ``warned`` counts the warnings since.
    """

    def __init__(self) -> None:
        self.homes: frozenset[str] = frozenset()
        self.warned, self._warned_at = 0, -math.inf

    def misses(
        self, homes: frozenset[str], scraped: AbstractSet[str], now: float
    ) -> bool:
        """Tell whether to warn: at once, and once more after five minutes.

        ``homes`` are the targets that have some now, of those ``scraped``.
        """
        self.homes |= homes
        if self.homes and not self.homes & scraped - homes:
            self.warned = 0 if homes else self.warned
            return False
        due = self.due(now)
        if due:
            self.warned, self._warned_at = self.warned + 1, now
        return due

    def due(self, now: float) -> bool:
        """Tell whether to warn if nothing is found."""
        return self.warned < 2 and now - self._warned_at >= REMIND


class Unwatched:
    """What a target shows of which no rule knows anything, and when that was told."""

    def __init__(self, since: float) -> None:
        # As if an empty page, where nothing may have happened yet, had been told of
        # so long ago that it is again in five minutes.
        self.warned_at = since + REMIND - REMIND_OF_TARGET
        self.empty, self.remark = True, ""

    def shows(self, names: AbstractSet[str], now: float) -> bool:
        """Take what it shows now; tell whether to warn: at once, and each hour."""
        pause = REMIND_OF_TARGET if self.empty == (not names) else REMIND
        due = now - self.warned_at >= pause
        self.warned_at = now if due else self.warned_at
        self.empty, self.remark = not names, describe_page(names)
        return due


class Lookout:
    """Warns while the selectors of users' rules, or all rules, find nothing.

    One thread at a time may use it.  Times are monotonic.
    """

    def __init__(self, config: Config, others: Iterable[Rule] = ()) -> None:
        added, self._config = reserved_names(config), config
        users = [rule for rule in config.rules if not rule.builtin]
        self._searches = _searches_for(users, added)
        # Of other names that built-in rules read it does not follow which server it is.
        watched = (server for server in SERVERS if server.watched)
        self._names = frozenset().union(*map(own_names, watched))
        # A rule of a user's own that finds nothing is told of by itself.
        reads = (s.name for rule in config.rules for s in find_selectors(rule.expr))
        self._builtin = not self._searches and any(name not in added for name in reads)
        self._searches.update(_searches_for(others, added))
        self._unwatched: dict[str, Unwatched] = {}
        self._asked = False
        self._reserved: set[str] = set()
        self._thinned: dict[tuple[str, Selector], float] = {}

    def wants_names(self, now: float) -> bool:
        """Tell whether the next scrapes should list the names of all metrics."""
        searches, unwatched = self._searches.values(), self._unwatched.values()
        return (
            not self._asked
            or any(s.due(now) and (s.warned or not s.homes) for s in searches)
            # An empty page costs nothing to list.
            or any(u.empty or now - u.warned_at >= REMIND_OF_TARGET for u in unwatched)
        )

    def look(
        self, readings: Mapping[str, Reading], evaluation: Evaluation
    ) -> Iterator[Message]:
        """Yield what is to be said of what the good scrapes of a check have read.

        These are by the instance of their target.  What is not taken is yielded again.
        """
        names = {name for read in readings.values() for name in read.listed or ()}
        if evaluation.thinned:
            yield from self._look_at_ranges(evaluation.thinned)
        if not self._asked:
            yield from self._look_at_servers(names)
        for instance, reading in readings.items():
            yield from self._look_at_reserved(reading.reserved)
            if self._builtin:
                yield from self._look_at(instance, reading, evaluation.now)
        if readings:
            yield from self._search(frozenset(readings), names, evaluation)

    def remark(self, target: TargetStatus) -> TargetStatus:
        """Return how a scrape went with what is to be said of its page."""
        page = self._unwatched.get(target.instance)
        remark = page.remark if page and not target.reason else ""
        return target._replace(remark=remark or target.remark, watched=not remark)

    def _search(
        self, scraped: frozenset[str], names: AbstractSet[str], evaluation: Evaluation
    ) -> Iterator[Message]:
        own = self._config.target_labels
        for (rule, selector), search in self._searches.items():
            homes = homes_of(selector, scraped, evaluation)
            if search.misses(homes, scraped, evaluation.now):
                text = describe_missing(selector, search, names, evaluation, own)
                fields = {"rule": rule, "selector": format_expression(selector)}
                yield logging.WARNING, f"{rule}: {text}", fields

    def _look_at_ranges(self, thinned: Mapping[str, float]) -> Iterator[Message]:
        rules = self._config.rules
        for key in ((r.name, s) for r in rules for s in find_selectors(r.expr)):
            rule, selector = key
            apart = thinned.get(selector.name, 0.0) if selector.window else 0.0
            if apart > self._thinned.get(key, 0.0):
                self._thinned[key] = apart
                text = format_expression(selector)
                kept = f"only samples that are {format_duration(apart)} apart are kept"
                message = f"{rule}: {kept} of {text}: HISTORY_LIMIT is too small"
                yield logging.WARNING, message, {"rule": rule, "selector": text}

    def _look_at(
        self, instance: str, reading: Reading, now: float
    ) -> Iterator[Message]:
        names = reading.listed
        if any(dict(labels)["__name__"] in self._names for labels in reading.samples):
            self._unwatched.pop(instance, None)
        else:
            page = self._unwatched.setdefault(instance, Unwatched(now))
            if names is not None and page.shows(names, now):
                text = f"{instance}: {page.remark}"
                yield logging.WARNING, text, {"target": instance}

    def _look_at_reserved(self, names: AbstractSet[str]) -> Iterator[Message]:
        for name in names - self._reserved:
            self._reserved.add(name)
            text = f"the target serves {name}, which is set here: dropped"
            yield logging.WARNING, text, {"metric": name}

    def _look_at_servers(self, names: AbstractSet[str]) -> Iterator[Message]:
        self._asked, there = bool(names), list(servers_there(names))
        conflict = there and port_conflict(self._config.app_port, there)
        if conflict:
            yield logging.WARNING, conflict, {}


def _searches_for(
    rules: Iterable[Rule], added: Container[str]
) -> dict[tuple[str, Selector], Search]:
    found = [(rule.name, s) for rule in rules for s in find_selectors(rule.expr)]
    wanted = [(name, s) for name, s in found if s.name not in added]
    return {(name, Selector(*s[:2])): Search() for name, s in wanted}


def rules_of_settings(config: Config) -> Iterator[Rule]:
    """Yield what settings ask beside the rules, each as a rule of that name."""
    if config.drain_while:
        yield Rule("DRAIN_WHILE", config.drain_while)
    for rule in config.canary_when if "CANARY_WHEN" in config.given else ():
        yield rule._replace(name="CANARY_WHEN")


def describe_page(names: AbstractSet[str]) -> str:
    """Return what is wrong with a page of which no rule knows a metric.

    >>> describe_page(set())
    'nothing is watched: its page is empty, maybe until the first request'
    """
    if not names:
        return "nothing is watched: its page is empty, maybe until the first request"
    count = f"any of its {len(names)}{' or more' * (len(names) >= MAX_NAMES)} metrics"
    count = count if len(names) > 1 else "its only metric"
    text = f"nothing is watched: no rule knows {count}"
    there, near = next(servers_there(names), None), nearest_server(names)
    queue = nearest_name(near.waiting, names) if near else ""
    if there:
        text += f"; {there.name} {there.remark}"
    elif near:
        text += f", most like those of {near.name}, maybe until the first request"
    metric = f"={format_selector(queue, ())}" if queue else ""
    return f"{text}: set METRIC_TO_CHECK{metric} and METRIC_THRESHOLD or UNHEALTHY_WHEN"


def describe_missing(
    selector: Selector, search: Search, names: Iterable[str], evaluation: Evaluation,
    own: Labels = (),
) -> str:  # fmt: skip
    """Return what to say of a selector that finds nothing, and what may be why.

    ``names`` are the metrics that are there, and ``own`` the labels of targets.
    """
    text = f"no series of {format_expression(selector)} is there"
    there = evaluate(Selector(selector.name), evaluation)
    near = nearest_name(selector.name, names)
    if search.homes or not (there or near):
        text += " any more" if search.homes else " yet"
    if there:
        return f"{text}: {find_fault(selector.matchers, there, own)}"
    return f"{text}; {format_selector(near, ())} is" if near else text


def homes_of(
    selector: Selector, instances: Iterable[str], evaluation: Evaluation
) -> frozenset[str]:
    """Return which of these targets have a series of a selector now."""
    now, found = evaluation.now, select(selector, evaluation).items()
    return frozenset(
        instance for instance in instances
        if any(("instance", instance) in k and s.time == now for k, s in found)
    )  # fmt: skip


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return the name that may be meant by another, empty if none may.

    >>> nearest_name("vllm:num_request_waiting", ["up", "vllm:num_requests_waiting"])
    'vllm:num_requests_waiting'
    >>> nearest_name("vllm:num_requests_waiting", ["vllm:num_requests_running"])
    ''
    """

    def common(other: str) -> int:
        return common_prefix(name, other) + common_prefix(name[::-1], other[::-1])

    # With thousands of names made to be alike, difflib would take seconds.
    likely = sorted(names, key=common, reverse=True)[:50]
    near = most_like(name, likely, 10, 0.5)
    return next((other for other in near if _may_mean(name, other)), "")


def _may_mean(name: str, other: str) -> bool:
    """Tell whether names differ in typos, suffixes, and one part at their beginning."""
    one, two = (re.split(r"[:._]+", text.lower()) for text in (name, other))
    plain = ([part for part in parts if part not in SUFFIXES] for parts in (one, two))
    return _are_alike(one, two) or _are_alike(*plain)


def _are_alike(one: Sequence[str], two: Sequence[str]) -> bool:
    pairs = list(zip(reversed(one), reversed(two)))
    few = abs(len(one) - len(two)) < min(2, len(pairs))
    return few and all(itertools.starmap(_may_be_typo, pairs))


def _may_be_typo(part: str, other: str) -> bool:
    digits = [re.sub(r"\D", "", text) for text in (part, other)]
    alike = digits[0] == digits[1] and most_like(other, [part], 1, 0.75)
    return {part, other} == RENAMED or bool(alike)


# --- 14. Probe: canary and health route -> whether a server answers ------------------
# An engine that hangs while it is idle says 0 run, 0 wait for ever, and gauges that
# stand still look the same whether it hangs or its clients left.  Only a request tells;
# the metrics say when it is needed, so that it is almost never sent.

MAX_COMPLETION = 64 * 1024
REPEAT, MODEL_LABEL = 60.0, "model_name"
# Where the text is: by OpenAI, TGI, SGLang, llama-server, Triton, KServe, Ollama.
COMPLETIONS = (
    "choices", "generated_text", "text", "content", "text_output", "outputs",
    "predictions", "response",
)  # fmt: skip
# With these it is the request that is wrong, or what it is sent with.
NO_SIGN = ("dns", "tls", "redirect", "credentials")
Finding = Tuple[Union[bool, None], str, str]
"""Whether it is a success, and why not: in a word for rules, and for people."""
SOUND: Finding = True, "", ""
MEND = {401: "CANARY_BEARER_TOKEN_FILE", 403: "CANARY_BEARER_TOKEN_FILE",
        404: "CANARY_URL or CANARY_BODY", 405: "CANARY_URL"}  # fmt: skip


def ask(
    probe: str, target: Target, deadline: float, body: bytes | None = None,
    overtime: float = 0.0,
) -> ProbeStatus:  # fmt: skip
    """Ask a server; 2xx is success, as to blackbox_exporter.

    With a ``body`` the answer must hold a completion.
    """
    started, code = time.monotonic(), 0
    try:
        with fetch(target, deadline, body, overtime) as response:
            code, found = response.status, SOUND
            if body:
                found = judge_completion(code, _read(response, deadline))
            elif not 200 <= code < 300:
                # The body of a health route tells no more than its status.
                found = False, "http_status", f"HTTP {code}"
    except ScrapeError as error:
        success = None if body and error.reason in NO_SIGN else False
        found = success, error.reason, str(error)
    (success, reason, message), seconds = found, time.monotonic() - started
    return ProbeStatus(
        probe, target.instance, success, code, reason, message, seconds, started
    )


def ask_canary(config: Config, target: Target, model: str) -> ProbeStatus:
    """Ask for a completion, of a model or of the first that the server names."""
    deadline, body = time.monotonic() + config.canary_timeout, config.canary_body
    if not body:
        model = model or _served_model(target, deadline)
        body = completion_request(target.url, model)
    return ask("canary", target, deadline, body)


class Canary:
    """Asks for a completion in a thread of its own, one request at a time.

    The thread that checks calls ``consider``, with the ``latest`` answer, which is
    replaced as a whole.  It gives an order only once the one before is ``answered``.
    """

    def __init__(self, config: Config, target: Target) -> None:
        self._config, self._target = config, target
        self.latest, self._asks = ProbeStatus("canary", target.instance), False
        self._orders: queue.SimpleQueue[tuple[str, ProbeStatus] | None]
        self._orders = queue.SimpleQueue()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="canary", daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end; a request that hangs ends with the process."""
        self._orders.put(None)

    def answered(self) -> bool:
        """Tell whether no request is in flight."""
        return not self._asks

    def consider(
        self, latest: ProbeStatus, when: Iterable[RuleStatus],
        stalls: Iterable[RuleStatus], evaluation: Evaluation,
    ) -> ProbeStatus:  # fmt: skip
        """Ask if that is due, and return what the latest answer says now.

        ``when`` are the rules that ask for it, and ``stalls`` those it may answer.
        """
        now, after = evaluation.now, self._config.canary_after
        since, about = _standstill(when)
        # An answer may have come since the one that is considered.
        if self.answered() and is_due(self.latest, since, now, after):
            self._asks, order = True, latest._replace(sent=now, about=about)
            self._orders.put((_model(evaluation.history), order))
        # An engine for which another has answered goes on standing still.
        older = any(a.since <= latest.sent for s in stalls for a in s.alerts)
        same = about == latest.about and not older
        return as_of(latest, since, now, after, same)

    def _run(self) -> None:
        for model, order in iter(self._orders.get, None):
            try:
                found = ask_canary(self._config, self._target, model)
            except Exception as error:
                text, instance = report(error), self._target.instance
                found = ProbeStatus("canary", instance, None, 0, "bug", text)
            self.latest = found._replace(sent=order.sent, about=order.about)
            self._asks = False


def completion_request(url: str, model: str) -> bytes:
    """Return a request for one token; for none vLLM answers without its engine.

    >>> completion_request("http://localhost/v1/completions", "")
    b'{"max_tokens": 1, "prompt": "Hi"}'
    """
    request: dict[str, Any] = {"max_tokens": 1, "prompt": "Hi"}
    if url.endswith("/chat/completions"):
        message = {"role": "user", "content": "Hi"}
        request = {"max_tokens": 1, "messages": [message]}
    return json.dumps({**request, "model": model} if model else request).encode()


def judge_completion(code: int, body: bytes) -> Finding:
    """Return whether an answer shows a sound engine, and why not.

    None where it shows nothing: a status below 500 says that the request is wrong.
    """
    if code != 200:
        text = redact(f"HTTP {code}: {body[:200].decode(errors='replace')}")
        if code >= 500:
            return False, "http_status", text
        return None, "refused_request", f"mend {MEND.get(code, 'CANARY_BODY')}: {text}"
    answer = None
    with suppress(ValueError, RecursionError):
        answer = json.loads(body)
    answer = answer[0] if isinstance(answer, list) and answer else answer
    answer = answer if isinstance(answer, dict) else {}
    found = any(answer.get(name) not in (None, [], {}) for name in COMPLETIONS)
    if found and not answer.get("error"):
        return SOUND
    return False, "no_completion", f"200 with {redact(repr(body[:200]))}"


def as_of(
    status: ProbeStatus, since: float | None, now: float, after: float, same: bool
) -> ProbeStatus:
    """Return what a result says now, when nothing has moved ``since``; None: it moves.

    A result is about the standstill in which it was sent.  A success goes on standing
    where nothing but itself has moved, so that all is the ``same``.  A failure is none
    while something moves, as the server was busy, nor before nothing has moved for
    ``after``, as it may be busy with one long request.
    """
    current = since is not None and since <= status.sent
    if status.success is not False:
        return status._replace(stands=current or (since is not None and same))
    if not current:
        return status._replace(success=None, reason="", message="")
    early = since is not None and now - since < after
    return status._replace(success=None) if early else status


def is_due(status: ProbeStatus, since: float | None, now: float, after: float) -> bool:
    """Tell whether to ask, when nothing has moved ``since``; None is that it moves."""
    fails = status.success is False and since is not None and since <= status.sent
    return since is not None and now - status.sent >= (REPEAT if fails else after)


def _standstill(
    when: Iterable[RuleStatus]
) -> tuple[float | None, frozenset[tuple[Labels, float]]]:
    """Return since when nothing moves, None if it does, and what stands still."""
    alerts = itertools.chain.from_iterable(status.alerts for status in when)
    firing = [alert for alert in alerts if alert.state == "firing"]
    about = frozenset((alert.labels, alert.value) for alert in firing)
    return min((alert.since for alert in firing), default=None), about


def _model(series: SeriesByName) -> str:
    labels = itertools.chain.from_iterable(itertools.chain(*series.values()))
    return next((value for name, value in labels if name == MODEL_LABEL), "")


def _served_model(target: Target, deadline: float) -> str:
    base, version, _ = target.url.partition("/v1/")
    if version:
        models = target._replace(url=f"{base}/v1/models")
        with suppress(ScrapeError, LookupError, TypeError, ValueError, RecursionError):
            with fetch(models, deadline) as response:
                answer = _read(response, deadline)
            return str(json.loads(answer)["data"][0]["id"])
    return ""


def _read(response: Response, deadline: float) -> bytes:
    buffer = bytearray(MAX_COMPLETION)
    size = fill(memoryview(buffer), reader_of(response, deadline))
    if size == MAX_COMPLETION:
        raise ScrapeError("too_large", f"an answer of {MAX_COMPLETION} bytes or more")
    return bytes(buffer[:size])


# --- 15. History: samples of each check -> what expressions are evaluated against ----

POINTS_PER_RANGE, LEAST_POINTS = 512, 32
# Series that selectors match are known to the next checks, too, up to so many.
MAX_SELECTED = 10_000
# What a series takes besides its samples and the text of its labels, with what a check
# of it takes for a moment and what arrays leave behind as they grow, measured.
SERIES_BYTES = 2000
# Checks that are not looked at any more are forgotten so many at once, or a share.
SPARE = 16


class History:
    """Remembers the series that expressions read, as far back as they look.

    It has no thread, lock, clock or network: whoever checks calls it, and no other
    thread may touch it meanwhile.  Times are monotonic seconds, never less than before.
    All of it takes ``limit`` bytes at most: more samples are forgotten where that is
    not enough.
    """

    def __init__(self, wanted: Mapping[str, Lookback], limit: int) -> None:
        # Of the metrics that are there: most are of other servers, and cost nothing.
        self._tables: dict[str, Table] = {}
        self._wanted = dict(wanted)
        self._known: dict[Labels, Series] = {}
        # Which of them selectors match, until a series comes or goes.
        self._selected: dict[object, Any] = {}
        self._limit, self._labels_size = limit, 0
        self._epoch = 0.0

    @property
    def names(self) -> AbstractSet[str]:
        """The metrics that are there."""
        return self._tables.keys()

    def room(self) -> int:
        """Return the bytes that are left for new series; a quarter is for samples."""
        return self._limit * 3 // 4 - self._labels_size

    def cost(self, series: Iterable[Labels]) -> int:
        """Return the bytes that those of these series take that are new."""
        return sum(_size(labels) for labels in series if labels not in self._known)

    def thinned(self) -> dict[str, float]:
        """Return the metrics of which samples had to go, and the seconds between two.

        That is how far those are apart, at least, that are kept from now on.
        """
        tables = self._tables.items()
        return {name: t.least * t.stretch for name, t in tables if t.stretch > 1}

    def record(
        self, samples: Mapping[Labels, float], now: float, names: Container[str]
    ) -> None:
        """Remember what a check has found of these metrics, and forget what is too old.

        For each of them it is called once a check.
        """
        tables = [table for name, table in self._tables.items() if name in names]
        for table in tables:
            table.begin_check(samples, now, self._epoch)
        for labels, value in samples.items():
            series = self._known.get(labels) or self._new_series(labels, now)
            if series:
                series.add(value)
        for table in tables:
            self._forget(table, samples, now)
        self._keep_to_limit()

    def forget(self, name: str) -> None:
        """Remember no series of a metric, from now on."""
        del self._wanted[name]
        table = self._tables.get(name)
        if table:
            for labels in list(table.series):
                self._drop(table, labels)

    def evaluation(self, now: float, wall: float) -> Evaluation:
        """Return what expressions are evaluated against, as of the latest record."""
        self._epoch = now - wall
        series = {name: table.series for name, table in self._tables.items()}
        names = frozenset(series)
        if sum(map(len, self._selected.values())) > MAX_SELECTED:
            self._selected = {}
        return Evaluation(now, wall, series, self._selected, {}, names, self.thinned())

    def _new_series(self, labels: Labels, now: float) -> Series | None:
        name = dict(labels)["__name__"]
        if name not in self._wanted:
            return None
        table = self._tables.get(name)
        if not table:
            table = self._tables[name] = Table(name, self._wanted[name], now)
        self._labels_size += _size(labels)
        self._selected = {}
        series = table.series[labels] = self._known[labels] = Series(table.checks)
        return series

    def _forget(
        self, table: Table, samples: Mapping[Labels, float], now: float
    ) -> None:
        # Not the difference of the keys, which looks at all samples for each table.
        for labels in [labels for labels in table.series if labels not in samples]:
            if table.series[labels].time <= now - table.seconds:
                self._drop(table, labels)
        old = bisect_right(table.checks, now - table.seconds) if table.seconds else 0
        if old > SPARE + len(table.checks) // SPARE:
            self._keep(table, old)

    def _drop(self, table: Table, labels: Labels) -> None:
        del table.series[labels], self._known[labels]
        self._labels_size -= _size(labels)
        self._selected = {}
        if not table.series:
            del self._tables[table.name]

    def _keep(self, table: Table, start: int, step: int = 1) -> None:
        for labels, series in list(table.series.items()):
            if not series.keep(start, step):
                self._drop(table, labels)
        table.checks[:] = table.checks[start::step]

    def _keep_to_limit(self) -> None:
        tables = [*self._tables.values()]
        # At most, as if each check had found each series, and less than before.
        most = sum(len(table.checks) * (9 + 13 * len(table.series)) for table in tables)
        room = self._limit - self._labels_size
        if most < room // 4:
            for table in tables:
                table.stretch = 1.0
        while most > room and sum(map(Table.size, tables)) > room:
            largest = max(tables, key=Table.size)
            if len(largest.checks) < 2:
                # The labels of many targets may take more than there is.
                break
            largest.thin()
            self._keep(largest, (len(largest.checks) - 1) % 2, 2)


class Table:
    """The series of one metric, and the times of the checks that they share.

    A check is not kept if it tells nothing that its neighbours do not and these are
    less than ``spacing`` seconds apart, or less than ``least`` whatever it tells: both
    ``stretch`` times as much once the history had to be thinned.
    """

    def __init__(self, name: str, lookback: Lookback, now: float) -> None:
        self.name, self.seconds = name, lookback.seconds
        self.checks = array("d", [now])
        self.series: dict[Labels, Series] = {}
        self.least, self.step, self.stretch = lookback.least, lookback.step, 1.0
        # A short range beside a long one of the same metric needs points of its own.
        wanted = min(self.seconds / POINTS_PER_RANGE, lookback.shortest / LEAST_POINTS)
        self.spacing = max(wanted, self.least)

    def begin_check(
        self, samples: Mapping[Labels, float], now: float, epoch: float
    ) -> None:
        """Take the time of a new check, in place of the newest if that may go.

        ``epoch`` is the monotonic time of 1970, from which steps are counted.
        """
        steps = self.step and self._is_step_between(now, epoch)
        if not steps and self._tells_nothing(samples):
            self.checks[-1] = now
        else:
            self.checks.append(now)

    def size(self) -> int:
        """Return the bytes that the samples take."""
        columns = ((s.values, s.falls, s.gaps) for s in self.series.values())
        numbers = sum(
            2 * len(values) + len(falls) + len(gaps) for values, falls, gaps in columns
        )
        # An array that grows has room for a sixteenth more.
        return (2 * len(self.checks) + numbers) * 17 // 4

    def thin(self) -> None:
        """Keep checks twice as far apart from now on."""
        apart = (self.checks[-1] - self.checks[0]) / (len(self.checks) - 1)
        self.stretch = 2 * max(self.stretch, apart / self.least)

    def _is_step_between(self, now: float, epoch: float) -> bool:
        """Tell whether a step sees the newest check and not the one of now."""
        newest = self.checks[-1] - epoch
        return math.ceil(newest / self.step) * self.step < now - epoch

    def _tells_nothing(self, samples: Mapping[Labels, float]) -> bool:
        """Tell whether the newest check may be replaced by one that finds these."""
        if not self.seconds or len(self.checks) < 2:
            return not self.seconds
        apart = self.checks[-1] - self.checks[-2]
        if apart >= self.spacing * self.stretch:
            return False
        newest, any_goes = len(self.checks) - 1, apart < self.least * self.stretch
        return all(
            _is_between(series, newest - series.first, samples.get(labels), any_goes)
            for labels, series in self.series.items()
        )


def _is_between(
    series: Series, index: int, value: float | None, any_goes: bool
) -> bool:
    """Tell whether the newest check says no more of a series than its neighbours.

    A peak or a fall does, as falls are the resets of counters, and so does that a
    series comes or goes.  The last sample of a series is kept even if ``any_goes``.
    """
    values, count = series.values, len(series.values)
    if count <= index:
        return any_goes or count < index
    if value is None or any_goes:
        return value is not None
    known = index > 0 and index - 1 not in series.gaps
    return known and values[-2] <= values[-1] <= value


def _size(labels: Labels) -> int:
    return SERIES_BYTES + sum(len(value) for _, value in labels)


# --- 16. Scraper: targets -> scrapes, by a worker each, under one deadline -----------

GRACE = 0.05
# How long a request that has had no answer in time is not sent again: a server that
# does not notice that its caller is gone keeps a thread for each.
LEAST_OVERTIME, MOST_OVERTIME = 60.0, 600.0


class Scrape(NamedTuple):
    """How a scrape went, the target's own labels, and what was read if it succeeded."""

    status: TargetStatus
    labels: Labels
    reading: Reading | None = None

    @property
    def samples(self) -> dict[Labels, float]:
        """The wanted samples of the target."""
        return self.reading.samples if self.reading else {}

    def failed(self, reason: str, message: str) -> Scrape:
        """Return the same scrape as one that has failed."""
        status = self.status._replace(reason=reason, message=message)
        return self._replace(status=status, reading=None)

    def synthetic(self) -> dict[Labels, float]:
        """Return the samples that Prometheus adds to a scrape, and why it failed."""
        status = self.status
        added = {
            "up": float(not status.reason),
            "scrape_duration_seconds": status.seconds,
            "scrape_body_size_bytes": float(status.size),
            "scrape_samples_scraped": float(status.samples),
        }
        return label_all(added, self.labels, "scrape_error", status.reason)


Found = Tuple[Sequence[Scrape], Tuple[ProbeStatus, ...]]
"""What is known of each target, and what the health routes say."""


class Job(NamedTuple):
    """The order to scrape all targets once, until a monotonic deadline.

    ``results`` are late until each worker, by its number, has put there what it has
    found; the last of them calls ``then`` with the job, maybe long after the deadline.
    """

    deadline: float
    list_names: bool
    results: list[Any]
    done: list[int]
    then: Callable[[Job], object]

    @property
    def overdue(self) -> float:
        """How many seconds ago it was to end, a worker's word at the deadline heard."""
        return time.monotonic() - self.deadline - GRACE


class Scraper:
    """Asks all targets and health routes at once, a worker thread for each.

    Only the thread that begins a check gives jobs; ``_orders`` has the newest job of
    each worker, or None to end.  A check goes on without a worker that is late: that
    one still reads its answer, and takes the newest job after it.  ``_known`` has the
    series of each target's last scrape, for its worker alone.  ``spare`` names are read
    by built-in rules only: they go first where a page has more series than fit.
    """

    def __init__(
        self, config: Config, names: Iterable[str], spare: frozenset[str] = frozenset()
    ) -> None:
        self._config, self._targets = config, config.metrics_endpoint
        self._routes, reserved = config.health_endpoint, reserved_names(config)
        self._formats = [
            format_for(names, self._blank(target).labels, reserved, spare)
            for target in self._targets
        ]
        self._known: list[dict[bytes, Labels]] = [{} for _ in self._targets]
        self._orders: list[queue.SimpleQueue[Job | None]] = [
            queue.SimpleQueue() for _ in (*self._targets, *self._routes)
        ]
        self.threads: list[threading.Thread] = []
        timeout = config.metrics_timeout
        late = "timeout", f"no answer within {format_duration(timeout)}"
        late_probe = False, 0, *late, timeout
        self._late: list[Any] = [
            *(self._blank(target, timeout).failed(*late) for target in self._targets),
            *(ProbeStatus("health", r.instance, *late_probe) for r in self._routes),
        ]

    def start(self) -> None:
        """Start the workers."""
        for number, target in enumerate((*self._targets, *self._routes)):
            work, name = partial(self._work, number), f"scrape {target.instance}"
            self.threads.append(threading.Thread(target=work, name=name, daemon=True))
            self.threads[-1].start()

    def stop(self) -> None:
        """Ask the workers to end; a scrape that hangs ends with the process."""
        self._order(None)

    def scrape(self, *, list_names: bool = False) -> Found:
        """Scrape all targets; return what is known of each at the deadline."""
        ended = threading.Event()
        job = self.begin(lambda _: ended.set(), list_names=list_names)
        ended.wait(-job.overdue)
        return self.found(job)

    def begin(
        self, then: Callable[[Job], object], *, list_names: bool = False
    ) -> Job:
        """Ask the workers to scrape all targets, and what is to be done then.

        ``list_names`` asks for the names of all metrics too.
        """
        deadline = time.monotonic() + self._config.metrics_timeout
        job = Job(deadline, list_names, list(self._late), [], then)
        self._order(job)
        return job

    def found(self, job: Job) -> Found:
        """Return what is known of each target, and what the health routes say."""
        count = len(self._targets)
        return job.results[:count], tuple(job.results[count:])

    def _blank(self, target: Target, seconds: float = 0.0) -> Scrape:
        labels = (("instance", target.instance), *self._config.target_labels)
        return Scrape(TargetStatus(target.instance, seconds=seconds), labels)

    def _order(self, job: Job | None) -> None:
        for orders in self._orders:
            # What a worker was too late to take is of no use any more.
            with suppress(queue.Empty):
                orders.get_nowait()
            orders.put(job)

    def _work(self, number: int) -> None:
        overtime = LEAST_OVERTIME
        ask = self._scrape if number < len(self._targets) else self._ask
        for job in iter(self._orders[number].get, None):
            job.results[number] = ask(number, job, overtime)
            given_up = time.monotonic() >= job.deadline + overtime
            overtime = min(2 * overtime, MOST_OVERTIME) if given_up else LEAST_OVERTIME
            job.done.append(number)
            if len(job.done) == len(self._orders):
                job.then(job)

    def _scrape(self, number: int, job: Job, overtime: float) -> Scrape:
        target, started = self._targets[number], time.monotonic()
        scrape = self._blank(target)
        try:
            with open_stream(target, job.deadline, overtime) as stream:
                known, format = self._known[number], self._formats[number]
                if format.dropped & format.names:
                    format = self._formats[number] = without_dropped(format)
                reading = read_samples(stream, format, known, job.list_names)
            remark = too_many(reading.dropped) if reading.dropped else ""
            self._known[number], count = reading.series, len(reading.samples)
            status = scrape.status._replace(
                size=reading.size, series=count, samples=reading.lines, remark=remark
            )
            scrape = scrape._replace(status=status, reading=reading)
        except ScrapeError as error:
            late, failed = self._late[number], scrape.failed(error.reason, str(error))
            scrape = late if error.reason == "timeout" else failed
        except Exception as error:
            scrape = scrape.failed("bug", report(error))
        status = scrape.status._replace(seconds=time.monotonic() - started)
        return scrape._replace(status=status)

    def _ask(self, number: int, job: Job, overtime: float) -> ProbeStatus:
        route = self._routes[number - len(self._targets)]
        try:
            return ask("health", route, job.deadline, overtime=overtime)
        except Exception as error:
            return ProbeStatus("health", route.instance, None, 0, "bug", report(error))


# --- 17. Monitor: checks when asked or on a schedule -> Verdicts ---------------------

MAX_GAP, MAX_INTERVALS = 300.0, 3
# How long Down may not fire for a time out: 30 s, and up to 1 s for its range of 31 s.
TOLERATED = 31.0
MAX_LATE, MAX_OVERDUE, MAX_DRAIN_PAUSE = 0.25, 60.0, 5.0
# What an alert of four labels takes besides their text, measured: 400, and a margin.
ALERT_BYTES = 500
TREND = 120
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
NO_SERVER = "whether a request runs is not known: set DRAIN_WHILE"
NO_ROOM = (
    "too many series: label values may change with each scrape; all there is room for"
    " is HISTORY_LIMIT"
)


Listener = Callable[[Verdict, Verdict], object]
"""What is called with the verdict before and the new one."""


class Check(NamedTuple):
    """A check that runs: when it began, and if it tells what DRAIN_WHILE gives.

    ``answer`` is the canary's from before the scrape, which so has seen what that
    answer has moved.
    """

    now: float
    wall: float
    drain: bool = False
    answer: ProbeStatus | None = None
    again: bool = False


class Monitor:
    """Checks on demand or on a schedule, and publishes a Verdict each time.

    One check runs at a time, from when scrapes are ordered for it until its verdict is
    published: by the worker that has the last scrape, or by this class' own thread if
    the deadline comes first.  Meanwhile only that thread, or whoever calls ``check``
    and has started no thread, touches ``judge``, which makes a Verdict of scrapes; any
    may ask for its ``drain_while``.  The lock guards what is asked for, which check
    runs, and whose scrapes are waited for.  ``verdict`` is replaced as a whole: any
    thread may read it.  ``listeners`` are called in order.
    """

    def __init__(
        self, config: Config, *, clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.config, self._clock, self._wall = config, clock, wall
        self.verdict = Verdict(0, "not checked yet", clock(), wall())
        # How long a request waits at most for the check that it asked for.
        self.verdict_timeout = config.metrics_timeout + 2 * GRACE
        self._changed = threading.Condition()
        self._asked, self._stopped = -1, False
        self._running: Check | None = None
        self._awaited: Job | None = None
        # When the schedule wants a check, and until when the thread sleeps.
        self._due = self._wakes = math.inf
        # Checks that begin until then tell what DRAIN_WHILE still gives.
        self.drains_until = -math.inf
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self.canary = Canary(config, config.canary_url) if config.canary_url else None
        self.judge = Judge(config, [*rules_of_settings(config)], self.canary)
        self.scraper = Scraper(config, self.judge.wanted, self.judge.spare)
        self.statistics = Statistics(config.rules)
        self.listeners: list[Listener] = [self.statistics.add]

    def start(self) -> None:
        """Start the threads; what they do is asked for."""
        self.scraper.start()
        if self.canary:
            self.canary.start()
        self._thread.start()

    def stop(self) -> None:
        """Ask all threads to end."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self.scraper.stop()
        if self.canary:
            self.canary.stop()

    def alive(self) -> bool:
        """Tell whether the threads for checks live, and no check is a minute late."""
        check, threads = self._running, (self._thread, *self.scraper.threads)
        late = self._clock() - check.now - self.verdict_timeout if check else 0.0
        return all(thread.is_alive() for thread in threads) and late < MAX_OVERDUE

    def request(self, sequence: int) -> None:
        """Ask for a verdict after the one of that number; a running check will do."""
        with self._changed:
            self._asked = max(self._asked, sequence)
            self._begin_if_wanted()

    def check(self) -> Verdict:
        """Check in the thread of the caller, who has started none."""
        check = self._new_check()
        list_names = self.judge.lookout.wants_names(check.now)
        self._finish(check, self.scraper.scrape(list_names=list_names))
        return self.verdict

    def _run(self) -> None:
        while not self._stopped:
            with self._changed:
                self._begin_if_wanted()
                self._wakes = self._next_deadline()
                left = max(self._wakes - time.monotonic(), 0.0)
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
                job = self._awaited
            if job and job.overdue >= 0:
                job.then(job)

    def _next_deadline(self) -> float:
        """Return when the thread is needed; who judges needs it for nothing."""
        if self._awaited:
            return self._awaited.deadline + GRACE
        return math.inf if self._running else self._due

    def _begin_if_wanted(self, *, again: bool = False) -> None:
        """Begin a check if one is wanted and none runs; the caller has the lock."""
        due = time.monotonic() >= self._due
        wanted = again or due or self._asked >= self.verdict.sequence
        if wanted and not self._running and not self._stopped:
            self._due = time.monotonic() + (self.config.scrape_interval or math.inf)
            try:
                self._running = check = self._new_check(again=again)
            except Exception as error:
                self._publish(self._fault(error))
            else:
                list_names = self.judge.lookout.wants_names(check.now)
                end = partial(self._end, check)
                self._awaited = self.scraper.begin(end, list_names=list_names)
        if self._next_deadline() < self._wakes:
            self._changed.notify()

    def _new_check(self, *, again: bool = False) -> Check:
        now, answer = self._clock(), self.canary.latest if self.canary else None
        return Check(now, self._wall(), now < self.drains_until, answer, again)

    def _end(self, check: Check, job: Job) -> None:
        """Judge what a job has found, unless another thread was first."""
        with self._changed:
            if job is not self._awaited:
                return
            self._awaited = None
            if job.overdue > MAX_LATE and not check.again:
                # This process was suspended meanwhile: what it has seen is old.
                self._running = None
                self._begin_if_wanted(again=True)
                return
        self._finish(check, self.scraper.found(job))

    def _finish(self, check: Check, found: Found) -> None:
        try:
            verdict = self.judge.verdict_of(check, found, self.verdict)
        except Exception as error:
            verdict = self._fault(error)
        self._publish(verdict)
        with self._changed:
            self._running = None
            self._begin_if_wanted()

    def _fault(self, error: Exception) -> Verdict:
        # The time stays that of the verdict before: a clock may be what is broken.
        before, fault = self.verdict, f"bug: {report(error)}"
        return Verdict(before.sequence + 1, fault, before.time, before.wall)

    def _publish(self, verdict: Verdict) -> None:
        before, self.verdict = self.verdict, verdict
        for listener in self.listeners:
            _tell(listener, before, verdict)


class Judge:
    """Judges what scrapes find: has the rules with their states, and what they read.

    It has no thread and no lock: one thread at a time calls it.  ``wanted`` are the
    metrics that it reads, and ``spare`` those that built-in rules alone do.  What the
    ``others`` read is there to be evaluated too, and ``warn`` tells what is missing.
    """

    def __init__(
        self, config: Config, others: Sequence[Rule], canary: Canary | None = None,
        warn: Callable[[Iterable[Message]], object] = log_some,
    ) -> None:  # fmt: skip
        rules = (*config.rules, *config.canary_when, *others)
        builtin = [rule.expr for rule in rules if rule.builtin]
        users = [rule.expr for rule in rules if not rule.builtin]
        self._config, self._expressions = config, [*builtin, *users]
        backs, self._canary = lookbacks(self._expressions), canary
        self.wanted = frozenset(backs)
        self.spare = self.wanted.difference(lookbacks(users))
        self.history = History(backs, config.history_limit)
        self.lookout, self._warn = Lookout(config, others), warn
        self._statuses = tuple(RuleStatus(rule) for rule in config.rules)
        self._when = tuple(RuleStatus(rule) for rule in config.canary_when)
        self._dropped: set[str] = set()
        self._scraped = False

    @cached_property
    def drain_while(self) -> Expr | None:
        """What gives the requests that run or wait; it is made when first asked for."""
        own = dict(self._config.target_labels)
        return self._config.drain_while or drain_expression(self._expressions, own)

    def verdict_of(self, check: Check, found: Found, before: Verdict) -> Verdict:
        """Return the verdict of a check from what was found, and the one before."""
        (scrapes, probes), now = found, check.now
        self._restart_after_gap(now, before)
        readings = {s.status.instance: s.reading for s in scrapes if s.reading}
        self._give_up(readings.values())
        targets = self._record(scrapes, now, before.targets)
        self._scraped = self._scraped or not all(target.reason for target in targets)
        probes += self._answers(check)
        asked = [probe.samples(self._config.target_labels) for probe in probes]
        if asked:
            self.history.record(dict(collections.ChainMap(*asked)), now, PROBED)
        evaluation = self.history.evaluation(now, check.wall)
        self._judge(targets, probes, evaluation)
        self._warn(self.lookout.look(readings, evaluation))
        targets = tuple(map(self.lookout.remark, targets))
        left = self._left(check, targets, evaluation)
        fault = "" if self._scraped else "never scraped"
        known = before.sequence + 1, fault, now, check.wall
        return Verdict(*known, self._statuses, targets, probes, left)

    def _judge(
        self, targets: Iterable[TargetStatus], probes: Iterable[ProbeStatus],
        evaluation: Evaluation,
    ) -> None:  # fmt: skip
        begin, timeout = evaluation.now - TOLERATED, ("health", "timeout")
        failed = (t for t in targets if t.reason == "timeout" and t.since > begin)
        late = [target.instance for target in failed]
        late_routes = [p.instance for p in probes if (p.probe, p.reason) == timeout]
        # Of the built-in rules others look back, or are about a canary.
        builtin = {"Down": late, "NotServing": late_routes}

        def late_for(status: RuleStatus) -> Sequence[str]:
            if status.rule.builtin:
                return builtin.get(status.rule.name, ())
            # What answers add themselves is known to rules of one's own.
            return () if status.reads_only((*SYNTHETIC, *PROBED)) else late

        statuses = self._statuses
        self._statuses = tuple(_judged(s, evaluation, late_for(s)) for s in statuses)

    def _record(
        self, scrapes: Iterable[Scrape], now: float, before: Iterable[TargetStatus]
    ) -> tuple[TargetStatus, ...]:
        """Remember what scrapes found, and what they add; return how each one went.

        A scrape for whose series there is no room has failed.
        """
        samples: dict[Labels, float] = {}
        history, statuses = self.history, []
        room = max(history.room() - _size_of_kept(self._statuses), 0)
        for scrape in scrapes:
            cost = history.cost(scrape.samples)
            taken = scrape if cost <= room else scrape.failed("too_large", NO_ROOM)
            room -= cost if taken is scrape else 0
            samples.update({**taken.synthetic(), **taken.samples})
            statuses.append(taken.status)
        of_probes = frozenset(PROBED).intersection(reserved_names(self._config))
        history.record(samples, now, history.names - of_probes)
        known = {(target.instance, target.up): target.since for target in before}
        return tuple(
            status._replace(since=known.get((status.instance, status.up), now))
            for status in statuses
        )

    def _restart_after_gap(self, now: float, before: Verdict) -> None:
        gap = max(MAX_GAP, MAX_INTERVALS * self._config.scrape_interval)
        if before.sequence and now - before.time > gap:
            self._change(restart_clocks)

    def _give_up(self, readings: Iterable[Reading]) -> None:
        """Let no built-in rule conclude anything from what there is no room for."""
        for name in {n for r in readings for n in r.dropped} - self._dropped:
            self._dropped.add(name)
            self.history.forget(name)
            self._change(partial(_without, name))
            self._warn([(logging.WARNING, too_many([name]), {"metric": name})])

    def _change(self, change: Callable[[RuleStatus], RuleStatus]) -> None:
        self._statuses = tuple(map(change, self._statuses))
        self._when = tuple(map(change, self._when))

    def _answers(self, check: Check) -> tuple[ProbeStatus, ...]:
        """Let the canary be sent where CANARY_WHEN asks for it; return what it says."""
        if not self._canary or not check.answer:
            return ()
        evaluation = self.history.evaluation(check.now, check.wall)
        self._when = tuple(_judged(status, evaluation) for status in self._when)
        stalls = [status for status in self._statuses if status.rule.name in HUNG]
        # Asked for nothing more: a server that still loads, or that somebody drains.
        when = self._when if self._scraped and not check.drain else ()
        answer = self._canary.consider(check.answer, when, stalls, evaluation)
        return (answer,) if answer.sent > -math.inf else ()

    def _left(
        self, check: Check, targets: Iterable[TargetStatus], evaluation: Evaluation
    ) -> str | None:
        drain = self.drain_while if check.drain else None
        if not drain:
            return None
        left = remaining(drain, targets, evaluation)
        there = (select(s, evaluation) for s in find_selectors(drain))
        # Of a server that is not known the table's expression gives nothing either.
        return left if left or self._config.drain_while or any(there) else NO_SERVER


class Statistics:
    """Counts what verdicts say; any thread may read it while one adds to it.

    ``trends`` have the time of each of the latest checks, the worst value of a rule
    then, NaN for none, and its state.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.scrapes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.durations, self.seconds = [0] * (len(BUCKETS) + 1), 0.0
        self.trends: dict[str, collections.deque[tuple[float, float, str]]] = {
            rule.name: collections.deque(maxlen=TREND) for rule in rules
        }

    def add(self, _: Verdict, verdict: Verdict) -> None:
        """Count a new verdict."""
        for target in verdict.targets:
            self.scrapes[target.instance, target.reason or "success"] += 1
            self.durations[bisect_left(BUCKETS, target.seconds)] += 1
            self.seconds += target.seconds
        for status in verdict.rules:
            value = math.nan if status.value is None else status.value
            now = verdict.time, value, verdict.state_of(status)
            self.trends[status.rule.name].append(now)


def _size_of_kept(statuses: Iterable[RuleStatus]) -> int:
    """Return the bytes of the alerts that outlive their series by keep_firing_for."""
    kept = (a for s in statuses for a in s.alerts if a.absent_since is not None)
    return sum(
        ALERT_BYTES + sum(len(value) for _, value in alert.labels) for alert in kept
    )


def _tell(listener: Listener, before: Verdict, verdict: Verdict) -> None:
    try:
        listener(before, verdict)
    except Exception as error:
        report(error)


def _without(name: str, status: RuleStatus) -> RuleStatus:
    rule = status.rule
    rule = rule._replace(expr=without(rule.expr, name)) if rule.builtin else rule
    return status._replace(rule=rule, part=None)


def _judged(
    status: RuleStatus, evaluation: Evaluation, late: Sequence[str] = ()
) -> RuleStatus:
    try:
        judged = without_recovered(judge(status, evaluation), evaluation)
        judged = _held(status, judged, late) if late else judged
        if judged.state != "firing":
            return judged
        fired, rule = status.counts["firing"], status.rule
        words = status.last_words if fired else last_words(rule, evaluation)
        return judged._replace(last_words=words)
    except Exception as error:
        return status._replace(error=f"bug: {report(error)}")


def _held(before: RuleStatus, now: RuleStatus, late: Sequence[str]) -> RuleStatus:
    """Return a rule's status with what fired until an answer was late: an error."""
    there = {unnamed(alert.labels) for alert in now.alerts}
    held = [
        alert for alert in before.alerts
        if alert.state == "firing" and unnamed(alert.labels) not in there
        and dict(alert.labels).get("instance", "") in (*late, "")
    ]  # fmt: skip
    if not held or now.error:
        return now
    error = "" if now.fires else "it fired until an answer timed out"
    now = now._replace(error=error, last_words=before.last_words)
    return now._replace(alerts=(*now.alerts, *held))


# --- 18. Alertmanager: Verdict -> POST /api/v2/alerts --------------------------------
# As Prometheus does it (rules/alerting.go, notifier/): a firing alert is sent again and
# again, its end a little ahead, so that it ends by itself when nobody is left to send.

RESEND = 60.0
LIFETIME = 4 * RESEND
RETENTION = 900.0
RETRY = 5.0
SEND_TIMEOUT = 10.0
BATCH = 256
MAX_ALERTS, MAX_ALERT_TEXT = 1024, 4096


class Notice(NamedTuple):
    """An alert as an Alertmanager knows it; times are monotonic.

    ``condition`` is what its rule says in words, and ``failures`` which scrapes failed.
    ``sent`` is the time of the verdict that was sent last; it fires until ``ended``.
    """

    labels: Labels
    rule: str
    alert: Alert
    condition: str
    failures: Sequence[str]
    sent: float = -math.inf
    ended: float = math.inf


class Notifier:
    """Tells one Alertmanager which alerts fire, in a thread of its own.

    What it still has to say is derived from the latest verdict and from what it has
    said, so that an Alertmanager that comes back gets the truth.  ``publish`` touches
    ``_firing``, ``_changed`` and ``_verdict``, which it replaces as a whole; any thread
    may read the counts ``sent`` and ``failed``; the rest is for its own thread alone.
    """

    def __init__(
        self, config: Config, target: Target, generator: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.target, self.sent, self.failed = target, 0, 0
        self._config, self._generator, self._clock = config, generator, clock
        self._verdict: Verdict | None = None
        self._firing: frozenset[tuple[str, Labels]] = frozenset()
        self._notices: dict[Labels, Notice] = {}
        self._problem, self._retry, self._too_many = "", -math.inf, False
        self._changed, self._stopping = threading.Event(), False

    def start(self) -> None:
        """Start the thread that sends."""
        threading.Thread(target=self._run, name="notify", daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end; nothing is resolved by that."""
        self._stopping = True
        self._changed.set()

    def publish(self, _: Verdict, verdict: Verdict) -> None:
        """Take a new verdict; returns at once."""
        if not verdict.rules:
            return
        self._verdict = verdict
        some = itertools.islice(_firing(verdict), 2 * MAX_ALERTS)
        firing = frozenset((status.rule.name, alert.labels) for status, alert in some)
        if firing != self._firing:
            self._firing = firing
            self._changed.set()

    def _run(self) -> None:
        while not self._stopping:
            try:
                rest = self.work()
            except Exception as error:
                report(error)
                rest = RETRY
            self._changed.wait(rest)
            self._changed.clear()

    def work(self) -> float | None:
        """Send what is due, and return the seconds until there may be more to say."""
        now, verdict = self._clock(), self._verdict
        if not verdict:
            return None
        self._update(verdict, now)
        if now < self._retry:
            return self._retry - now
        if not self._send_due(verdict, now):
            self._retry = now + RETRY
            return RETRY
        sent = min((notice.sent for notice in self._notices.values()), default=math.inf)
        return max(sent + RESEND - self._clock(), RETRY) if sent < math.inf else None

    def _send_due(self, verdict: Verdict, now: float) -> bool:
        due = [n for n in self._notices.values() if _due(n, verdict, now)]
        for start in range(0, len(due), BATCH):
            batch = due[start : start + BATCH]
            if not self._post([self._payload(notice, verdict) for notice in batch]):
                return False
            for notice in batch:
                self._notices[notice.labels] = notice._replace(sent=verdict.time)
        return True

    def _update(self, verdict: Verdict, now: float) -> None:
        self._warn_if_too_many(sum(status.counts["firing"] for status in verdict.rules))
        firing = self._choose(verdict)
        others = [n for n in self._notices.values() if n.labels not in firing]
        ended = (n._replace(ended=min(n.ended, verdict.time)) for n in others)
        kept = [notice for notice in ended if now - notice.ended <= RETENTION]
        # Those that fire come last; the others end by themselves.
        newest = [*kept, *firing.values()][-2 * MAX_ALERTS :]
        self._notices = {notice.labels: notice for notice in newest}

    def _warn_if_too_many(self, total: int) -> None:
        before, self._too_many = self._too_many, total > MAX_ALERTS
        if self._too_many and not before:
            text = f"{total} alerts fire: only {MAX_ALERTS} of them are sent"
            log(logging.WARNING, text, alertmanager=self.target.url)

    def _choose(self, verdict: Verdict) -> dict[Labels, Notice]:
        # Those that were told of, as ended too, and new ones while there is room; the
        # labels of thousands that are not sent are not made.
        known = {(n.rule, n.alert.labels): n.labels for n in self._notices.values()}
        # Shared by the thousands of a rule; their annotations are made to be sent.
        conditions = {s.rule.name: explain(s) for s in verdict.rules if s.fails}
        chosen: dict[Labels, Notice] = {}
        failures = _failures(verdict.targets)
        for status, alert in _firing(verdict):
            name = status.rule.name
            labels = known.get((name, alert.labels))
            if not labels and len(chosen) < MAX_ALERTS:
                labels = _alert_labels(status.rule, alert, self._config)
            if labels:
                old = self._notices.get(labels)
                sent = old.sent if old and old.ended == math.inf else -math.inf
                about = labels, name, alert, conditions[name], failures
                chosen[labels] = Notice(*about, sent)
        return chosen

    def _post(self, batch: Sequence[dict[str, Any]]) -> bool:
        body, deadline = json.dumps(batch).encode(), time.monotonic() + SEND_TIMEOUT
        status, problem = 0, ""
        try:
            with Translated(), fetch(self.target, deadline, body) as response:
                status = response.status
                if not 200 <= status < 300:
                    problem = redact(f"HTTP {status}: {response.read(200)!r}")
        except ScrapeError as error:
            problem = f"{error.reason}: {error}"
        if bool(problem) != bool(self._problem):
            url, level = self.target.url, logging.WARNING if problem else logging.INFO
            message = f"Alertmanager {url}: {problem or 'takes alerts again'}"
            log(level, message, alertmanager=url, reason=problem)
        self._problem = problem
        self.sent += 0 if problem else len(batch)
        self.failed += len(batch) if problem else 0
        # One bad alert makes it 400, and the others of its batch are taken: none may
        # hold up the rest, and all are due again in a minute.
        return not problem or 400 <= status < 500

    def _payload(self, notice: Notice, verdict: Verdict) -> dict[str, Any]:
        ended = min(notice.ended, verdict.time + LIFETIME)
        return {
            "labels": dict(notice.labels),
            "annotations": _annotations(notice),
            "startsAt": format_time(verdict.wall_of(notice.alert.began)),
            "endsAt": format_time(verdict.wall_of(ended)),
            "generatorURL": self._generator,
        }


def _due(notice: Notice, verdict: Verdict, now: float) -> bool:
    # Without fresh verdicts nobody knows whether an alert still fires, and one that has
    # ended meanwhile ends by itself.
    untold = notice.sent < notice.ended < math.inf
    due = untold or verdict.time - notice.sent >= RESEND
    return due and now - verdict.time < LIFETIME


def _firing(verdict: Verdict) -> Iterator[tuple[RuleStatus, Alert]]:
    for status in verdict.rules:
        yield from ((status, a) for a in status.alerts if a.state == "firing")


def _alert_labels(rule: Rule, alert: Alert, config: Config) -> Labels:
    # Labels are an alert's identity; localhost:8000 is the same in every pod.
    own = {_escape_name(n): value for n, value in _fitting(unnamed(alert.labels))}
    pod = {"pod": config.pod_name}
    labels = {**add_labels(own, pod), **dict(config.target_labels), **pod}
    labels.update({**dict(config.alert_labels), "alertname": rule.name})
    return tuple(sorted(labels.items()))


def _escape_name(name: str) -> str:
    # Names of UTF-8 stay apart, escaped as by EscapeName of Prometheus' model/metric.go
    # with ValueEncodingEscaping: an Alertmanager before 0.27 would refuse them.
    if re.match(r"[a-zA-Z_]\w*\Z", name, re.ASCII):
        return name
    doubled = name.replace("_", "__")
    return "U__" + re.sub(
        r"[^a-zA-Z0-9_]|^[0-9]", lambda match: f"_{ord(match[0]):x}_", doubled
    )


def _fitting(labels: Labels) -> Iterator[tuple[str, str]]:
    # A label of kilobytes tells nobody anything, and 2,048 alerts are remembered.
    room = MAX_ALERT_TEXT
    for name, value in labels:
        if len(name) + len(value) <= room:
            room -= len(name) + len(value)
            yield name, value


def _annotations(notice: Notice) -> dict[str, str]:
    rule, alert, value = notice.rule, notice.alert, format_float(notice.alert.value)
    series = f"{shorten(format_series(alert.labels))} {value}"
    what = f"The rule {rule}: {notice.condition} fires for {series}"
    description = "; ".join([what, *notice.failures])
    return {
        "summary": f"{rule}: {series}", "description": description, "value": value
    }  # fmt: skip


def _failures(targets: Iterable[TargetStatus]) -> list[str]:
    # No series of Down: up == 0 has the reason.
    return [
        f"the scrape of {target.instance} failed: {target.reason}: "
        f"{escape_controls(target.message)}"
        for target in targets if target.reason
    ]  # fmt: skip


# --- 19. Answers: path x Verdict -> text, JSON, metrics, a page ----------------------

# With 200 rules or 5,000 series an answer would be megabytes: it is cut, and built in
# slices, one in each turn of the loop, so that it holds up nobody else's.
MAX_LISTED, MAX_LISTED_TEXT, MAX_ANSWER = 20, 16 * 1024, 256 * 1024
MAX_SHOWN = 70
OLD_AGE = 60.0
ACTIVE = {"firing": "fires", "pending": "would fire"}
# The states of rules, the worst first, and what each is in health+json.
HEALTH_STATUS = {
    "firing": "fail", "error": "fail", "pending": "warn", "unknown": "warn",
    "inactive": "pass",
}  # fmt: skip
# What ?verbose marks a rule with, as kube-apiserver does, if not with a plus.
SIGNS = {"firing": "-", "error": "-", "unknown": "?"}
TEXT = "text/plain; charset=utf-8"
# A word that may fill a line of a telephone, and where it may be broken then: rather
# between the parts of an expression than within a name.
_LONG_WORD = r"[^\s\0]{38,}"
_JOINTS = r'[,({=/](?=[a-zA-Z"])', r"[_:.](?=[a-zA-Z])"


class Answer(NamedTuple):
    """A response: status, body, its type, and headers of its own.

    The body of one that may take long is made of parts, each of them made in no time.
    """

    status: int
    body: str | Iterator[str]
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


HEALTHY, UNHEALTHY = Answer(200, "Healthy\n"), Answer(503, "Unhealthy\n")
# Of /livez alone, which is about this program, whatever its checks find.
STUCK = Answer(503, "Unhealthy: no check has come round for a minute\n")


def answer_health(verdict: Verdict, query: str = "") -> Answer:
    """Answer ``/health``: it fails closed, so only a healthy verdict is 200.

    ``verbose`` and ``exclude=Name`` are those of kube-apiserver, with ``window`` the
    last words of each rule that fires; ``format=json`` is
    draft-inadarei-api-health-check-06.
    """
    if not query:
        return _plain(verdict.reason)
    options = _options(query)
    excluded = {*options.get("exclude", [])}
    reason = verdict.fault or name_some(verdict.failing_rules(excluded))
    lines = _verbose_lines(verdict, excluded, window="window" in options)
    states = map(verdict.state_of, verdict.rules)
    return _answer(options, reason, lines, _json_checks(verdict), states)


def answer_rules(names: Sequence[str], verdict: Verdict, query: str = "") -> Answer:
    """Answer ``/health/Name,Other``: it fails open, so only a rule that fires is 503.

    A rule that is not there is unknown: a change of rules may restart no server.
    """
    asked = [*_asked(names, verdict)]
    reason = name_some([name for name, status, _ in asked if status and status.fires])
    unknown = shorten(", ".join(dict.fromkeys(doubt for *_, doubt in asked if doubt)))
    if not query:
        return _plain(reason, unknown)
    lines = itertools.starmap(partial(_asked_line, verdict), asked)
    checks = ((name, [_rule_json(verdict, s, doubt)]) for name, s, doubt in asked)
    states = (verdict.state_of(status) for _, status, _ in asked if status)
    return _answer(_options(query), reason, lines, checks, states, unknown=unknown)


Checks = Iterator[Tuple[str, Sequence[Dict[str, Any]]]]


def _answer(
    options: Mapping[str, Sequence[str]], reason: str, lines: Iterator[str],
    checks: Checks, states: Iterable[str], *, unknown: str = "",
) -> Answer:  # fmt: skip
    plain = _plain(reason, unknown)
    if options.get("format") == ["json"]:
        warns = unknown or {"pending", "unknown"}.intersection(states)
        status = "fail" if reason else "warn" if warns else "pass"
        parts = _health_json(status, reason or unknown, checks)
        return Answer(plain.status, parts, "application/health+json")
    if "verbose" not in options:
        return plain
    last = escaped_line(f"Unhealthy: {reason}") if reason else str(plain.body)
    shown = _bounded(map(escaped_line, lines), "warn: the rest is left out\n")
    return Answer(plain.status, itertools.chain(shown, [last]))


def _plain(reason: str, unknown: str = "") -> Answer:
    if reason or not unknown:
        return UNHEALTHY if reason else HEALTHY
    return Answer(200, escaped_line(f"Healthy (unknown: {unknown})"))


def _asked(
    names: Iterable[str], verdict: Verdict
) -> Iterator[tuple[str, RuleStatus | None, str]]:
    """Yield each name with its status, and why it is unknown whether it fires."""
    statuses = {status.rule.name: status for status in verdict.rules}
    for name in names:
        status = statuses.get(name)
        # Without a verdict of the rules nobody knows which there are.
        doubt = (not statuses and verdict.fault) or f"no rule {name}"
        yield name, status, why_unknown(status, verdict) if status else doubt


def _asked_line(
    verdict: Verdict, name: str, status: RuleStatus | None, doubt: str
) -> str:
    if status and not doubt:
        return _rule_line(status, verdict)
    return f"[?]{name} unknown: {doubt}"


def _rule_line(
    status: RuleStatus, verdict: Verdict, excluded: Container[str] = ()
) -> str:
    name, sign = status.rule.name, SIGNS.get(verdict.state_of(status), "+")
    text = describe(status, verdict)
    if name not in excluded:
        return f"[{sign}]{name} {text}"
    return f"[{'?' if sign == '?' else '+'}]{name} excluded: {text}"


def _options(query: str) -> dict[str, list[str]]:
    return urllib.parse.parse_qs(query, keep_blank_values=True)


def escaped_line(text: str) -> str:
    """Return a line for people, whatever is in it."""
    return f"{escape_controls(text)}\n"


def _bounded(parts: Iterable[str], left_out: str) -> Iterator[str]:
    """Yield parts up to a bound, and then what says that there are more."""
    size = 0
    for part in parts:
        size += len(part)
        if size > MAX_ANSWER:
            yield left_out
            return
        yield part


def _verbose_lines(
    verdict: Verdict, excluded: AbstractSet[str], *, window: bool
) -> Iterator[str]:
    for target in verdict.targets:
        yield from _target_lines(target, verdict.time)
    yield from (f"[-]{describe_probe(p)}" for p in verdict.probes if p.reason)
    for status in verdict.rules:
        yield _rule_line(status, verdict, excluded)
        if window and status.last_words:
            yield f"   {status.last_words}"
    for name in sorted(excluded - {status.rule.name for status in verdict.rules}):
        yield f"warn: no rule {quote(name)} to exclude"


def _target_lines(target: TargetStatus, now: float) -> Iterator[str]:
    if target.reason:
        since = format_duration(int(now - target.since))
        what = f"failed for {since}: {target.reason}: {target.message}"
        yield f"[-]scrape of {target.instance} {what}"
    if target.remark:
        yield f"warn: {target.instance}: {target.remark}"


def _health_json(status: str, output: str, checks: Checks) -> Iterator[str]:
    head = _present({
        "status": status, "version": "1", "releaseId": __version__, "output": output,
    })  # fmt: skip
    yield f'{json.dumps(head)[:-1]},\n"checks": {{'
    size, left_out, separator = 0, 0, "\n"
    for name, values in checks:
        text = f"{separator}{json.dumps(name)}: {json.dumps(values)}"
        size, separator = size + len(text), ",\n"
        left_out += size > MAX_ANSWER
        yield "" if size > MAX_ANSWER else text
    notes = json.dumps([f"checks left out: {left_out}"])
    yield f'}},\n"notes": {notes}}}\n' if left_out else "}}\n"


def _json_checks(verdict: Verdict) -> Checks:
    # A rule's name has no colon, so scrape:targets is none.
    now = format_time(verdict.wall)
    yield "scrape:targets", [
        _json_of(
            target, time=now, since=format_time(verdict.wall_of(target.since)),
            series=target.series, bytes=target.size, remark=target.remark,
        )
        for target in verdict.targets
    ]  # fmt: skip
    for name in dict.fromkeys(probe.probe for probe in verdict.probes):
        found = (probe for probe in verdict.probes if probe.probe == name)
        yield f"probe:{name}", [_json_of(probe, code=probe.code) for probe in found]
    for status in _worst_first(verdict):
        doubt = why_unknown(status, verdict)
        yield status.rule.name, [_rule_json(verdict, status, doubt)]


def _worst_first(verdict: Verdict) -> list[RuleStatus]:
    severity = [*HEALTH_STATUS].index
    return sorted(verdict.rules, key=lambda s: severity(verdict.state_of(s)))


def _json_of(found: TargetStatus | ProbeStatus, **more: Any) -> dict[str, Any]:
    return _present({
        "componentId": found.instance, "status": "fail" if found.reason else "pass",
        "observedValue": round(found.seconds, 6), "observedUnit": "s",
        "output": found.reason and f"{found.reason}: {found.message}", **more,
    })  # fmt: skip


def _rule_json(
    verdict: Verdict, status: RuleStatus | None, doubt: str
) -> dict[str, Any]:
    if not status:
        return {"status": "warn", "state": "unknown", "output": doubt}
    series = [
        {"labels": dict(a.labels), "value": _json_number(a.value), "state": a.state,
         "since": format_time(verdict.wall_of(a.began))}
        for a in _listed(status.alerts)
    ]  # fmt: skip
    state = verdict.state_of(status)
    return _present({
        "status": HEALTH_STATUS[state], "state": state,
        "time": format_time(verdict.wall),
        "description" if status.rule.builtin else "expression": explain(status),
        "matched": status.matched, "observedValue": _json_number(status.value),
        "limit": _json_number(status.limit), "series": series,
        "alerts": len(status.alerts), "output": doubt,
    })  # fmt: skip


def _listed(alerts: Sequence[Alert]) -> list[Alert]:
    texts = (itertools.chain(*alert.labels) for alert in alerts[:MAX_LISTED])
    sizes = itertools.accumulate(sum(map(len, text)) for text in texts)
    return [alert for alert, size in zip(alerts, sizes) if size <= MAX_LISTED_TEXT]


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _json_number(value: float | None) -> float | str | None:
    # JSON has no NaN and no infinity.
    return value if value is None or math.isfinite(value) else format_float(value)


def answer_metrics(lines: Iterable[str]) -> Answer:
    """Answer ``/metrics`` in the text format 0.0.4."""
    shown = _bounded(lines, "# the other samples are left out\n")
    return Answer(200, shown, "text/plain; version=0.0.4; charset=utf-8")


def verdict_metrics(verdict: Verdict) -> Iterator[str]:
    """Yield the lines of what the latest verdict says."""
    yield from _metrics(
        [({}, verdict)] if verdict.sequence else [],
        ("health_check_healthy", "healthy", "Whether the latest verdict is Healthy."),
        ("health_check_verdict_timestamp_seconds", "wall", "When it was reached."),
    )
    rules = [({"rule": status.rule.name}, status) for status in verdict.rules]
    states = [(rule, verdict.state_of(status)) for rule, status in rules]
    yield from _metrics(
        [({**rule, "state": state}, state == known) for rule, known in states
         for state in reversed([*HEALTH_STATUS])],
        ("health_check_rule_state", "", "1 for the state that a rule is in."),
    )  # fmt: skip
    yield from _metrics(
        rules,
        ("health_check_rule_series", "matched", "Series that its selectors matched."),
        ("health_check_rule_value", "value", "Worst value of a rule EXPR OP NUMBER."),
        ("health_check_rule_limit", "limit", "Limit of a rule EXPR OP NUMBER."),
    )
    yield from _metrics(
        [({"target": target.instance}, target) for target in verdict.targets],
        ("health_check_target_up", "up", "Whether the last scrape succeeded."),
        ("health_check_target_watched", "watched", "0 if no rule knows its metrics."),
    )
    yield from _metrics(
        [({"probe": p.probe, "target": p.instance}, p) for p in verdict.probes],
        ("probe_success", "success", "Whether a probe succeeded."),
        ("probe_http_status_code", "code", "Status of the answer, 0 without one."),
        ("probe_duration_seconds", "seconds", "How long a probe took."),
    )


def scrape_metrics(statistics: Statistics) -> Iterator[str]:
    """Yield the lines of what has been counted of scrapes."""
    # A copy: the thread that checks may count meanwhile.
    scrapes = dict(statistics.scrapes).items()
    yield from _metrics(
        [({"target": t, "outcome": o}, count) for (t, o), count in scrapes],
        ("health_check_scrapes_total", "", "Scrapes by target and outcome."),
    )
    name = "health_check_scrape_duration_seconds"
    bounds = map(format_float, (*BUCKETS, math.inf))
    counts = list(itertools.accumulate(statistics.durations))
    yield _heading(name, "histogram", "Time of a scrape.")
    for bound, count in zip(bounds, counts):
        yield _sample(f"{name}_bucket", {"le": bound}, count)
    yield _sample(f"{name}_sum", {}, statistics.seconds)
    yield _sample(f"{name}_count", {}, counts[-1])


def service_metrics(
    requests: Mapping[tuple[str, str], int], unknown: int,
    notifiers: Iterable[Notifier],
) -> Iterator[str]:  # fmt: skip
    """Yield the lines of what has been counted of requests and notifications."""
    yield from _metrics(
        [({"path": p, "code": c}, count) for (p, c), count in requests.items()],
        ("health_check_requests_total", "", "Requests by path and code."),
    )
    yield from _metrics(
        [({}, unknown)],
        ("health_check_unknown_rule_requests_total", "",
         "Rules asked for that are not there, answered 200."),
    )  # fmt: skip
    yield from _metrics(
        [({"alertmanager": n.target.url}, n) for n in notifiers],
        ("health_check_notifications_sent_total", "sent", "Alerts that were taken."),
        ("health_check_notifications_failed_total", "failed", "Alerts that were not."),
    )


def process_metrics() -> Iterator[str]:
    """Yield the lines of what Prometheus' client libraries tell of a process."""
    versions = {"version": __version__, "python": sys.version.split()[0]}
    resident: list[tuple[dict[str, str], int]] = []
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        resident = [({}, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))]
    for found, name, text in (
        ([(versions, 1)], "health_check_build_info", "Versions, always 1."),
        ([({}, STARTED)], "process_start_time_seconds", "When it started, Unix time."),
        ([({}, time.process_time())], "process_cpu_seconds_total", "CPU time."),
        (resident, "process_resident_memory_bytes", "Resident memory."),
    ):
        yield from _metrics(found, (name, "", text))


def _metrics(
    found: Sequence[tuple[dict[str, str], Any]], *rows: tuple[str, str, str]
) -> Iterator[str]:
    """Yield a metric for each row: its name, the attribute with its value, its help.

    Without an attribute what is found is the value; of None there is no sample.
    """
    for name, attribute, text in rows:
        yield _heading(name, "counter" if name.endswith("_total") else "gauge", text)
        for labels, thing in found:
            value = getattr(thing, attribute) if attribute else thing
            if value is not None:
                yield _sample(name, labels, value)


def _heading(name: str, kind: str, text: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    series = (("__name__", name), *labels.items())
    return f"{format_series(series)} {format_float(value)}\n"


class Site(NamedTuple):
    """What the page shows beside a verdict; ``last_words`` are of the run before."""

    config: Config
    statistics: Statistics
    last_words: str = ""


def answer_page(verdict: Verdict, site: Site, query: str = "") -> Answer:
    """Answer ``/``: the latest verdict for people, from memory, without a script.

    503 if that is Unhealthy, for those who ask for ``/`` by default, or old: older than
    three intervals between checks and than a minute.  ``still`` is not loaded again.
    """
    seconds = max(0, int(time.monotonic() - verdict.time))
    old = seconds > max(MAX_INTERVALS * site.config.scrape_interval, OLD_AGE)
    head = _page_head(verdict, site, format_duration(seconds), old)
    if "still" not in _options(query):
        head = head.replace("</head>", f"{REFRESH}</head>")
    sections = _bounded(_sections(verdict, site), "<p>The rest is left out.</p>")
    status = 200 if verdict.healthy and not old else 503
    body = itertools.chain([head], sections, [PAGE_END])
    return Answer(status, body, "text/html; charset=utf-8", (
        ("Content-Security-Policy", POLICY), ("Referrer-Policy", "no-referrer")
    ))  # fmt: skip


def _page_head(verdict: Verdict, site: Site, age: str, old: bool) -> str:
    state = "old" if old else "pass" if verdict.healthy else "fail"
    word = "Healthy" if verdict.healthy else "Unhealthy"
    word = f"Last verdict, {age} ago: {word}" if old else word
    text = f"{word}: {verdict.reason}" if verdict.reason else word
    shown = f"checked {age} ago, <time>{format_time(verdict.wall)}</time>"
    if not verdict.sequence:
        state, word, text, shown = "old", "Not checked yet", "Not checked yet", ""
    pod, targets = site.config.pod_name, site.config.metrics_endpoint
    where = filter(None, [pod, *(target.url for target in targets)])
    title = " ".join([f"{word}:", pod, *(target.instance for target in targets)])
    return PAGE_HEAD.format(
        style=STYLE, title=html.escape(escape_controls(title)), state=state,
        verdict=_words(text), where=_words(", ".join(where)), shown=shown,
    )  # fmt: skip


def _sections(verdict: Verdict, site: Site) -> Iterator[str]:
    # What fails comes first, and why before what.
    urls = {target.instance: target.url for target in site.config.metrics_endpoint}
    targets = [_target_html(target, verdict.time, urls) for target in verdict.targets]
    probes = [_probe_html(probe) for probe in verdict.probes]
    yield from (html for failed, html in (*targets, *probes) if failed)
    yield from (_rule_html(status, verdict, site) for status in _worst_first(verdict))
    yield from (html for failed, html in (*targets, *probes) if not failed)
    if site.last_words:
        yield _section("warn", "the run before ended so", site.last_words)


def _target_html(
    target: TargetStatus, now: float, urls: Mapping[str, str]
) -> tuple[bool, str]:
    text = f"{target.series} series, {target.size} bytes in {_brief(target.seconds)}"
    if target.reason:
        what = _failure(target, urls[target.instance])
        text = f"{what}, for {format_duration(int(now - target.since))}"
    if target.remark:
        text += f"; {target.remark}"
    state = "fail" if target.reason else "pass" if target.watched else "warn"
    return state != "pass", _section(state, f"scrape of {target.instance}", text)


def _failure(target: TargetStatus, url: str) -> str:
    if target.reason == "timeout":
        return target.message.replace("no answer", f"no answer from {url}")
    if target.reason == "refused":
        return f"nobody listens at {url}"
    answers = " answers" if target.reason == "http_status" else ""
    return f"{url}{answers}: {target.message}"


def _probe_html(probe: ProbeStatus) -> tuple[bool, str]:
    title, _, text = describe_probe(probe).partition(": ")
    state = "fail" if probe.reason else "pass" if probe.success else "unknown"
    return bool(probe.reason), _section(state, title, text)


def _rule_html(status: RuleStatus, verdict: Verdict, site: Site) -> str:
    state, more = verdict.state_of(status), ""
    if state == "error":
        shade, text = "fail", f"cannot be evaluated: {status.error}"
    elif state == "unknown":
        shade, text = "unknown", "not known while a scrape fails"
    elif state == "inactive":
        shade, text = _inactive_words(status, verdict)
    else:
        since, series = first_series(status, verdict.time)
        shade, more = HEALTH_STATUS[state], f"<p>{_code(series)}</p>"
        text = f"{_value(status) or ACTIVE[state]}, for {since}"
        if state == "pending":
            text += f": fires after {format_duration(status.rule.hold)}"
    more += _rule_text(status)
    return _section(shade, status.rule.name, text, _figure(status, site), more)


def _inactive_words(status: RuleStatus, verdict: Verdict) -> tuple[str, str]:
    if not status.matched and not status.reads_only(ANSWERED):
        return "unknown", "no series of it is there"
    if not asks_for_an_answer(status):
        return "pass", _value(status) or "ok"
    if ok_so_far(status, verdict):
        return "warn", "ok so far"
    slowest = max((target.seconds for target in verdict.targets), default=0.0)
    return "pass", f"answers in {_brief(slowest)}" * status.reads_only(ANSWERED) or "ok"


def _value(status: RuleStatus) -> str:
    if status.value is None or status.limit is None:
        return ""
    return f"{_rounded(status.value)}, limit {_rounded(status.limit)}"


def _rounded(value: float) -> str:
    if not math.isfinite(value):
        return format_float(value)
    return format_float(round(value) if abs(value) >= 1000 else float(f"{value:.4g}"))


def _brief(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _section(state: str, title: str, text: str, graph: str = "", more: str = "") -> str:
    heading = f"{graph}<h2>{_words(title)}</h2>"
    return f'<section class="{state}">{heading}<p>{_words(text)}</p>{more}</section>\n'


def _rule_text(status: RuleStatus) -> str:
    # Some rules are as long as a page: the rest is shown to those who want it.
    short, whole = explain(status, reads=False), expression_of(status)
    if short == whole and len(whole) > MAX_SHOWN:
        short = whole[:MAX_SHOWN].rpartition(" ")[0] or whole[:MAX_SHOWN]
        short += " ..."
    if not whole or short == whole:
        return _code(short)
    summary = f"<summary>{_code(short)}</summary>"
    return f"<details>{summary}{_code(whole)}</details>"


def _code(text: str) -> str:
    return f"<code>{_words(text)}</code>"


def _words(text: str) -> str:
    """Return a text as HTML in which a word breaks only if it may fill a line."""
    text = reduce(_break_long, _JOINTS, escape_controls(text))
    return html.escape(text).replace("\0", "<wbr>")


def _break_long(text: str, joint: str) -> str:
    return re.sub(_LONG_WORD, lambda word: re.sub(joint, "\\g<0>\0", word[0]), text)


def _figure(status: RuleStatus, site: Site) -> str:
    # The Monitor may add to these meanwhile.
    trend = tuple(site.statistics.trends[status.rule.name])
    if len(trend) < 2 or not visible_rule(status):
        return ""
    if status.limit is None or asks_for_an_answer(status):
        graph = _strip([state for _, _, state in trend])
    else:
        graph = _graph([value for _, value, _ in trend], status.limit)
    span = format_duration(int(trend[-1][0] - trend[0][0]))
    return graph and f"<figure>{graph}, last {span}</figcaption></figure>"


def _graph(values: Sequence[float], limit: float) -> str:
    levels = [value for value in values if math.isfinite(value)]
    if len(levels) < 2:
        return ""
    highest, bounds = max(levels), [n for n in (0.0, limit) if math.isfinite(n)]
    low = min(*levels, *bounds)
    scale = 36 / ((max(*levels, *bounds) - low) or 1.0)
    *heights, height = (38 - (value - low) * scale for value in (*values, limit))
    line = f'<path class="limit" d="M0 {height:.1f}h240"/>'
    line = line if math.isfinite(height) else ""
    text = f"highest {_rounded(highest)}, limit {_rounded(limit)}"
    return f'{SVG}>{line}<path d="{_path(heights)}"/></svg><figcaption>{text}'


def _path(heights: Sequence[float]) -> str:
    # The newest is at the right; a check without a value leaves a gap.
    path, pen = "", "M"
    for x, height in enumerate(heights, TREND - len(heights)):
        if math.isfinite(height):
            path += f"{pen}{2 * x} {height:.1f}h2"
        pen = "L" if math.isfinite(height) else "M"
    return path


def _strip(states: Sequence[str]) -> str:
    # Each check is a piece of a band, and equal ones beside each other are one.
    x, paths = TREND - len(states), ""
    for state, run in itertools.groupby(states):
        width = len(list(run))
        kind = "unknown" if state == "unknown" else HEALTH_STATUS[state]
        paths += f'<path class="{kind}" d="M{2 * x} 0h{2 * width}v40h-{2 * width}z"/>'
        x += width
    fired = sum(HEALTH_STATUS[state] == "fail" for state in states)
    unknown = states.count("unknown")
    text = f"fired in {fired} of {len(states)} checks" if fired else "did not fire"
    text += f", unknown in {unknown}" if unknown else ""
    return f'{SVG} class="strip">{paths}</svg><figcaption>{text}'


SVG = '<svg viewBox="0 0 240 40" preserveAspectRatio="none" aria-hidden="true"'
REFRESH = '<meta http-equiv="refresh" content="5">\n'
STYLE = """
:root { color-scheme: light dark; --pass: #1a7f37; --warn: #9a6700; --fail: #cf222e;
  --line: #d0d7de; --soft: #59636e; }
@media (prefers-color-scheme: dark) { :root { --pass: #3fb950; --warn: #d29922;
  --fail: #f85149; --line: #3d444d; --soft: #9198a1; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { line-height: 1.25; margin: 0; }
h2 { font-size: 1rem; margin: 0; }
.pass { --state: var(--pass); }
.warn { --state: var(--warn); }
.fail { --state: var(--fail); }
.unknown, .old, .old ~ main * { --state: var(--soft); }
h1, h2 { color: var(--state); }
section { border: 1px solid var(--line); border-left: 5px solid var(--state);
  border-radius: 6px; margin: .75rem 0; padding: .6rem .9rem; overflow: hidden; }
section p { margin: .2rem 0; }
code, details { color: var(--soft); font-size: .8rem; line-height: 1.4; }
figure { float: right; width: 260px; margin: 0 0 .3rem 1rem; }
figcaption { color: var(--soft); font-size: .75rem; text-align: right; }
svg { display: block; width: 100%; height: 40px; }
.strip { height: 10px; }
@media (max-width: 40rem) { section { display: flex; flex-direction: column; }
  figure { order: 1; width: 100%; margin: .3rem 0 0; } }
path { fill: none; stroke: currentColor; stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.strip path { fill: var(--state); stroke: none; }
.limit { stroke: var(--fail); stroke-dasharray: 4 3; }
time { white-space: nowrap; }
header p, footer { color: var(--soft); margin: .2rem 0 1rem; }
a { color: inherit; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header class="{state}"><h1>{verdict}</h1>
<p>{where}<br>{shown}</p></header>
<main>
"""
PAGE_END = f"""</main>
<footer>health_check.py {__version__}: <a href="health?verbose">health?verbose</a>,
<a href="metrics">metrics</a>, <a href="?still">this page, standing still</a></footer>
</body>
</html>
"""


# --- 20. Serve: connections -> Answers -----------------------------------------------

MAX_CONNECTIONS = 512
MAX_REQUEST = 16 * 1024
MAX_LINES = 102
MAX_UNREAD = 2 << 20
MAX_UNKNOWN = 16
MAX_DRAINING, DRAIN_PAUSE = 16, 1.0
HOUR = 3600.0
# A TLS hello and a PROXY header of version 2, which would not end like a request.
FOREIGN = (b"\x16", b"\r\n\r\n\0\r\nQUIT\n")
# How those begin who speak something else, and what mends that on their side.
_TLS = (
    "speaks TLS, and this port does not: 'scheme: HTTP' for a kubelet, no 'check-ssl' "
    "for HAProxy, 'http://' in a URL"
)
_PROXY = (
    "sends a PROXY header: no 'send-proxy' and 'check-send-proxy' for HAProxy, no "
    "'proxy_protocol' for nginx"
)
_HTTP2 = (
    "speaks HTTP/2 unasked, and this port does not: no 'proto h2' for HAProxy, no "
    "'http2_protocol_options' for Envoy"
)
MISTAKES = {"\x16\x03": _TLS, "PROXY ": _PROXY, "\0": _PROXY, "PRI * HTTP/2": _HTTP2}
WRONG_METHOD = (
    "asks with a method that is refused: GET, 'option httpchk GET /health' for HAProxy"
)
ACCEPTS = 64
MAX_UNSENT = 8 * MAX_ANSWER
SLICE = 0.005
CALLER_TIMEOUT = 5.0
ALLOWED = ("GET", "HEAD")
# At once: to let http.server add them one by one takes as long as to find the answer.
RESPONSE_HEAD = (
    f"HTTP/1.1 {{}} {{}}\r\nServer: {AGENT}\r\nDate: {{}}\r\nContent-Type: {{}}\r\n"
    "Content-Length: {}\r\nCache-Control: no-store\r\n"
    "X-Content-Type-Options: nosniff\r\nConnection: close\r\n{}\r\n"
)
REFUSALS = {
    400: "not a request of HTTP/1\n",
    431: "the head of the request is too large\n",
    505: "only HTTP/1\n",
}
UNRESERVED = frozenset(string.ascii_letters + string.digits + "-._~,")
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_HEAD_END = re.compile(rb"\n\r?\n")
_FIELDS = re.compile(rb"(?:%b:[^\0\r\n]*\r?\n)*\r?\n" % FIELD_NAME.encode())
# The target of a request in origin form or, as for a proxy, in absolute form (RFC 9112
# section 3.2); it matches any text.
_TARGET = re.compile(r"(?:(?i:https?)://[^/?#]*)?([^?#]*)\??([^#]*)")
_DIGITS = re.compile(r"[0-9]+")
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")


def normalise_path(path: str) -> str:
    """Return a path as RFC 3986 section 6.2 compares it, repeated slashes as one.

    >>> normalise_path("//a/../%68ealth/./Down"), normalise_path("/health/")
    ('/health/Down', '/health/')
    """
    if not path.startswith("/"):
        return path or "/"
    *folders, last = _ENCODED.sub(_decoded, path).split("/")
    if last in (".", ".."):
        folders, last = [*folders, last], ""
    kept: list[str] = []
    for folder in folders:
        if folder == "..":
            del kept[-1:]
        elif folder not in ("", "."):
            kept.append(folder)
    return "/".join(["", *kept, last])


def _decoded(match: re.Match[str]) -> str:
    # Only what means the same with and without its percent sign, and the comma.
    char = chr(int(match[1], 16))
    return char if char in UNRESERVED else match[0]


def rules_of(path: str) -> tuple[str, ...]:
    """Return the names of the rules that a path asks for, each once.

    >>> rules_of("/health/Stalled,Down,Stalled"), rules_of("/health/")
    (('Stalled', 'Down'), ())
    """
    names = path[len("/health/") :] if path.startswith("/health/") else "/"
    return () if "/" in names else tuple(dict.fromkeys(filter(None, names.split(","))))


def mistake_of(request: Request) -> str:
    """Return what mends a request that is something else, empty if it is none."""
    if request.refusal and request.refusal.status == 405:
        return WRONG_METHOD
    line = request.requestline
    return next((MISTAKES[start] for start in MISTAKES if line.startswith(start)), "")


class Request(http.server.BaseHTTPRequestHandler):
    """A request that http.server reads from memory, and answers there; no socket.

    ``refusal`` is the answer to one that is not taken.
    """

    def __init__(self, head: bytes) -> None:
        # That of the base class would take a socket, and wait for it.
        self.rfile, self.command = io.BytesIO(head.lstrip(b"\r\n")), ""
        self.raw_requestline = self.rfile.readline()
        self.requestline = self.raw_requestline.decode("latin-1").rstrip("\r\n")
        self.path = self.query = ""
        self.refusal: Answer | None = None
        if len(head) > MAX_REQUEST or head.count(b"\n") > MAX_LINES:
            self.send_error(431)
        elif not _FIELDS.fullmatch(self.rfile.getvalue(), self.rfile.tell()):
            self.send_error(400)
        elif self.parse_request():
            self._judge()
        elif not self.refusal:
            self.send_error(400)

    def _judge(self) -> None:
        path, self.query = next(_TARGET.finditer(self.path)).groups()
        self.path = normalise_path(path)
        # A body is read past, but where its length is in doubt so is all the rest.
        lengths = {*map(str.strip, self.headers.get_all("Content-Length", ["0"]))}
        known = len(lengths) == 1 and all(map(_DIGITS.fullmatch, lengths))
        if not known or not self.request_version.startswith("HTTP/1."):
            self.send_error(400)
        elif self.command not in ALLOWED:
            allow = (("Allow", ", ".join(ALLOWED)),)
            text = f"only {' and '.join(ALLOWED)}\n"
            self.refusal = Answer(405, text, TEXT, allow)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Note why it is not taken: the base class would send a page of HTML."""
        self.refusal = Answer(code, REFUSALS[code])

    def respond(self, answer: Answer) -> bytes:
        """Return the whole response; the connection ends with it."""
        body = "".join(answer.body).encode(errors="backslashreplace")
        head = RESPONSE_HEAD.format(
            answer.status, self.responses[answer.status][0], _date(int(time.time())),
            answer.content_type, len(body),
            "".join(f"{name}: {value}\r\n" for name, value in answer.headers),
        )  # fmt: skip
        return head.encode() + (b"" if self.command == "HEAD" else body)


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


# A probe sends an equal head each time, and the parse takes longer than the answer.
@lru_cache(maxsize=16)
def parse_request(head: bytes) -> Request:
    """Return the request of a head, all of it or too much of it (RFC 9112)."""
    return Request(head)


class Phase(NamedTuple):
    """What a caller is waited for, and what is said where that takes too long."""

    events: int
    overdue: str


READ = Phase(selectors.EVENT_READ, "sent no request in time")
PARK = Phase(0, "no verdict within the deadline: the checker is stuck")
BUILD = Phase(0, "its answer was not made in time")
WRITE = Phase(selectors.EVENT_WRITE, "did not read its answer in time")
LINGER = Phase(selectors.EVENT_READ, "did not hang up in time")
DRAIN = Phase(selectors.EVENT_READ, "it is time to look again")
Conversation = Generator[Phase, None, T]


class Connection:
    """A caller, its conversation, and what that waits for."""

    def __init__(
        self, sock: socket.socket, client: str, steps: Conversation[None]
    ) -> None:
        self.sock, self.client, self.steps = sock, client, steps
        self.phase: Phase | None = None


# The loop is a selector's own: asyncio costs 22 ms at each start and 1.8 MB, and with a
# thread for each caller the slow ones would keep the probes out.
class Server:
    """Answers all callers from one loop; a slow one costs a buffer, never a thread.

    A conversation is a generator, and goes on where it stopped each time that what it
    waits for is there.  It yields READ until a whole head is there; PARK if the answer
    needs a new verdict, which each check that ends may be; DRAIN, for a second each,
    while requests still run; BUILD before each slice of a long answer, one in each turn
    of the loop; WRITE while the socket is full; LINGER, when all is sent, until the
    caller hangs up.  Then it ends, and the socket is closed, whatever the end was.

    At a yield it may be thrown TimeoutError, as the deadline of its phase has passed:
    in PARK the answer is made of that, in DRAIN it looks again, or answers as the loop
    ends, elsewhere it is the end.  GeneratorExit, as the loop ends or another caller
    needs the room, is the end everywhere.  All that wait in a phase wait equally long,
    so each dict of them is in order of deadline.
    """

    def __init__(
        self, listener: socket.socket, monitor: Monitor,
        notifiers: Sequence[Notifier] = (), last_words: str = "",
    ) -> None:
        self._listener, self._monitor, self._notifiers = listener, monitor, notifiers
        site = Site(monitor.config, monitor.statistics, last_words)
        self._routes: dict[str, Callable[[Verdict, str], Answer]] = {
            "/": lambda verdict, query: answer_page(verdict, site, query),
            "/livez": lambda *_: HEALTHY if monitor.alive() else STUCK,
            "/metrics": lambda verdict, _: answer_metrics(self._metrics(verdict)),
            "/health": answer_health,
        }
        self._rules = {rule.name for rule in monitor.config.rules}
        self._requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self._unknown: collections.Counter[str] = collections.Counter()
        self._waiting: dict[Phase, dict[Connection, float]] = {
            phase: {} for phase in (READ, PARK, DRAIN, BUILD, WRITE, LINGER)
        }
        self._selector = selectors.DefaultSelector()
        self._stopping, self._unsent = False, 0
        # Half the descriptors at most, or callers could leave none for a scrape; a
        # system without a limit says -1.
        files = os.sysconf("SC_OPEN_MAX")
        self._most = min(MAX_CONNECTIONS, files // 2 if files > 0 else MAX_CONNECTIONS)
        self._warned: dict[str, float] = {}
        self._woken, self.waker = socket.socketpair()
        for sock in (listener, self._woken, self.waker):
            sock.setblocking(False)
        # What the kernel keeps for callers counts as memory of this program, too.
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            listener.setsockopt(socket.SOL_SOCKET, option, MAX_REQUEST)
        monitor.listeners.append(lambda *_: self._wake())

    def run(self) -> None:
        """Answer until stop() is called."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._wake_up)
        while not self._stopping:
            timeout = self._expire()
            for key, _ in self._selector.select(0 if self._to_build() else timeout):
                key.data()
            for connection in self._to_build():
                self._step(connection)
        for connection in list(self._waiting[DRAIN]):
            self._step(connection, TimeoutError())
        for connection in itertools.chain(*map(list, self._waiting.values())):
            self._close(connection)

    def close(self) -> None:
        """Close its sockets; no signal may be written to ``waker`` any more."""
        for sock in (self._listener, self._woken, self.waker):
            sock.close()
        self._selector.close()

    def stop(self) -> None:
        """Make run() return; safe in a signal handler and in any thread."""
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        # If it is full the loop wakes anyway; if it is closed there is no loop.
        with suppress(OSError):
            self.waker.send(b"\0")

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)
        for connection in list(self._waiting[PARK]):
            self._step(connection)

    def _accept(self) -> None:
        for taken in range(ACCEPTS):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                LOG.debug("no caller accepted: %s", error)
                # Without a descriptor it does not say that nobody else is there.
                if error.errno in EXHAUSTED and not taken:
                    self._free_a_descriptor()
                return
            sock.setblocking(False)
            client = address[0].replace("::ffff:", "")
            connection = Connection(sock, client, self._converse(sock, client))
            self._step(connection)
            if sum(map(len, self._waiting.values())) > self._most:
                self._close(self._oldest() or connection)

    def _free_a_descriptor(self) -> None:
        oldest = self._oldest()
        self._warn("no file descriptor is left for a caller", 60)
        if oldest:
            self._close(oldest)
        else:
            time.sleep(0.01)

    def _warn(self, text: str, seconds: float, client: str = "") -> None:
        # Told once in a while: whoever makes a mistake makes it with each probe.
        now = time.monotonic()
        if now - self._warned.get(text, -math.inf) >= seconds:
            self._warned[text] = now
            message = f"the caller {client} {text}" if client else text
            log(logging.WARNING, message, client=client)

    def _oldest(self) -> Connection | None:
        # Whoever waits for a verdict stays, and who has its answer goes first.  Of the
        # others each takes a moment, unless it is slow: with the oldest goes a slow
        # one, not one that has just come.
        for phases in (LINGER,), (READ, WRITE):
            queues = map(self._waiting.__getitem__, phases)
            found = [next(iter(queue.items())) for queue in queues if queue]
            if found:
                return min(found, key=operator.itemgetter(1))[0]
        return None

    def _to_build(self) -> list[Connection]:
        # One at a time.
        return list(self._waiting[BUILD])[:1]

    def _expire(self) -> float | None:
        """Give up what is overdue, and return the seconds until something may be."""
        now, deadlines = time.monotonic(), []
        for phase, waiting in self._waiting.items():
            while waiting:
                connection, deadline = next(iter(waiting.items()))
                if deadline > now:
                    deadlines.append(deadline)
                    break
                self._step(connection, TimeoutError(phase.overdue))
        return min(deadlines) - now if deadlines else None

    def _step(self, connection: Connection, overdue: OSError | None = None) -> None:
        """Let a conversation go on until it waits again or ends."""
        steps = connection.steps
        if overdue:
            self._leave(connection)
        try:
            self._wait(connection, steps.throw(overdue) if overdue else next(steps))
            return
        except StopIteration:
            pass
        except OSError as error:
            LOG.debug("%s: given up: %s", connection.client, error)
        except Exception as error:
            report(error)
        self._close(connection)

    def _wait(self, connection: Connection, phase: Phase) -> None:
        if phase is connection.phase:
            return
        self._leave(connection)
        if phase.events:
            then = partial(self._step, connection)
            self._selector.register(connection.sock, phase.events, then)
        timeouts = {PARK: self._monitor.verdict_timeout, DRAIN: DRAIN_PAUSE}
        timeout = timeouts.get(phase, CALLER_TIMEOUT)
        self._waiting[phase][connection] = time.monotonic() + timeout
        connection.phase = phase

    def _leave(self, connection: Connection) -> None:
        phase, connection.phase = connection.phase, None
        if phase:
            del self._waiting[phase][connection]
        if phase and phase.events:
            self._selector.unregister(connection.sock)

    def _close(self, connection: Connection) -> None:
        self._leave(connection)
        connection.steps.close()
        connection.sock.close()

    def _converse(self, sock: socket.socket, client: str) -> Conversation[None]:
        """Take a caller from the first byte to the last."""
        # Nothing here keeps the answer, which may be long, while the caller lingers.
        yield from self._send(sock, (yield from self._respond(sock, client)))
        # A connection that is closed while input is unread, or still comes, is reset,
        # and the caller might never see its answer.
        sock.shutdown(socket.SHUT_WR)
        yield from _read_past(sock, LINGER)

    def _respond(self, sock: socket.socket, client: str) -> Conversation[bytes]:
        request = yield from _receive(sock)
        mistake = mistake_of(request) if request.refusal else ""
        if mistake:
            self._warn(mistake, HOUR, client)
        answer = request.refusal or (yield from self._answer(request, sock))
        if not isinstance(answer.body, str) and self._waiters() >= self._most // 2:
            # Room is left for short answers, which are those that probes need.
            answer = Answer(answer.status, "left out: too many callers wait\n")
        elif not isinstance(answer.body, str):
            answer = answer._replace(body=(yield from _build(answer.body)))
        self._count(request.path, str(answer.status))
        LOG.debug("%s: %s %s", client, request.requestline, answer.status)
        return request.respond(answer)

    def _waiters(self) -> int:
        return sum(len(self._waiting[phase]) for phase in (PARK, DRAIN, BUILD))

    def _send(self, sock: socket.socket, output: bytes) -> Conversation[None]:
        rest = memoryview(output)
        self._unsent += len(output)
        # Those who have read too little for longest make room.
        while self._unsent > MAX_UNSENT and self._waiting[WRITE]:
            self._close(next(iter(self._waiting[WRITE])))
        try:
            while rest:
                sent = yield from _when(WRITE, sock.send, rest)
                rest = rest[sent:]
        finally:
            self._unsent -= len(output)

    def _count(self, path: str, code: str) -> None:
        # Callers choose the paths: one that is not there, or one of many, has no label.
        names = rules_of(path)
        there = {*names} <= self._rules if names else path in (*self._routes, "/drain")
        path = "/health/..." if len(names) > 1 else path
        self._requests[path if there else "other", code] += 1

    def _answer(self, request: Request, sock: socket.socket) -> Conversation[Answer]:
        if request.path == "/drain":
            return (yield from self._drain(sock))
        names = rules_of(request.path)
        route = self._routes.get(request.path)
        if names:
            route = partial(answer_rules, names)
        if not route:
            return Answer(404, "there is /health, /health/Rule, /livez, /drain\n")
        for name in set(names) - self._rules:
            self._warn_unknown(name)
        fresh = request.path.startswith("/health")
        verdict = (yield from self._fresh()) if fresh else self._monitor.verdict
        return route(verdict, request.query)

    def _drain(self, sock: socket.socket) -> Conversation[Answer]:
        # 200 when nothing runs in two checks in a row, 503 where that is waited for in
        # vain: the kubelet goes on at either.
        monitor, quiet = self._monitor, 0
        end = time.monotonic() + monitor.config.drain_timeout
        full = len(self._waiting[DRAIN]) >= MAX_DRAINING
        why = f"{MAX_DRAINING} callers wait already" if full else ""
        why = why if monitor.judge.drain_while else NO_SERVER
        seen, left = monitor.verdict.sequence, None
        while quiet < 2 and not why:
            monitor.drains_until = time.monotonic() + MAX_DRAIN_PAUSE
            monitor.request(monitor.verdict.sequence)
            with suppress(TimeoutError):
                yield from _read_past(sock, DRAIN)
                raise ConnectionError("did not wait")
            verdict = monitor.verdict
            if verdict.sequence > seen and verdict.left is not None:
                seen, left = verdict.sequence, verdict.left
                quiet = 0 if left else quiet + 1
            why = self._why_in_vain(verdict, end, known=left is not None)
        if quiet == 2:
            return Answer(200, "Drained\n")
        reasons = dict.fromkeys(filter(None, (why, left)))
        return Answer(503, escaped_line(f"Not drained: {'; '.join(reasons)}"))

    def _why_in_vain(self, verdict: Verdict, end: float, *, known: bool) -> str:
        # Said with what is left, so not before that is known.
        for status in verdict.rules if known else ():
            if status.rule.name in HUNG and status.state == "firing":
                return f"{status.rule.name} fires, so nothing will end"
        if verdict.left == NO_SERVER:
            return NO_SERVER
        if self._stopping:
            return "this program ends"
        late = "it is too late" if known else "it is too late; nothing is known yet"
        return late if time.monotonic() >= end else ""

    def _warn_unknown(self, name: str) -> None:
        # Callers choose the names, so there is a bound on how many are remembered.
        full = name not in self._unknown and len(self._unknown) >= MAX_UNKNOWN
        name = "NAME of others" if full else shorten(name)
        self._unknown[name] += 1
        if self._unknown[name] == 1:
            text = f"/health/{name} is answered 200: there is no rule of that name"
            log(logging.WARNING, text, rule=name)

    def _fresh(self) -> Conversation[Verdict]:
        # On a schedule a verdict may be three intervals old; otherwise each request
        # is a check.
        monitor, latest = self._monitor, self._monitor.verdict
        age = time.monotonic() - latest.time
        if latest.sequence and age <= MAX_INTERVALS * monitor.config.scrape_interval:
            return latest
        try:
            # Room is left for those who need no verdict: load must not drive liveness.
            if self._waiters() >= self._most - self._most // 8:
                raise TimeoutError("too many callers wait for a verdict")
            monitor.request(latest.sequence)
            while monitor.verdict.sequence <= latest.sequence:
                yield PARK
            return monitor.verdict
        except TimeoutError as error:
            fault = str(error)
        except Exception as error:
            fault = f"bug: {report(error)}"
        return Verdict(0, fault, time.monotonic(), time.time())

    def _metrics(self, verdict: Verdict) -> Iterator[str]:
        yield from verdict_metrics(verdict)
        yield from scrape_metrics(self._monitor.statistics)
        # Callers choose the names: the log has some of them, and no label.
        unknown = sum(self._unknown.values())
        yield from service_metrics(self._requests, unknown, self._notifiers)
        yield from process_metrics()


def _receive(sock: socket.socket) -> Conversation[Request]:
    received, end, foreign = b"", None, False
    while not end and len(received) <= MAX_REQUEST and not foreign:
        data = yield from _when(READ, sock.recv, MAX_REQUEST + 1 - len(received))
        if not data:
            raise ConnectionError("no whole request")
        received += data
        foreign = received.startswith(FOREIGN)
        end = None if foreign else _HEAD_END.search(received)
    return parse_request(received[: end.end()] if end else received)


def _build(parts: Iterator[str]) -> Conversation[str]:
    """Put an answer together, a slice of it each turn of the loop."""
    built: list[str] = []
    while True:
        yield BUILD
        end = time.monotonic() + SLICE
        for part in parts:
            built.append(part)
            if time.monotonic() > end:
                break
        else:
            return "".join(built)


def _read_past(sock: socket.socket, phase: Phase) -> Conversation[None]:
    """Read past what a caller sends until it hangs up, as a body, and to a bound."""
    unread = MAX_UNREAD
    while unread > 0:
        # Once a turn, or who sends without a pause would keep all others out.
        yield phase
        data = sock.recv(MAX_REQUEST)
        unread = unread - len(data) if data else 0


def _when(phase: Phase, action: Callable[[Any], T], argument: Any) -> Conversation[T]:
    """Do what a socket may not be ready for; mostly it is, so that is tried first."""
    while True:
        with suppress(BlockingIOError):
            return action(argument)
        yield phase


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port; without a host, on IPv6 and IPv4.

    Raises OSError where the port is taken or not permitted, and ValueError for a host
    that cannot be one.
    """
    # All that the kernel grants: of a burst it drops what finds no room, and the
    # caller, a probe perhaps, tries again after a second.
    create = partial(socket.create_server, backlog=65535)
    if host:
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)[0]
        family, address = found[0], found[4]
        return create(address, family=family, dualstack_ipv6=address[0] == "::")
    try:
        return create(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError) as error:
        # ValueError says that the system has no IPv6, or cannot join the two.
        if getattr(error, "errno", None) not in (None, errno.EADDRNOTAVAIL):
            raise
        return create(("0.0.0.0", port))


# --- 21. Commands: one look at the targets -> lines of stdout, an exit status --------

# A preStop hook has 30 s with the default grace, and SIGTERM comes after it.
QUERY_PAUSE, REPORT_PAUSE, WAIT_TIMEOUT = 1.0, 10.0, 25.0
PROMETHEUS_STEP = 10.0
# What Prometheus does not have, or only from somewhere else.
NOT_IN_PROMETHEUS = {
    "scrape_error": "is up == 0 there, which has no reason",
    "scrape_body_size_bytes": "needs --enable-feature=extra-scrape-metrics",
    **dict.fromkeys(PROBED, "comes from /metrics of this program"),
}


def say(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print a result or an error; a reader who has gone changes no exit status."""
    stream = sys.stderr if error else sys.stdout
    try:
        if stream:
            print(text, file=stream, flush=True, end=end)
    except OSError:
        # What is buffered would be written, and fail, once more as Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_once(config: Config) -> int:
    """Check once, print the outcome, and return 0 for Healthy or 1.

    One check is no time: ``for`` counts as over, and a rule with a range is left out.
    """
    rules = tuple(rule._replace(hold=0.0) for rule in config.rules)
    verdict, _ = next(_checks(config._replace(rules=rules)))
    decided = []
    for status in verdict.rules:
        visible = visible_rule(status)
        needed = _needed_range(visible) if visible else ""
        if needed:
            say(f"[?]{status.rule.name} undecided: one check has no {needed}")
        else:
            decided.append(status)
    if not decided:
        say("no rule can be decided by one check")
        return 1
    answer = answer_health(verdict._replace(rules=tuple(decided)), "verbose")
    say("".join(answer.body).rstrip("\n"))
    return 0 if answer.status == 200 else 1


def print_query(config: Config, text: str) -> int:
    """Print what an expression gives now, as promtool does; 1 if it or a scrape fails.

    Raises PromQLError or ConfigError for one that can give nothing.
    """
    expr = _holdable(parse_expression(text), config)
    checks = _checks(config._replace(rules=()), Rule("Query", expr))
    # A range of one sample tells little.
    needed = 2 if _range_text([expr]) else 1
    *_, (verdict, evaluation) = itertools.islice(checks, needed)
    failed = [target for target in verdict.targets if target.reason]
    for target in failed:
        problem = f"scrape of {target.instance} failed: {target.reason}"
        say(f"{problem}: {target.message}", error=True)
    try:
        for line in _results(expr, evaluation):
            say(escape_controls(line))
    except EvaluationError as error:
        say(f"health_check.py: {error}", error=True)
        return 1
    return 1 if failed else 0


def wait(config: Config, text: str, timeout: float) -> int:
    """Return 0 when an expression gives nothing in two checks in a row, 1 if too late.

    Prints each ten seconds what it waits for.  Raises as ``print_query`` does.
    """
    expr = _holdable(parse_vector(text), config)
    quiet, reported, end = 0, -math.inf, time.monotonic() + timeout
    for verdict, evaluation in _checks(config._replace(rules=()), Rule("Wait", expr)):
        left = remaining(expr, verdict.targets, evaluation)
        quiet = 0 if left else quiet + 1
        if quiet == 2:
            return 0
        if left and verdict.time >= reported + REPORT_PAUSE:
            reported = verdict.time
            say(f"waiting for {escape_controls(left)}")
        if time.monotonic() + QUERY_PAUSE > end:
            break
    say(f"not over within {format_duration(timeout)}", error=True)
    return 1


def _holdable(expr: Expr, config: Config) -> Expr:
    added = added_series(config._asdict())
    problems = list(hopeless(expr, added, config.target_labels))
    if problems:
        raise ConfigError("\n".join(problems))
    return expr


def _checks(config: Config, *others: Rule) -> Iterator[tuple[Verdict, Evaluation]]:
    """Check again and again; what ``others`` read is there to be evaluated."""
    # It asks the engine for nothing, and listens on no port.
    idle = config._replace(canary_when=(), app_port=0)
    judge, verdict = Judge(idle, others, warn=_warn), Verdict(0, "", 0.0, 0.0)
    scraper = Scraper(config, judge.wanted, judge.spare)
    scraper.start()
    try:
        while True:
            check = Check(time.monotonic(), time.time())
            verdict = judge.verdict_of(check, scraper.scrape(list_names=True), verdict)
            yield verdict, judge.history.evaluation(check.now, check.wall)
            time.sleep(QUERY_PAUSE)
    finally:
        scraper.stop()


def _warn(messages: Iterable[Message]) -> None:
    for _, text, fields in messages:
        # What is remarked of a target is printed with the outcome.
        if "target" not in fields:
            say(f"warning: {text}", error=True)


def _results(expr: Expr, evaluation: Evaluation) -> Iterator[str]:
    found, now = evaluate(expr, evaluation), f"@[{evaluation.wall:.3f}]"
    if isinstance(found, float):
        yield f"scalar: {format_float(found)} {now}"
    elif isinstance(found, str):
        yield f"string: {quote(found)} {now}"
    elif isinstance(found, Range):
        for labels, points in found.windows():
            yield f"{format_series(labels)} =>"
            for at, value in zip(points.times, points.values):
                unix = at - evaluation.now + evaluation.wall
                yield f"{format_float(value)} @[{unix:.3f}]"
    else:
        for labels, value in found.items():
            yield f"{format_series(labels)} => {format_float(value)} {now}"


def ask_running(environ: Mapping[str, str], path: str) -> int:
    """Ask the program that runs here, print its answer, and return 0 or 1.

    It fails open and closed as the answers do: for ``/health/NAME``, which may restart
    a server, only a 503 is 1, and that there was no verdict is told; for any other
    path only a 200 is 0.
    """
    path = "/" + path.lstrip("/")
    status, text = _answer_of_running(environ, path)
    if path.startswith("/health/") and status not in (200, 503):
        problem = f"HTTP {status}" if status else text
        say(f"{problem}; unknown, so exit status 0", error=True)
        return 0
    say(text.rstrip("\n"), error=not status)
    return 0 if status == 200 else 1


def _answer_of_running(environ: Mapping[str, str], path: str) -> tuple[int, str]:
    """Return a status and a body, or 0 and why there is none."""
    host = environ.get("APP_HOST", "").strip() or "localhost"
    host = {"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    port = environ.get("APP_PORT", "").strip()
    if path.startswith("/health") and not re.search(r"[?&](verbose|format)", path):
        path += "&verbose" if "?" in path else "?verbose"
    try:
        with Translated():
            link = port.startswith(SERVICE_LINKS)
            port = "8081" if link or not port else str(parse_port(port))
            target = Target("", f"http://{host}:{port}{path}")
            with fetch(target, time.monotonic() + CALLER_TIMEOUT) as response:
                answer = response.read(RECEIVE_BUFFER).decode(errors="replace")
        return response.status, answer
    except ScrapeError as error:
        return 0, f"no answer from {host} port {port}: {error}"


def check_config(config: Config, *, as_group: bool) -> int:
    """Print the rules as understood, or as a rule group of Prometheus; return 0.

    That is what concerns the servers that answer now; if none does, the table of
    servers that built-in rules are made from.
    """
    if as_group:
        say(prometheus_rules(config.rules))
        return 0
    verdict, _ = next(_checks(config))
    for target in filter(operator.attrgetter("reason"), verdict.targets):
        say(f"scrape of {target.instance}: {target.reason}: {target.message}")
    for status in verdict.rules:
        say(describe_rule(status))
    for server in SERVERS if verdict.fault else ():
        say(describe_server(server))
    return 0


def describe_server(server: KnownServer) -> str:
    """Return a row of the table of servers, a line a field."""
    fields = ("waiting", "running", "moving", "prefill", "remark")
    found = (f"    {f}: {getattr(server, f)}" for f in fields if getattr(server, f))
    return "\n".join((f"{server.name} {server.at}", *found))


def describe_rule(status: RuleStatus) -> str:
    """Return the text of a rule with its type, its range and what it reads."""
    rule, visible = status.rule, visible_rule(status)
    exprs = [(visible or rule).expr]
    backs, longest = lookbacks(exprs), _range_text(exprs) or "no range"
    most = max((back.most for back in backs.values()), default=1)
    if most > 1:
        longest += f", up to {most} samples of 8 bytes a series"
    kind = "built in" if rule.builtin else "yours"
    reads = "" if rule.builtin else f"; reads {', '.join(sorted(backs))}"
    reads = reads if visible else "; no metric that it reads is there"
    text = f"{rule.name}: {explain(status)}\n    {kind}; {longest}{reads}"
    for name in sorted(backs):
        # A metric's prefix is seldom a capital, and a rule's name mostly has one.
        if re.match(r"[A-Z]\w*:", name):
            text += f"\n    {name} is a metric: a blank ends the name of a rule"
    return text


def prometheus_rules(rules: Iterable[Rule]) -> str:
    """Return rules as a rule group of Prometheus, in YAML.

    >>> print(prometheus_rules(parse_rules("Down: scrape_error for 30s")))
    groups:
      - name: health_check
        rules:
          # scrape_error is up == 0 there, which has no reason
          - alert: Down
            expr: |-
              up == 0
            for: 30s
    """
    lines = ["groups:", "  - name: health_check", "    rules:"]
    for rule in rules:
        expr = _without_reasons(rule)
        names = {selector.name for selector in find_selectors(expr)}
        notes = [name for name in NOT_IN_PROMETHEUS if name in names]
        lines += [f"      # {name} {NOT_IN_PROMETHEUS[name]}" for name in notes]
        text = format_expression(_as_in_prometheus(expr))
        clauses = zip(RULE_WORDS, (rule.hold, rule.keep_firing_for))
        lines += [
            f"      - alert: {rule.name}", "        expr: |-", f"          {text}",
            *(f"        {word}: {format_duration(s)}" for word, s in clauses if s),
        ]  # fmt: skip
    return "\n".join(lines)


def _without_reasons(rule: Rule) -> Expr:
    # To Prometheus, where nobody listens a scrape has failed as any other has.
    names = lookbacks([rule.expr]).keys() - {"scrape_error"}
    known = rule.builtin and rule.name != "Down"
    return (prune(rule.expr, names) if known else None) or rule.expr


def _as_in_prometheus(expr: Expr, *, counts: bool = False) -> Expr:
    """Return an expression without ``scrape_error``, whose value 1 may count."""
    if isinstance(expr, Subquery):
        return expr._replace(expr=_as_in_prometheus(expr.expr, counts=True))
    if isinstance(expr, Operation):
        counts = counts or expr.name not in ("and", "or", "unless")
        parts = (_as_in_prometheus(operand, counts=counts) for operand in expr.operands)
        return expr._replace(operands=tuple(parts))
    if isinstance(expr, Selector) and expr.name == "scrape_error":
        return _failed_scrape(expr, counts=counts)
    return expr


def _failed_scrape(expr: Selector, *, counts: bool) -> Expr:
    kept = tuple(matcher for matcher in expr.matchers if matcher.label != "reason")
    if expr.window:
        ones = _failed_scrape(Selector("up", kept), counts=True)
        return Subquery(ones, expr.window, PROMETHEUS_STEP, expr.offset, expr.at)
    down = Operation("==", (expr._replace(name="up", matchers=kept), Number(0)))
    return Operation("+", (down, Number(1))) if counts else down


def _needed_range(rule: Rule) -> str:
    # A built-in rule takes the last value known, where there is but one sample.
    known = ("last_over_time", "max_over_time", "count_over_time")
    if rule.builtin:
        return _range_text(find_selectors(rule.expr, known))
    return _range_text([rule.expr])


def _range_text(expressions: Iterable[Expr]) -> str:
    backs = lookbacks(expressions).values()
    longest = max((back.seconds for back in backs), default=0.0)
    return f"range of {format_duration(longest)}" if longest else ""


# --- 22. Main: arguments -> exit status; wiring and signals --------------------------

EXIT_STATUS, TERMINATION_LOG, MAX_FILE = 88, "/dev/termination-log", 4096
# What the line about the start has under names of its own.
SHOWN_APART = ("UNHEALTHY_WHEN", "APP_PORT", "METRICS_TIMEOUT", "SCRAPE_INTERVAL")
MODES = (
    ("--once", "", "check once; exit 0 if healthy, 1 if not"),
    ("--check-config", "", "print the rules as understood; exit 2 if one is wrong"),
    ("--demo", "", "serve against a simulated LLM server"),
    ("--query", "EXPR", "print what EXPR gives now"),
    ("--wait", "EXPR", "wait until EXPR gives nothing twice; exit 1 if not in time"),
)
EXAMPLES = """

answers on APP_PORT:
  /health       200 Healthy or 503 Unhealthy, for readiness; ?verbose says why
  /health/NAME  503 only while that rule fires, for liveness; or several: A,B
  /livez        200 while this program works
  /drain        200 once nothing runs or waits any more, for a preStop hook
  /metrics, /   its own metrics, and a page for people

examples:
  METRICS_ENDPOINT=http://localhost:8000/metrics python3 health_check.py
  METRIC_TO_CHECK=tgi_queue_size METRIC_THRESHOLD=10 python3 health_check.py
  UNHEALTHY_WHEN='Busy: tgi_queue_size > 10 for 30s' python3 health_check.py

exit status:
  0  healthy, or stopped by a signal
  1  unhealthy, no answer, or the port cannot be had
  2  a setting, a rule or an expression is wrong
  88 a rule of EXIT_WHEN fires
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    0 is healthy or a clean stop, 1 unhealthy or not able to serve, 2 a wrong
    configuration or expression, 88 the end that EXIT_WHEN asks for.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # A label's value may be more than the locale can write.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _run(arguments)
    except (ConfigError, PromQLError) as error:
        say(f"health_check.py: {error}", error=True)
        return 2
    except (OSError, RuntimeError) as error:
        exhausted = isinstance(error, OSError) and error.errno in EXHAUSTED
        if not exhausted and "start new thread" not in str(error):
            raise
        lacking = "processes, open files or memory"
        say(f"health_check.py: {error}: too few {lacking} are allowed", error=True)
        return 1
    finally:
        # What argparse has printed is not written yet.
        say("", end="")


def _run(arguments: Sequence[str]) -> int:
    if not arguments:
        return serve(_configure())
    options = _parse_arguments(arguments)
    if options.probe is not None:
        return ask_running(os.environ, options.probe)
    if options.demo:
        return serve(_start_demo(_configure(**DEMO_RULES)))
    config = _configure()
    if options.check_config:
        return check_config(config, as_group=options.format == "prometheus")
    if options.once:
        return check_once(config)
    if options.query is not None:
        return print_query(config, options.query)
    timeout = WAIT_TIMEOUT if options.timeout is None else options.timeout
    return wait(config, options.wait, timeout)


def _configure(**defaults: str) -> Config:
    config = load_config({**defaults, **os.environ})
    log_to_stderr(config)
    return config


def serve(config: Config) -> int:
    """Answer until SIGTERM or SIGINT; return 0, or 1 where the port cannot be had.

    And 88 where EXIT_WHEN ended it.
    """
    try:
        listener = listen(config.app_host, config.app_port)
    except (OSError, ValueError) as error:
        where = f"{config.app_host or 'any address'}, port {config.app_port}"
        problem = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        conflict = port_conflict(config.app_port)
        problem += conflict and f" ({conflict})"
        LOG.error("cannot listen on %s: %s", where, problem)
        return 1
    with listener:
        return _serve_on(listener, config)


def _serve_on(listener: socket.socket, config: Config) -> int:
    port = listener.getsockname()[1]
    config = config._replace(pod_name=config.pod_name or socket.gethostname())
    generator = page_url(config.pod_name, port)
    notifiers = [Notifier(config, to, generator) for to in config.alertmanager_url]
    monitor = Monitor(config)
    monitor.listeners.append(log_transitions)
    threads: list[Monitor | Notifier] = [monitor, *notifiers]
    before = read_last_words(config.last_words)
    server = Server(listener, monitor, notifiers, before)
    policy = ExitPolicy(config, server.stop, time.monotonic())
    monitor.listeners += [*(n.publish for n in notifiers), policy.on_verdict]
    with _stopped_by_signals(server):
        for thread in threads:
            thread.start()
        _log_start(config, port)
        if before:
            log(logging.WARNING, f"the run before ended so: {before}")
        # So that nothing is said of a server that nobody has asked yet.
        monitor.request(0)
        server.run()
    for thread in threads:
        thread.stop()
    return policy.status


@contextmanager
def _stopped_by_signals(server: Server) -> Iterator[None]:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    # A signal that comes just before the loop sleeps would not wake it otherwise.
    signal.set_wakeup_fd(server.waker.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        server.close()
        # Python restores what a signal does by default as it ends.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


class ExitPolicy:
    """Ends the program with 88 when a rule of EXIT_WHEN fires.

    Kubernetes restarts the pod for it without any back-off.  So never before the first
    Healthy verdict of this run, and never within EXIT_AFTER of its start.
    """

    status = 0

    def __init__(self, config: Config, stop: Callable[[], None], start: float) -> None:
        self._config, self._stop = config, stop
        self._earliest, self._was_healthy = start + config.exit_after, False

    def on_verdict(self, _: Verdict, verdict: Verdict) -> None:
        """Stop the program if a verdict asks for it; for the thread that checks."""
        self._was_healthy = self._was_healthy or verdict.healthy
        names, early = self._config.exit_when, verdict.time < self._earliest
        firing = [s for s in verdict.rules if s.rule.name in names and s.fires]
        if firing and self._was_healthy and not early and not self.status:
            self._end(firing, verdict)

    def _end(self, firing: Sequence[RuleStatus], verdict: Verdict) -> None:
        self.status, names = EXIT_STATUS, ", ".join(s.rule.name for s in firing)
        words = firing[0].last_words or describe(firing[0], verdict)
        text = f"exit status {EXIT_STATUS}: {names}; {words}"
        log(logging.WARNING, text, rule=names)
        text = f"{format_time(verdict.wall)} {text}"
        _write_last_words(self._config.last_words, text)
        self._stop()


def read_last_words(path: str) -> str:
    """Return why the run before ended, empty if that is not known."""
    with suppress(OSError):
        if os.path.isfile(path):  # noqa: PTH113
            with open(path, encoding="utf-8", errors="replace") as file:
                return escape_controls(file.read(MAX_FILE).strip())
    return ""


def _write_last_words(path: str, text: str) -> None:
    if not path and os.access(TERMINATION_LOG, os.W_OK):
        path = TERMINATION_LOG
    # A FIFO that nobody reads would hold up the exit.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK
    try:
        if path:
            with open(os.open(path, flags, 0o644), "wb") as file:
                file.write(f"{text}\n".encode(errors="replace"))
    except OSError as error:
        LOG.error("LAST_WORDS=%s: %s", path, error.strerror)


def page_url(name: str, port: int) -> str:
    """Return the URL of the page on a host, valid whatever the host is called.

    >>> page_url("pod-1", 8081), page_url("fd00::1", 8081), page_url("my pod", 80)
    ('http://pod-1:8081/', 'http://[fd00::1]:8081/', 'http://my-pod:80/')
    """
    host = re.sub(r"[^a-zA-Z0-9.:-]", "-", name)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _log_start(config: Config, port: int) -> None:
    settings = _started_with(config, port)
    shown = ", ".join(f"{name} {value or 'none'}" for name, value in settings.items())
    rules = [r.name if r.builtin else format_rule(r) for r in config.rules]
    own = {rule.name for rule in config.rules}
    why = {name: by for name, by in left_out(config).items() if by and name not in own}
    gone = [f"not {name} ({why[name]})" for name in why]
    in_force = "; ".join((*rules, *gone))
    message = f"health_check.py {__version__} is up: {shown}, rules: {in_force}"
    fields = {**settings, "rules": rules, "left_out": gone}
    log(logging.INFO, message, version=__version__, **fields)


def _started_with(config: Config, port: int) -> dict[str, str]:
    settings = {
        "port": str(port),
        "metrics": " ".join(target.url for target in config.metrics_endpoint),
        "timeout": format_duration(config.metrics_timeout),
        "interval": format_duration(config.scrape_interval),
        "alertmanager": " ".join(target.url for target in config.alertmanager_url),
        **{n: text for n, text in config.given.items() if n not in SHOWN_APART},
    }
    if config.exit_when:
        settings["EXIT_WHEN"] += " (for restartPolicyRules of Kubernetes 1.36)"
    return settings


def _parse_arguments(arguments: Sequence[str]) -> Any:
    # The server, which needs neither, starts a tenth sooner.
    import argparse  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="health_check.py", description=(__doc__ or "").partition("\n\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"settings, from the environment:\n{_settings_help()}{EXAMPLES}",
    )  # fmt: skip
    modes = parser.add_mutually_exclusive_group()
    for flag, value, text in MODES:
        kind = {"metavar": value} if value else {"action": "store_true"}
        modes.add_argument(flag, help=text, **kind)  # type: ignore[arg-type]
    modes.add_argument(
        "--probe", nargs="?", const="/health", metavar="PATH",
        help="ask the running program (default /health); exit 0 if 200, else 1; for"
        " /health/NAME exit 1 only if 503",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("text", "prometheus"),
        help="how --check-config prints rules: prometheus is a rule group in YAML",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=parse_duration, metavar="DURATION",
        help=f"how long --wait waits (default {format_duration(WAIT_TIMEOUT)})",
    )
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args(arguments)
    if options.timeout is not None and options.wait is None:
        parser.error("--timeout needs --wait")
    if options.format and not options.check_config:
        parser.error("--format needs --check-config")
    return options


def _settings_help() -> str:
    import textwrap  # noqa: PLC0415

    width = max(len(setting.name) for setting in SETTINGS)
    wrap = partial(
        textwrap.fill, width=79, subsequent_indent=" " * (width + 4),
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
    return "\n".join(
        wrap(f"  {name:{width}}  {help}{f' (default {default})' if default else ''}")
        for name, _, default, help in SETTINGS
    )


# Minutes of waiting are longer than anybody watches a demo.
DEMO_RULES = {
    "UNHEALTHY_WHEN": "QueueFull: vllm:num_requests_waiting > 10 for 5s"
    '; Unresponsive: probe_success{probe="canary"} == 0 for 5s',
    "CANARY_URL": "http://localhost/v1/completions",
}
DEMO_AFTER, HANGS = 10.0, range(80, 140)
SIMULATED = """\
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="demo"}} {}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="demo"}} {}
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{engine="0",model_name="demo"}} {}
"""


class Simulation(http.server.BaseHTTPRequestHandler):
    """A vLLM-like server whose queue rises and falls; it hangs once while idle."""

    def do_GET(self) -> None:
        """Serve the metrics of this moment."""
        seconds = time.time() - STARTED
        hangs, wave = int(seconds) in HANGS, math.sin(2 * math.pi * seconds / 40)
        waiting = 0 if hangs else max(0, round(30 * wave))
        running = 0 if hangs else 8 if waiting else 3
        tokens = int(800 * (HANGS.start if hangs else seconds))
        self._reply(SIMULATED.format(waiting, running, tokens))

    def do_POST(self) -> None:
        """Answer with a completion, once it does not hang."""
        while int(time.time() - STARTED) in HANGS:
            time.sleep(0.1)
        self._reply('{"choices": [{"text": " the"}]}')

    def _reply(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(text)))
        # The canary has given up.
        with suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the log is that of the checker."""


def _start_demo(config: Config) -> Config:
    simulated = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Simulation)
    threading.Thread(target=simulated.serve_forever, daemon=True).start()
    say(
        "a simulated LLM server: its queue rises above 10 and falls, every 40 seconds\n"
        f"  after {HANGS.start} seconds it is idle, and hangs for a minute\n"
        f"  curl -i localhost:{config.app_port}/health\n"
        f"  curl 'localhost:{config.app_port}/health?verbose'\n"
    )
    url = f"http://127.0.0.1:{simulated.server_port}"
    return config._replace(
        metrics_endpoint=(parse_target(f"{url}/metrics"),),
        canary_url=parse_target(f"{url}/v1/completions"), canary_timeout=2.0,
        canary_after=DEMO_AFTER, canary_when=canary_rules(DEMO_AFTER),
        scrape_interval=config.scrape_interval or 1.0,
    )  # fmt: skip


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.exit(main())
