"""Which tokens carry the covariance: words, positions, and completions rendered with their tokens coloured."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray

from entropy_trl.analysis.covariance.records import StepRecords
from entropy_trl.analysis.pages import environment
from entropy_trl.tokens.selection import selection_count


POSITION_BINS = 10

#: Quantiles of the covariance's magnitude at which the colour gets stronger: the shares of Table 1, from the top.
_SCALE_QUANTILES = (0.5, 0.8, 0.98, 0.998)
_TABLE_ROWS = 10

#: From which share of a step's tokens on each shade is given, in words.
SHADE_SHARES = ", ".join(f"top {100 * (1 - quantile):.3g}%" for quantile in _SCALE_QUANTILES)


@dataclass(frozen=True)
class TokenCount:
    """A token among the chosen ones.

    Args:
        token (`str`): The token's text.
        token_id (`int`): The token's id.
        count (`int`): How often it was recorded.
        chosen (`int`): How often it was chosen.
        lift (`float`): The token's share of the chosen tokens over its share of all tokens.
        keyness (`float`): Log-likelihood ratio `G^2` of the two shares (Dunning, 1993), negative for a lift below 1.
            It weighs the lift by how much evidence there is for it; above 10.8 has p < 0.001 for a single token.
    """

    token: str
    token_id: int
    count: int
    chosen: int
    lift: float
    keyness: float


@dataclass(frozen=True)
class PositionBin:
    """The tokens between two relative positions (0: the first token of the completion, 1: its end)."""

    start: float
    end: float
    count: int
    chosen: int
    lift: float


@dataclass(frozen=True)
class SelectedTokens:
    """Which tokens were chosen.

    Args:
        chosen_by (`str`): How, in words.
        count (`int`): Recorded tokens.
        chosen (`int`): How many of them were chosen.
        tokens (`list` of [`TokenCount`]): The most over-represented first.
        positions (`list` of [`PositionBin`]): Counts by position relative to the completion's length.
    """

    chosen_by: str
    count: int
    chosen: int
    tokens: list[TokenCount]
    positions: list[PositionBin]


def selected_tokens(
    records: Sequence[StepRecords], fraction: float | None = None, minimum_count: int = 5
) -> SelectedTokens:
    """Which tokens a control restrains, or which have the highest covariance, against all recorded tokens.

    Args:
        records (`Sequence[StepRecords]`): The steps, taken together.
        fraction (`float`, *optional*): The share of each step's recorded tokens with the highest covariance, at least
            one. Defaults to None: the tokens that the control restrained.
        minimum_count (`int`, *optional*, defaults to `5`): Rarer tokens are not listed.

    Raises:
        ValueError: The control restrained none of the recorded tokens, or the fraction is not one.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"`fraction` is a share of the tokens, in (0, 1], got {fraction}.")
    texts: dict[int, str] = {}
    counts = pd.DataFrame({"count": [], "chosen": []}, dtype=np.int64)
    bins = np.zeros((2, _position_bins(records)), np.int64)
    for record in records:
        tokens = record.table("row_id", "position", "token_id", "token", "covariance", "selected")
        chosen = tokens["selected"] if fraction is None else _highest(tokens["covariance"], fraction)
        by_id = tokens.assign(chosen=chosen).groupby("token_id")
        counts = counts.add(by_id["chosen"].agg(count="size", chosen="sum"), fill_value=0)
        texts.update(by_id["token"].first().items())
        length = tokens.groupby("row_id")["position"].transform("max") + 1
        of_bin = (tokens["position"] * bins.shape[1] // length).to_numpy()
        bins += [np.bincount(part, minlength=bins.shape[1]) for part in (of_bin, of_bin[chosen])]

    total, total_chosen = int(counts["count"].sum()), int(counts["chosen"].sum())
    if not total_chosen:
        raise ValueError(
            "The control restrained none of the recorded tokens: give `fraction` to look at those with the highest "
            "covariance."
        )
    counts = counts[counts["count"] >= minimum_count]
    lift = (counts["chosen"] / total_chosen) / (counts["count"] / total)
    keyness = _keyness(counts["count"].to_numpy(), counts["chosen"].to_numpy(), total, total_chosen)
    listed = [
        TokenCount(texts[int(token_id)], int(token_id), int(row["count"]), int(row["chosen"]), lift[token_id], key)
        for (token_id, row), key in zip(counts.iterrows(), keyness.tolist(), strict=True)
    ]
    positions = [
        PositionBin(
            start=i / bins.shape[1],
            end=(i + 1) / bins.shape[1],
            count=int(of_all),
            chosen=int(of_chosen),
            lift=float(of_chosen / total_chosen / (of_all / total)) if of_all else 0.0,
        )
        for i, (of_all, of_chosen) in enumerate(bins.T)
    ]
    controls = sorted({record.control for record in records if record.control})
    return SelectedTokens(
        chosen_by=f"restrained by {', '.join(controls)}" if fraction is None else f"top {100 * fraction:g}% covariance",
        count=total,
        chosen=total_chosen,
        tokens=sorted(listed, key=lambda row: (-row.keyness, row.token_id)),
        positions=positions,
    )


def _position_bins(records: Sequence[StepRecords]) -> int:
    """How many parts completions are cut into: fewer where they are short, so that no part is empty by rounding."""
    longest = records[0].table("row_id", "position").groupby("row_id")["position"].max() + 1
    return min(POSITION_BINS, int(longest.median()) if len(longest) else 1)


def _highest(covariance: pd.Series, fraction: float) -> NDArray[np.bool_]:
    """Marks the share of the tokens with the highest covariance; of equal ones the first."""
    chosen = np.zeros(len(covariance), bool)
    chosen[np.argsort(-covariance.to_numpy(), kind="stable")[: selection_count(fraction, len(chosen))]] = True
    return chosen


def _keyness(count: NDArray[np.int64], chosen: NDArray[np.int64], total: int, total_chosen: int) -> NDArray[np.float64]:
    """Signed `G^2 = 2 * sum O log(O / E)` over the table (this token or another) x (chosen or not)."""
    observed = np.array([chosen, count - chosen, total_chosen - chosen, total - total_chosen - count + chosen])
    rows, columns = np.array([count, count, total - count, total - count]), [total_chosen, total - total_chosen] * 2
    expected = rows * np.array(columns)[:, None] / total
    ratio = np.divide(observed, expected, out=np.ones_like(expected), where=observed > 0)
    g2 = 2 * (observed * np.log(ratio)).sum(axis=0)
    return np.where(observed[0] >= expected[0], g2, -g2)


#: Colours as CSS variables, for light and dark. Orange (positive) and blue (negative) are apart for colour-blind
#: readers, and the line below a token says the sign without colour: solid or dotted.
COMPLETION_CSS = """
:root {
  --cov-page: #ffffff; --cov-text: #1b1b1b; --cov-line: #6b6b6b;
  --cov-p1: #fff0de; --cov-p2: #fdd7a8; --cov-p3: #f7b15c; --cov-p4: #e8860c;
  --cov-n1: #e8f1fb; --cov-n2: #c3dcf5; --cov-n3: #8bbdec; --cov-n4: #5b9fe0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --cov-page: #16181d; --cov-text: #f2f2f2; --cov-line: #a0a0a0;
    --cov-p1: #33271a; --cov-p2: #543710; --cov-p3: #774906; --cov-p4: #965600;
    --cov-n1: #1b2836; --cov-n2: #1d3d5e; --cov-n3: #1f4f86; --cov-n4: #2763a5;
  }
}
.cov-completion { background: var(--cov-page); color: var(--cov-text); margin: 1.5rem 0; }
.cov-text { font: 0.95rem/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.cov-text span, .cov-legend span { padding: 1px 0; border-bottom: 0 solid var(--cov-text); }
.cov-legend span { padding: 1px 6px; white-space: nowrap; }
.cov-text .p1, .cov-legend .p1 { background: var(--cov-p1); }
.cov-text .p2, .cov-legend .p2 { background: var(--cov-p2); border-bottom-width: 1px; }
.cov-text .p3, .cov-legend .p3 { background: var(--cov-p3); border-bottom-width: 2px; }
.cov-text .p4, .cov-legend .p4 { background: var(--cov-p4); border-bottom-width: 3px; }
.cov-text .n1, .cov-legend .n1 { background: var(--cov-n1); }
.cov-text .n2, .cov-legend .n2 { background: var(--cov-n2); border-bottom: 1px dotted; }
.cov-text .n3, .cov-legend .n3 { background: var(--cov-n3); border-bottom: 2px dotted; }
.cov-text .n4, .cov-legend .n4 { background: var(--cov-n4); border-bottom: 3px dotted; }
.cov-text .s, .cov-legend .s { outline: 2px solid var(--cov-text); margin: 0 3px; font-weight: bold; }
.cov-completion table { border-collapse: collapse; margin: 0.5rem 0; }
.cov-completion th, .cov-completion td { border: 1px solid var(--cov-line); padding: 2px 8px; text-align: right; }
.cov-completion .scroll { overflow-x: auto; }
.cov-completion pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""

_PAGE_CSS = """
body { background: var(--cov-page); color: var(--cov-text); font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 60rem; padding: 1rem; }
"""


def covariance_scale(covariance: NDArray[np.floating]) -> tuple[float, ...]:
    """The magnitudes from which a token is coloured in the next stronger of four shades: quantiles of a step's own."""
    return tuple(float(value) for value in np.quantile(np.abs(covariance), _SCALE_QUANTILES))


@dataclass(frozen=True)
class ShownToken:
    """A token on a page: its text with hidden characters visible, its classes and its tooltip."""

    text: str
    classes: str
    values: str


@dataclass(frozen=True)
class Completion:
    """A completion as the template `completions.html` shows it."""

    title: str
    prompt: str | None
    tokens: list[ShownToken]
    rows: list[list[str]]
    head: tuple[str, ...] = ("position", "token", "covariance", "log-prob", "entropy", "advantage", "restrained")


def shown_completion(tokens: pd.DataFrame, scale: Sequence[float], title: str, prompt: str | None = None) -> Completion:
    """What [`completion_html`] shows, as values for a template."""
    tokens = tokens.sort_values("position")
    shown = [
        ShownToken(_visible(row.token), f"{_shade(row.covariance, scale)}{' s' if row.selected else ''}", _values(row))
        for row in tokens.itertuples()
    ]
    largest = tokens.reindex(tokens["covariance"].abs().sort_values(ascending=False, kind="stable").index)
    rows = [
        [
            f"{row.position}",
            _visible(row.token).strip("\n"),
            f"{row.covariance:+.3f}",
            f"{row.logp:.3f}",
            f"{row.entropy:.3f}",
            f"{row.advantage:+.3f}",
            "yes" if row.selected else "no",
        ]
        for row in largest.head(_TABLE_ROWS).itertuples()
    ]
    return Completion(title, prompt, shown, rows)


def completion_html(tokens: pd.DataFrame, scale: Sequence[float], title: str, prompt: str | None = None) -> str:
    """One completion with its tokens coloured by covariance, as an HTML fragment that needs [`COMPLETION_CSS`].

    Orange is positive, with a solid line below; blue is negative, with a dotted one; the stronger, the larger. Tokens
    that the control restrained have a frame. The values of a token are its tooltip; those of the tokens with the
    largest covariances are in a table too.

    Args:
        tokens (`DataFrame`): The rows of one completion: `position`, `token`, `logp`, `entropy`, `advantage`,
            `covariance` and `selected`.
        scale (`Sequence[float]`): The scale, from [`covariance_scale`].
        title (`str`): The heading, as plain text.
        prompt (`str`, *optional*): The prompt's text.
    """
    return _fragment("completion", shown_completion(tokens, scale, title, prompt))


def legend_html(scale: Sequence[float]) -> str:
    """What the colours of [`completion_html`] mean, as an HTML fragment."""
    return _fragment("legend", scale, SHADE_SHARES)


def _fragment(macro: str, *values: Any) -> str:
    return str(vars(environment().get_template("completions.html").module)[macro](*values))


def completion_title(row_id: int, first: pd.Series) -> str:
    """The heading of a completion, from its first token."""
    return (
        f"Completion {row_id}: reward {first['reward']:g}, advantage {first['advantage']:+.2f}, mean reward of its "
        f"prompt {first['group_accuracy']:.2f}"
    )


def completions_with_largest(tokens: pd.DataFrame, k: int) -> list[tuple[int, pd.DataFrame]]:
    """The `k` completions with the largest covariances, by `row_id`; those with restrained tokens come first."""
    by_row = tokens.groupby("row_id")
    rank = pd.DataFrame({"selected": by_row["selected"].any(), "largest": by_row["covariance"].max()})
    rows = rank.sort_values(["selected", "largest"], ascending=False, kind="stable").index[:k]
    return [(int(row_id), by_row.get_group(row_id)) for row_id in rows]


def render_completions(records: Sequence[StepRecords], k: int = 3) -> str:
    """A whole HTML page, with nothing to download: of each step the `k` completions with the largest covariances.

    Restrained tokens come first: a completion that has some goes before one that has none.
    """
    steps = []
    for record in records:
        tokens = record.table()
        scale = covariance_scale(tokens["covariance"].to_numpy())
        completions = []
        for row_id, completion in completions_with_largest(tokens, k):
            first = completion.iloc[0]
            prompt = record.prompts.get(int(first["group"]))
            completions.append(shown_completion(completion, scale, completion_title(row_id, first), prompt))
        summary = (
            f"Mean covariance {record.mean_covariance:.4g}, mean entropy {record.mean_entropy:.3f} nats, learning rate "
            f"{record.learning_rate:g}."
        )
        steps.append({"step": record.step, "summary": summary, "scale": scale, "completions": completions})
    css = Markup(COMPLETION_CSS + _PAGE_CSS)  # the package's own
    return environment().get_template("completions_page.html").render(steps=steps, shares=SHADE_SHARES, css=css)


def _shade(covariance: float, scale: Sequence[float]) -> str:
    """The class of a covariance: its sign and how many of the magnitudes it exceeds."""
    return f"{'p' if covariance > 0 else 'n'}{sum(abs(covariance) > threshold for threshold in scale)}"


def _values(row: Any) -> str:
    """The tooltip of a token."""
    return (
        f"position {row.position}, covariance {row.covariance:+.3f}, log-prob {row.logp:.3f}, "
        f"entropy {row.entropy:.3f}, advantage {row.advantage:+.3f}{', restrained' if row.selected else ''}"
    )


def _visible(token: str) -> str:
    """The token with its white space and control characters visible; a line break is kept after its sign."""
    if token and not token.strip(" "):
        return "␣" * len(token)
    return "".join({"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}.get(c, _escaped(c)) for c in token) or "∅"


def _escaped(character: str) -> str:
    """Characters that cannot be seen, or that turn the direction of writing, by their number."""
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp")
    return f"\\u{{{ord(character):x}}}" if hidden else character
