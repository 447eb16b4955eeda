"""What the pages say of a run, and the figure, is what results.json has."""

import json

from bench.contenders import BENCH
from bench.figures import draw, rewrite
from tests.harness import HERE

RESULTS = json.loads((BENCH / "results.json").read_text())


def test_pages_say_what_the_run_found():
    pages = [(folder / "README.md").read_text() for folder in (BENCH, HERE)]
    assert [rewrite(page, RESULTS) for page in pages] == pages


def test_benchmarks_page_has_a_place_for_all_that_is_told():
    page = (BENCH / "README.md").read_text()
    assert [page.count(f"<!-- {mark} -->\n") for mark in ("run", "goals", "figures", "end")] == [1, 1, 1, 3]


def test_figure_shows_what_the_run_found():
    assert draw(RESULTS) == (BENCH / "figure.svg").read_text()
