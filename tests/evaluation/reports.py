"""Reports by hand, and what every page of a report must hold to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np

from commands import evaluate
from data_sources.progress import NullProgress
from evaluation.exam import CHAMPION, POLICY, Walk
from evaluation.measures import measure
from evaluation.report import Report
from evaluation.verdict import verdict
from tests.evaluation.walks import of_daily

LOADING = {"src", "href", "xlink:href", "srcset", "poster", "data", "action", "formaction", "background"}


def report_of(
    policy: Sequence[Walk], others: Mapping[str, Sequence[Walk]] | None = None, **given: Any
) -> Report:
    """A report about walks; baselines that earn nothing, unless given."""
    nothing = [
        of_daily(*[0.0] * len(walk.time), symbol=walk.symbol, position=0 * walk.time.astype(int))
        for walk in policy
    ]
    others = others or {}
    walks = {POLICY: list(policy)} | {
        name: list(others.get(name, nothing)) for name in ("buy and hold", "always flat", "momentum")
    }
    if CHAMPION in others:
        walks[CHAMPION] = list(others[CHAMPION])
    pooled = {name: measure(own) for name, own in walks.items()}
    plain: dict[str, Any] = {
        "checkpoint": "run1_epoch25.pt",
        "members": [{"checkpoint": "run1_epoch25.pt", "run": 1, "epoch": 25}],
        "first": policy[0].time[0],
        "last": policy[0].time[-1],
        "trained_until": np.datetime64("2026-01-05T00:00", "ns"),
        "overlaps": False,
        "walks": walks,
        "pooled": pooled,
        "verdict": verdict(pooled[POLICY], {n: m for n, m in pooled.items() if n != POLICY}, 3),
        "num_trials": 3,
        "ladder": [(0.0, measure(policy))],
        "plotted": [walk.symbol for walk in policy],
        "training": [],
        "made": {"seed": "0"},
        "notes": [],
    }
    return Report(**plain | given)


def files_of(report: Report) -> dict[str, bytes]:
    """Everything that is written of a report, by name."""
    return dict(evaluate.render_files(report, NullProgress()))


class Page(HTMLParser):
    """The elements of a page, its ids, what it refers to, and its text."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.values: list[str] = []
        self.pieces: list[str] = []
        self.source = content.decode()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            self.values.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name in LOADING:
                self.references.append(value or "")

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def loads_nothing(self) -> None:
        """Assert that the page is complete in itself: every reference is to a part of it."""
        assert not {"link", "img", "iframe", "object", "embed", "base", "image"} & set(self.tags)
        assert all(reference.startswith("#") for reference in self.references), self.references
        urls = re.findall(r"url\(([^)]*)\)", self.source)
        assert all(url.startswith("#") for url in urls)
        assert not re.search(r"@import|fetch\(|XMLHttpRequest|WebSocket|import\(", self.source)
        assert not re.search(r"https?://", re.sub(r'xmlns(?::\w+)?="[^"]*"', "", self.source))
        assert "default-src 'none'" in "".join(self.values)
        assert len(self.ids) == len(set(self.ids))
        inner = {reference[1:] for reference in (*self.references, *urls)}
        assert inner <= set(self.ids)
