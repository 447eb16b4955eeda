"""What was found, told: a table, the goals, a figure, and the tables of bench/README.md."""

import re
import statistics
import textwrap
from typing import Any

from bench.contenders import (
    BARE,
    CHANGED,
    COMPRESSED,
    CONTENDERS,
    GOALS,
    GUIDE,
    ITEM,
    OURS,
    START,
    Contender,
    Goal,
    more_is_better,
)

Figures = dict[str, dict[str, list[Any]]]  # by measure and contender, one of each round
SLACK = 1.4  # by which a ratio of a short run may be worse than the published one
UNPACKED = "MB unpacked"
IN_FIGURE = (*dict.fromkeys(goal.measure for goal in GOALS if goal.other is GUIDE), UNPACKED, COMPRESSED)


def middle(values: list[Any]) -> Any:
    """The median; of truths and versions the last."""
    return statistics.median(values) if type(values[0]) in {int, float} else values[-1]


def ratio(figures: Figures, measure: str, other: Contender) -> float | None:
    """This project's median over another's; None where one was not measured, is no number, or the other's is 0."""
    found = figures.get(measure, {})
    ours, theirs = (middle(found.get(one.name, [""])) for one in (OURS, other))
    if isinstance(ours, bool | str) or isinstance(theirs, bool | str) or not theirs:
        return None
    return ours / theirs


def reached(figures: Figures, goal: Goal) -> float | None:
    """What a goal bounds; None where it was not measured."""
    if goal.other:
        return ratio(figures, goal.measure, goal.other)
    return max(figures.get(goal.measure, {}).get(OURS.name, []), default=None)


def missed(figures: Figures, published: Figures | None = None) -> list[str]:
    """A sentence on each goal that is not reached; of a short run, on each ratio far from what has been published."""
    sentences = []
    for goal in GOALS:
        more, found, bound = more_is_better(goal.measure), reached(figures, goal), goal.bound
        if published:
            before = reached(published, goal)
            if goal.measure not in figures or not goal.steady or before is None:
                continue  # a short run does not measure it, or only by accident
            bound = before / SLACK if more else before * SLACK
        other = f" of {goal.other.name}'s" if goal.other else ""
        if found is None:
            sentences.append(f"{goal.measure}{other}: not measured")
        elif found < bound if more else found > bound:
            sentences.append(f"{goal.measure}: {found:.2f}{other}, not {'>=' if more else '<='} {bound:.3g}")
    return sentences


# --- Tables ---


def number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 or figure == int(figure) else f"{figure:.3g}"


def cell(values: list[Any]) -> str:
    """The median, and half of what lies between the least and the greatest; a truth, a version; a dash for nothing."""
    if not values:
        return "-"
    found = middle(values)
    if isinstance(found, bool | str):
        return {True: "yes", False: "no"}.get(found, found)
    spread = (max(values) - min(values)) / 2
    return number(found) + (f" ± {spread / found:.0%}" if spread and found else "")


def measured(figures: Figures) -> list[str]:
    """The names of all that have a figure, in their usual order."""
    names = {name for found in figures.values() for name in found}
    return [one.name for one in (OURS, CHANGED, *CONTENDERS[1:]) if one.name in names]


def print_table(figures: Figures) -> None:
    """This project's ratios, and then all medians."""
    names = measured(figures)
    others = [other for other in (CHANGED, GUIDE, BARE) if other.name in names]
    wide = max(map(len, figures), default=0)
    print(f"\n{'':{wide}}", *(f"/{other.name:>12}" for other in others), *(f"{name:>16}" for name in names))
    for measure, found in figures.items():
        shares = [ratio(figures, measure, other) for other in others]
        medians = [cell(found.get(name, [])) for name in names]
        told = ("-" if share is None else f"{share:.2f}" for share in shares)
        print(f"{measure:{wide}}", *(f"{one:>13}" for one in told), *(f"{one:>16}" for one in medians))


