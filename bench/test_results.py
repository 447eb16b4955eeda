"""What bench/README.md says of the goals is what results.json has."""

import json
import re

from bench.run import BENCH, GOALS, ratio


def test_readme_of_the_benchmark_says_how_far_each_goal_is_reached():
    figures = json.loads((BENCH / "results.json").read_text())["figures"]
    rows = re.findall(r"^\| .* \| [≥≤] ([\d.]+) \| ([\d.]+)", (BENCH / "README.md").read_text(), re.MULTILINE)
    found = [ratio(figures, goal.measure, goal.other) if goal.other else 0 for goal in GOALS]
    assert rows == [(f"{goal.bound:g}", f"{figure:.2f}") for goal, figure in zip(GOALS, found, strict=True)]
