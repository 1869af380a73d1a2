"""The report: one file that needs nothing else, and shows everything."""

import re
from html.parser import HTMLParser

from lmopt.tuning.report import numbers
from lmopt.tuning.result import TuneResult


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.found += [
            value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset") and value
        ]
        if tag in ("table", "tr", "section", "div", "svg"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("table", "tr", "section", "div", "svg"):
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else(whole) -> None:
    page = (whole[0].folder / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert all(one.startswith("#") for one in links.found)
    assert not links.open
    assert "url(http" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_every_trial_is_on_the_page(whole) -> None:
    result = whole[0]
    page = (result.folder / "report.html").read_text()
    rows = len(re.findall("<tr", page))
    assert rows >= len(result.trials) + len(result.pareto)
    for one in result.trials:
        assert one.name in page
    for reason in result.reasons:
        assert reason.split(":")[0][:40] in page
    assert "--replay" in page


def test_numbers_count_measured_trials_by_speed(whole) -> None:
    result = whole[0]
    order = numbers(result)
    assert sorted(order.values()) == list(range(1, len(result.trials) + 1))
    measured = sorted(
        (one for one in result.trials if one.state == "measured"), key=lambda one: order[one.name]
    )
    times = [one.figures["token_p50_ms"] for one in measured]
    assert times == sorted(times)


def test_pictures_are_pictures(whole) -> None:
    folder = whole[0].folder
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in (folder / "report.svg").read_text()


def test_a_notebook_shows_it(whole) -> None:
    shown = whole[0]._repr_html_()
    assert shown.startswith('<div class="lmopt-tune">')
    assert "<svg" in shown
    assert "recommended" in shown


def test_a_result_comes_back_from_its_file(whole) -> None:
    result = whole[0]
    again = TuneResult.from_file(result.folder)
    assert again.best == result.best
    assert again.trials == result.trials
    assert again.to_dict() == result.to_dict()