def rows(table: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def brief(measure: str) -> str:
    return measure.replace(ITEM, "an item")


def tell_run(results: dict) -> str:
    at, left_out = results["machine"], results["left out"]
    about = f"Revision {at['revision']}, {at['date']}: Python {at['Python']}, {at['proxy']}, Docker {at['Docker']}, "
    about += f"{at['cores']} cores of {at['CPU']}, Linux {at['kernel']}, a load of "
    about += f"{at['load']} before it began, {results['seconds']:.0f} s."
    return textwrap.fill(" ".join([about, *(f"Left out: {one}." for one in left_out)]), 120)


def tell_goals(results: dict) -> str:
    table = [("this project's, as a ratio", "goal", "found")]
    for goal in GOALS:
        found = reached(results["figures"], goal)
        name = brief(goal.measure) + (f", of {goal.other.name}'s" if goal.other else "")
        sign = "≥" if more_is_better(goal.measure) else "≤"
        table.append((name, f"{sign} {goal.bound:g}", "not measured" if found is None else f"{found:.2f}"))
    return rows(table)


def tell_figures(results: dict) -> str:
    figures = results["figures"]
    names = measured(figures)
    body = [(brief(measure), *(cell(found.get(name, [])) for name in names)) for measure, found in figures.items()]
    return rows([("", *names), *body])


def rewrite(text: str, results: dict) -> str:
    """bench/README.md, or the project's, with what these results say at its marks."""
    for mark, tell in (("run", tell_run), ("goals", tell_goals), ("figures", tell_figures)):
        head, begin, rest = text.partition(f"<!-- {mark} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        text = f"{head}{begin}{tell(results)}\n{end}{tail}" if end else text
    size, start = (results["figures"].get(measure, {}).get(OURS.name) for measure in (UNPACKED, START))
    if not size or not start:
        return text
    told = f"{middle(size):.0f} MB, ready in {middle(start):.2f} s of CPU"
    return re.sub(r"\d+ MB, ready in \d\.\d+ s of CPU", told, text)


# --- A figure ---


def bar(figures: Figures, measure: str) -> str | None:
    """One bar, without its place: this project's of the guide's, less being better; None where one is missing."""
    if ratio(figures, measure, GUIDE) is None:
        return None
    ours, guide = (middle(figures[measure][one.name]) for one in (OURS, GUIDE))
    bare = middle(figures[measure].get(BARE.name, [0]))
    name = measure.replace(f", {ITEM}", "")
    if more_is_better(measure):
        name = name.replace("requests per CPU second", "µs of CPU a request")
        ours, guide, bare = (figure and 1e6 / figure for figure in (ours, guide, bare))
    line = f'<path d="M{300 * min(bare / guide, 1):.0f} -4v26" stroke="#747c86" stroke-width="3"/>\n' if bare else ""
    return f"""<text x="-12" y="14" text-anchor="end">{name}</text>
<rect width="300" height="18" rx="3" opacity=".3"/>
<rect width="{300 * min(ours / guide, 1):.0f}" height="18" rx="3" fill="#3b82f6"/>
{line}<text x="312" y="14"><tspan font-weight="bold">{ours / guide:.0%}</tspan>&#160; {number(ours)} : {number(guide)}</text>
"""


def draw(results: dict) -> str:
    """An SVG of the goals against the guide and of sizes, in greys that show on white and on black."""
    at = results["machine"]
    bars = [drawn for measure in IN_FIGURE if (drawn := bar(results["figures"], measure))]
    groups = [f'<g transform="translate(350 {60 + 34 * place})">\n{one}</g>\n' for place, one in enumerate(bars)]
    end = 60 + 34 * len(bars)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{end + 24}" fill="#747c86" font-size="13" \
font-family="system-ui, sans-serif">
<text x="350" y="22" font-weight="bold">This project, in per cent of the container of FastAPI's guide</text>
<text x="350" y="42">less is better; the line is bare FastAPI, without a log</text>
{"".join(groups)}<text x="350" y="{end + 12}" font-size="11">{at["CPU"]}, Python {at["Python"]}, {at["date"]}</text>
</svg>
"""
