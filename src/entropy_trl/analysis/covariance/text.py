"""The results of `entropy-trl covariance` as text: a heading, a sentence and a table for each question."""

import json

from entropy_trl.analysis.covariance.relation import Relation
from entropy_trl.analysis.covariance.result import Results
from entropy_trl.analysis.tables import NONE, ROWS, number, spread, text_table


def report(results: Results) -> str:
    """The results as text: a heading, a sentence and a table for each question."""
    parts = (_quantiles, _training, _entropy_change, _difficulty, _regions, _tokens)
    return "\n\n".join(part(results) for part in parts)


def _unit(results: Results) -> str:
    return "tokens" if results.level == "token" else "completions"


def _quantiles(results: Results) -> str:
    """Table 1 for the first, the middle and the last step."""
    tables = [results.quantiles[i] for i in sorted({0, len(results.quantiles) // 2, len(results.quantiles) - 1})]
    rows = []
    for i, row in enumerate(tables[0].rows):
        name = "all" if row.fraction == 1 else f"top {100 * row.fraction:g}%"
        cells = [f"{table.rows[i].covariance:.4g} ({table.rows[i].count})" for table in tables]
        rows.append([name, *cells])
    sampled = [table.step for table in results.quantiles if table.sampled]
    note = (
        f" Of {len(sampled)} of {len(results.quantiles)} steps only some completions were recorded: the table is of "
        "those, and their highest covariances are below the step's."
        if sampled
        else ""
    )
    unit = _unit(results)
    return (
        f"Mean covariance of the {unit} with the highest one (Table 1 of arXiv 2505.22617), with the number of {unit}; "
        f"a share is at least one.{note}\n\n" + text_table(["", *(f"step {table.step}" for table in tables)], rows)
    )


def _training(results: Results) -> str:
    rows = [
        [
            f"{point.step}",
            f"{point.learning_rate:.3g}",
            f"{point.covariance:.4g}",
            f"{100 * point.positive:.1f}%",
            number(point.selected_covariance, ".4g"),
            f"{100 * point.selected:.3g}%",
            f"{point.entropy:.4f}",
            number(None if point.entropy_after is None else point.entropy_after - point.entropy, "+.2e"),
        ]
        for point in spread(results.training)
    ]
    positive = sum(point.covariance > 0 for point in results.training)
    head = ["step", "learning rate", "covariance", "positive", "of restrained", "restrained", "entropy", "its change"]
    return (
        f"Covariance over training: the mean is above 0 in {positive} of {len(results.training)} recorded steps. "
        f"'positive' is the share of {_unit(results)}, entropies are in nats.\n\n" + text_table(head, rows)
    )


def _entropy_change(results: Results) -> str:
    change = results.entropy_change
    if change is None:
        return (
            "Entropy change against covariance: not computed, since fewer than three points have the entropy after the "
            "update, which a recorder measures with `entropy_change: true`."
        )
    rows = [
        [name, f"{relation.points}", *_correlations(relation), relation.resampled]
        for name, relation in (
            ("steps" if change.window == 1 else f"means of {change.window} steps", change.over_steps),
            ("prompts", change.over_prompts),
            ("prompts, less the step's mean", change.within_steps),
        )
    ]
    head = ["over", "points", "Pearson [95%]", "Spearman [95%]", "slope", "bootstrap draws"]
    return (
        "Entropy change on the same states against learning rate x covariance (Fig. 8). The theory says negative. "
        f"Covariance above 0 in {100 * change.covariance_positive:.0f}% of the points, entropy fell in "
        f"{100 * change.entropy_fell:.0f}%, and moved as the sign of the covariance says in "
        f"{100 * change.sign_agrees:.0f}%.\n\n" + text_table(head, rows)
    )


def _correlations(relation: Relation) -> list[str]:
    cells = []
    for value, interval in (
        (relation.pearson, relation.pearson_ci95),
        (relation.spearman, relation.spearman_ci95),
    ):
        text = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
        cells.append(number(value, ".2f") + text)
    return [*cells, number(relation.slope, ".3g")]


def _difficulty(results: Results) -> str:
    if results.difficulty is None:
        return "Covariance by difficulty: not computed, since the rewards are not between 0 and 1."
    rows = [
        [
            group.accuracy,
            f"{group.prompts}",
            number(group.covariance, ".4g"),
            number(group.standard_error, ".2g"),
            number(group.entropy, ".4f"),
            number(group.change, "+.2e"),
        ]
        for group in results.difficulty
    ]
    return (
        "Covariance by how often the prompt is solved: means over prompts. Where all completions of a prompt have the "
        "same reward (first and last row), GRPO's advantages are 0.\n\n"
        + text_table(["accuracy", "prompts", "covariance", "standard error", "entropy", "its change"], rows)
    )


def _regions(results: Results) -> str:
    rows = [
        [
            row.region,
            *(_percent(share.mean) for share in (row.tokens, row.restrained, row.gradient)),
            number(row.entropy_change.mean, "+.2e"),
            number(row.entropy_change.standard_error, ".1e"),
        ]
        for row in results.regions.means
    ]
    return (
        "Entropy regions (arXiv 2602.09782): A > 0 in e1 and e2, A < 0 in e3 and e4; -ln p is below the entropy in e1 "
        "and e3, above it in e2 and e4. Means over recorded steps of the share of the tokens, of these the restrained "
        "ones, the share of the gradient, and the estimated part in the change of the entropy, nats a token and unit "
        "of step on the logits; the last two before any ratio clip and control. The bias of the estimate differs by "
        "region: compare a region with itself, not with others.\n\n"
        + text_table(["region", "tokens", "restrained", "gradient", "entropy change", "standard error"], rows)
    )


def _tokens(results: Results) -> str:
    chosen = results.tokens
    rows = [
        [
            json.dumps(row.token, ensure_ascii=False),
            f"{row.count}",
            f"{row.chosen}",
            f"{row.lift:.2f}",
            f"{row.keyness:.1f}",
        ]
        for row in chosen.tokens[:ROWS]
        if row.keyness > 0
    ]
    positions = [
        [f"{100 * part.start:.0f}-{100 * part.end:.0f}%", f"{part.count}", f"{part.chosen}", f"{part.lift:.2f}"]
        for part in chosen.positions
    ]
    return (
        f"Which tokens are {chosen.chosen_by}: {chosen.chosen} of {chosen.count}. The lift is a token's share of these "
        "over its share of all; G2 weighs it by the evidence.\n\n"
        + text_table(["token", "recorded", "chosen", "lift", "G2"], rows)
        + "\n\nWhere in the completion:\n\n"
        + text_table(["position", "recorded", "chosen", "lift"], positions)
    )


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.3g}%"
