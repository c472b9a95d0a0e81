"""The first section of the report: the verdict on the entropy of each group."""

from entropy_trl.analysis.law.points import unit_of
from entropy_trl.analysis.logs.runs import Series
from entropy_trl.analysis.report.curves import entropies
from entropy_trl.analysis.report.page import Page
from entropy_trl.analysis.report.values import gathered
from entropy_trl.analysis.verdict import Verdict, verdict


#: What stands before the sign, since a colour alone does not reach every reader.
SYMBOLS = {"collapsed": "✕", "collapsing": "↘", "surging": "↗", "healthy": "✓", "unknown": "?"}
#: Up to so many groups, the advice stands with each verdict; with more, each advice stands once.
_FEW = 4


def section(page: Page) -> dict[str, Verdict]:
    """The verdict on each group that logged an entropy."""
    found: dict[str, Verdict] = {}
    for group, members in page.groups.items():
        logged: dict[str, list[Series]] = {}
        for metric, series in entropies(page, members.values()):
            in_nats = Series(series.steps, series.values * unit_of(metric))
            logged.setdefault(metric, []).append(in_nats)
        if not logged:
            page.missing.append(f"Verdict on {group}: no entropy was logged.")
            continue
        metric = max(logged, key=lambda name: len(logged[name]))
        settings = next((run.config for run in members.values() if run.config), {})
        found[group] = verdict(logged[metric], settings, metric=metric)
    page.numbers["verdicts"] = {group: of_group.to_dict() for group, of_group in found.items()}
    return found


def common_advice(page: Page) -> list[tuple[str, str]]:
    """Each advice with the groups that it is for; empty where it stands with each verdict."""
    found = page.numbers["verdicts"]
    return gathered((of_group["advice"], group) for group, of_group in found.items()) if len(found) > _FEW else []
