"""`cxr plan` as users run it; and what docs/scale.md says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cxr_retrieval.cli import plan as plan_command
from cxr_retrieval.cli.plan import value_shown
from cxr_retrieval.errors import SetupError
from cxr_retrieval.scale.costs import read_costs
from cxr_retrieval.scale.planning import Demand, Figure, Group, plan
from tests_support import run_cxr

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
ASKED = ("plan", "--films", "1e5", "--per-day", "2e3")


def keys_of(value: Any) -> set[str]:
    """Every key of the JSON that is a word, not a name of a figure or a cost."""
    found: set[str] = set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= keys_of(list(inner.values()) if key in {"figures", "costs"} and isinstance(inner, dict) else inner) | {key}
    elif isinstance(value, list):
        for inner in value:
            found |= keys_of(inner)
    return found


def test_the_page_shows_what_the_command_prints() -> None:
    """Each block that begins with the command."""
    blocks = re.findall(r"```text\n\$ cxr (plan [^\n]*)\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    for command, shown in blocks:
        result = run_cxr(*command.split())
        assert result.returncode == 0, result.stderr
        assert [line.rstrip() for line in result.stdout.splitlines()] == shown.splitlines()


def test_the_page_has_the_figures_of_three_sizes() -> None:
    table = PAGE.split("## Three sizes")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|$", table, re.MULTILINE)
    plans = [plan(Demand(films, per_day), read_costs()).figures for films, per_day in ((1e6, 5e3), (10e6, 50e3), (100e6, 500e3))]
    assert rows == [(figure.what, *(shown(one[name]) for one in plans)) for name, figure in plans[0].items()]


def shown(figure: Figure) -> str:
    return f"{'~' if figure.assumed else ''}{value_shown(figure)}"


def test_the_page_has_the_costs_that_ship() -> None:
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| ([0-9.,e+-]+) ([A-Za-z/ ]+) \| (measured|assumed)", PAGE, re.MULTILINE)
    costs = read_costs().by_name
    assert len(rows) > 20
    for name, value, unit, kind in rows:
        assert (float(value.replace(",", "")), unit, kind) == (
            pytest.approx(costs[name].value, rel=0.005),
            costs[name].unit,
            "measured" if costs[name].measured else "assumed",
        ), name


def test_the_pages_own_costs_can_be_planned_with(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "ours.toml").write_text(block)
    costs = read_costs(tmp_path / "ours.toml")
    assert not plan(Demand(1e6, 1e3, gpu="l40s"), costs).figures["hours_one_replica"].assumed
    assert costs.profile != read_costs().profile


def test_json_has_the_keys_that_the_page_names() -> None:
    result = run_cxr(*ASKED, "--json", "--simulate", "--replicas", "1", "--replicas", "2", "--seed", "5")
    said = json.loads(result.stdout)
    assert keys_of(said) == set(re.findall(r"`([a-z0-9_]+)`", PAGE.split("## As JSON")[1].split("\n## ")[0])) - {"null"}
    assert [day["replicas"] for day in said["days"]] == [1, 2]
    assert len(said["days"][0]["hours"]) == 24
    assert sum(hour["films"] for hour in said["days"][0]["hours"]) == said["days"][0]["films"] == said["days"][1]["films"]
    assert set(said["figures"]["gallery_memory"]["costs"]) <= set(said["costs"])
    again = run_cxr(*ASKED, "--json", "--simulate", "--replicas", "1", "--replicas", "2", "--seed", "5")
    assert again.stdout == result.stdout


def test_a_screen_with_groups_and_sources() -> None:
    result = run_cxr(*ASKED, "--gpu", "h200", "--simulate", "--replicas", "1")
    assert result.returncode == 0, result.stderr
    for group in Group:
        assert re.search(rf"^{group.value} ", result.stdout, re.MULTILINE)
    assert "assumed: NVIDIA's data sheets" in result.stdout
    assert re.search(r"^10 +\d+ +█+", result.stdout, re.MULTILINE)
    assert "1 replica" in result.stdout


def test_a_picture_of_the_day(tmp_path: Path) -> None:
    result = run_cxr(*ASKED, "--simulate", "--replicas", "1", "--png", tmp_path / "day.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")


def test_a_simulation_without_its_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SetupError, match="lacks simpy and matplotlib; expected the extra 'plan'"):
        plan_command.plan(1e5, 2e3, simulate=True, png=Path("day.png"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu", "h1000"), "--gpu h1000 has no costs; expected l4, a100, h100, h200; got h1000. Next: "),
        (("--replicas", "2"), "--replicas and --png are of a simulated day; expected --simulate"),
        (("--days", "0"), "--days cannot be planned for"),
        (("--p99", "0.01"), "no number of servers is fast enough"),
        (("--costs", "none.toml"), "none.toml: cannot be read"),
        (("--profile", "none.csv"), "none.csv: cannot be read"),
        (("--per-day", "3e6", "--simulate"), "takes too long to simulate"),
        (("--simulate", "--replicas", "1", "--png", "/nowhere/day.png"), "/nowhere/day.png: cannot be written"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: tuple[str, ...], said: str) -> None:
    result = run_cxr(*ASKED, *options)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stdout == ""
