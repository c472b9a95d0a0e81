"""The paper's analyses: exact covariances against loops, and those of records against values worked out by hand."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
import torch
from benchmark_runs import run_benchmark
from scipy import stats

from entropy_trl import cli, token_covariance
from entropy_trl.analysis import covariance as analysis
from entropy_trl.analysis.covariance import distribution_covariance
from entropy_trl.analysis.covariance import relation as relation_analysis
from entropy_trl.analysis.covariance import tokens as token_analysis
from entropy_trl.analysis.covariance.records import FOLDER, StepRecords, read_records, write_records


# Exact distributions.


def loop_covariance(logits, advantages):
    """Theorems 1 and 2 for one state by the definition of a covariance."""
    total = sum(math.exp(z) for z in logits)
    pi = [math.exp(z) / total for z in logits]
    result = []
    for x in ([p * a for p, a in zip(pi, advantages, strict=True)], advantages):
        mean_logp = sum(p * math.log(p) for p in pi)
        mean_x = sum(p * value for p, value in zip(pi, x, strict=True))
        result.append(sum(p * (math.log(p) - mean_logp) * (v - mean_x) for p, v in zip(pi, x, strict=True)))
    return result


def random_states(seed, states=5, actions=3):
    generator = np.random.default_rng(seed)
    return (
        generator.normal(size=(states, actions)) * 2,
        generator.normal(size=(states, actions)),
        generator.random(states),
    )


def entropy(logits):
    logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -(np.exp(logps) * logps).sum(axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_distribution_covariance_matches_a_loop(seed):
    logits, advantages, weight = random_states(seed)
    result = distribution_covariance(logits + 100.0, advantages, weight)
    expected = np.array([loop_covariance(z, a) for z, a in zip(logits, advantages, strict=True)])
    np.testing.assert_allclose(result.policy_gradient, expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(result.natural_gradient, expected[:, 1], rtol=1e-12)
    np.testing.assert_allclose(result.mean_policy_gradient, (weight * expected[:, 0]).sum() / weight.sum(), rtol=1e-12)
    np.testing.assert_allclose(result.mean_natural_gradient, (weight * expected[:, 1]).sum() / weight.sum(), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("theorem", ["policy_gradient", "natural_gradient"])
def test_minus_eta_times_covariance_is_the_entropy_change_to_first_order(seed, theorem):
    logits, advantages, weight = random_states(seed)
    pi = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    step = pi * advantages if theorem == "policy_gradient" else advantages
    covariance = getattr(distribution_covariance(logits, advantages, weight), theorem)
    errors = [entropy(logits + eta * step) - entropy(logits) + eta * covariance for eta in (1e-3, 5e-4)]
    np.testing.assert_allclose(errors[0], 4 * errors[1], rtol=1e-2)  # what is left is of second order
    assert (np.abs(errors[1]) < 1e-2 * 5e-4 * np.abs(covariance).max()).all()


def test_impossible_actions_do_not_count():
    logits, advantages, weight = random_states(0)
    expected = distribution_covariance(logits, advantages, weight)
    with_impossible = distribution_covariance(
        np.insert(logits, 1, -np.inf, axis=1), np.insert(advantages, 1, np.nan, axis=1), weight
    )
    np.testing.assert_allclose(with_impossible.policy_gradient, expected.policy_gradient, rtol=1e-12)
    np.testing.assert_allclose(with_impossible.natural_gradient, expected.natural_gradient, rtol=1e-12)


def test_distribution_covariance_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 3\) and \(3,\)"):
        distribution_covariance(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(3))


@pytest.mark.parametrize("n", [2, 3])
def test_the_sample_covariance_is_unbiased_but_for_its_means(n):
    # Over all samples of n actions, with their probabilities: the mean of Eq. 10 is (n - 1) / n times Theorem 2.
    logits, advantages, weight = random_states(1, states=1)
    logps = (logits - np.log(np.exp(logits).sum()))[0]
    expected = 0.0
    for actions in product(range(3), repeat=n):
        chosen = list(actions)
        sampled = token_covariance(
            torch.tensor(logps[chosen])[None], torch.tensor(advantages[0, chosen])[None], torch.ones(1, n).bool()
        )
        expected += math.exp(logps[chosen].sum()) * float(sampled.mean())
    exact = distribution_covariance(logits, advantages, weight).mean_natural_gradient
    assert expected == pytest.approx((n - 1) / n * exact, rel=1e-10)


def test_the_benchmark_has_the_exact_values(monkeypatch, tmp_path, capsys):
    sizes = {"prompts": 3, "replicates": 3, "steps": 3, "warm_start_steps": 50, "warm_start_dir": tmp_path}
    argv = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    report = run_benchmark(monkeypatch, "covariance", argv, tmp_path / "covariance.json")
    assert [row["eta"] for row in report["tabular"]] == [1.0, 1e-1, 1e-2, 1e-3, 1e-4]
    for theorem in ("policy_gradient", "natural_gradient"):
        assert report["tabular"][-1][theorem] == pytest.approx(1.0, abs=1e-3)
    assert report["limits"]["A(s, a)"]["between"] == pytest.approx(0.0, abs=1e-12)
    for limit in report["limits"].values():
        assert limit["within"] != 0
    assert report["limits"]["A(s, a)"]["within"] == pytest.approx(report["theorem_2"], rel=1e-9)
    assert report["limits"]["R - V(prompt)"]["within"] == pytest.approx(report["theorem_2"], rel=1e-9)
    assert report["network"]["SGD 0.001"]["linear"] == pytest.approx(1.0, abs=0.1)
    assert sum(part["weight"] for part in report["network"]["SGD 0.001"]["by_prediction"].values()) == pytest.approx(1)
    assert "limit of Eq. 10" in capsys.readouterr().out


# Records.


def write_step(folder, step, completions, rate=1e-3, after=None, selected=(), control=None, tokens=None, words=None):
    """A step of completions (group, accuracy, advantage, log-probabilities); the covariance is Eq. 10's."""
    rows = [
        (row_id, group, position, advantage, logp, accuracy)
        for row_id, (group, accuracy, advantage, logps) in enumerate(completions)
        for position, logp in enumerate(logps)
    ]
    row_id, group, position, advantage, logp, accuracy = (list(column) for column in zip(*rows, strict=True))
    covariance = (np.array(logp) - np.mean(logp)) * (np.array(advantage) - np.mean(advantage))
    n = len(rows)
    words = words or [f"w{p}" for p in position]
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    columns = {
        "row_id": row_id,
        "group": group,
        "position": position,
        "token_id": [ids[word] for word in words],
        "token": words,
        "logp": logp,
        "old_logp": logp,
        "entropy": [0.5] * n,
        "entropy_after": None if after is None else [0.5 + change for change in after],
        "advantage": advantage,
        "covariance": covariance,
        "selected": [i in selected for i in range(n)],
        "reward": accuracy,
        "group_accuracy": accuracy,
    }
    metadata = {
        "step": step,
        "learning_rate": rate,
        "tokens": tokens or n,
        "tokens_recorded": n,
        "mean_covariance": float(covariance.mean()),
        "mean_entropy": 0.5,
        "mean_entropy_after": None if after is None else 0.5 + float(np.mean(after)),
        "num_generations": 2,
        "control": control,
        "loss_type": "dapo",
        "prompts": {g: f"prompt <b>{g}</b> & more" for g in group},
    }
    write_records(folder / FOLDER / f"step-{step:08d}.parquet", columns, metadata)
    return covariance


#: Log-probabilities -1, -3, -2, -2 (mean -2) and advantages 1, 1, -1, -1 (mean 0): Eq. 10 gives 1, -1, 0, 0.
TWO = [(0, 0.5, 1.0, [-1.0, -3.0]), (0, 0.5, -1.0, [-2.0, -2.0])]
#: Means a token of -1, -2 and -2, -5: (l - mean) * (A - mean) is 0.5 * 1 twice, and 1.5 * -2 twice; times 2 / (2 - 1).
FOUR = [
    (0, 0.5, 1.0, [-1.0, -1.0]),
    (0, 0.5, -1.0, [-2.0]),
    (1, 1.0, -2.0, [-2.0]),
    (1, 1.0, 2.0, [-4.0, -6.0]),
    (2, 0.0, 3.0, [-1.0]),  # alone in its group
]


def test_quantile_table(tmp_path):
    logps = [-float(i) for i in range(1, 101)]  # one completion of 100 tokens against one of a single token
    values = write_step(tmp_path, 1, [(0, 0.5, 1.0, logps), (0, 0.5, -1.0, [-3.0])], tokens=300)
    (table,) = analysis.quantile_table(read_records(tmp_path))
    assert (table.step, table.count, table.sampled) == (1, 101, True)
    expected = np.sort(values)[::-1]
    counts = {2e-4: 1, 2e-3: 1, 2e-2: 2, 0.2: 20, 0.5: 50, 1.0: 101}
    assert {row.fraction: row.count for row in table.rows} == counts
    for row in table.rows:
        assert row.covariance == pytest.approx(expected[: row.count].mean(), rel=1e-6, abs=1e-6)


def test_the_level_of_completions(tmp_path):
    write_step(tmp_path, 1, FOUR)
    records = read_records(tmp_path)
    (table,) = analysis.quantile_table(records, "sequence")
    assert table.count == 4
    assert [row.covariance for row in table.rows] == pytest.approx([1, 1, 1, 1, 1, (1 + 1 - 6 - 6) / 4])
    (point,) = analysis.covariance_over_training(records, "sequence")
    assert point.covariance == pytest.approx(-2.5) and point.positive == 0.5
    with pytest.raises(ValueError, match="`level` must be 'token' or 'sequence', got 'word'"):
        analysis.quantile_table(records, "word")


def test_covariance_over_training(tmp_path):
    write_step(tmp_path, 1, TWO, selected=(0,), control="clip_cov", after=[0.1, 0.1, 0.1, 0.5])
    write_step(tmp_path, 5, TWO, rate=2e-3)
    first, second = analysis.covariance_over_training(read_records(tmp_path))
    assert (first.step, first.covariance, first.positive, first.selected) == (1, 0.0, 0.25, 0.25)
    assert first.selected_covariance == 1.0
    assert first.entropy_after == pytest.approx(0.7)
    assert (second.learning_rate, second.selected, second.selected_covariance) == (2e-3, 0.0, None)
    assert second.entropy_after is None


def random_steps(folder, steps, slope, noise=0.0, seed=0, flat=False):
    """Steps of four prompts with two completions; every token's entropy changes by `slope * rate * covariance`."""
    generator = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        completions = [
            (group, 0.5, sign * generator.random(), -generator.exponential(size=3))
            for group in range(4)
            for sign in (1, -1)
        ]
        rate = 1e-3 * (1 + step % 3)
        covariance = write_step(folder, step, completions, rate)
        change = slope * rate * covariance + noise * generator.normal(size=len(covariance))
        write_step(folder, step, completions, rate, after=np.zeros_like(change) if flat else change)


def test_entropy_change_finds_a_law(tmp_path):
    random_steps(tmp_path, 24, slope=-2.0)
    result = analysis.entropy_change(read_records(tmp_path))
    for relation in (result.over_steps, result.over_prompts, result.within_steps):
        assert relation.slope == pytest.approx(-2.0, rel=1e-3)
        assert relation.pearson == pytest.approx(-1.0, abs=1e-4)
        assert relation.spearman == pytest.approx(-1.0, abs=1e-2)
        assert relation.pearson_ci95[1] < -0.999
    assert [relation.points for relation in (result.over_steps, result.over_prompts)] == [24, 96]
    assert result.sign_agrees == 1.0
    assert result.covariance_positive == result.entropy_fell
    assert 0 < result.entropy_fell < 1


def test_entropy_change_is_the_correlation_of_what_was_recorded(tmp_path):
    random_steps(tmp_path, 24, slope=-1.0, noise=2e-3)
    records = read_records(tmp_path)
    result = analysis.entropy_change(records)
    x = [record.learning_rate * record.mean_covariance for record in records]
    y = [record.mean_entropy_after - record.mean_entropy for record in records]
    assert result.over_steps.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert result.over_steps.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert result.over_steps.slope == pytest.approx(stats.linregress(x, y).slope)
    assert result.sign_agrees == np.mean(np.multiply(x, y) < 0)
    low, high = result.over_steps.pearson_ci95
    assert -1 < low < result.over_steps.pearson < high < 1


def test_a_window_averages_both_sides(tmp_path):
    random_steps(tmp_path, 8, slope=-1.0, noise=1e-3)
    one, two = (analysis.entropy_change(read_records(tmp_path), window=window) for window in (1, 2))
    products = [point.learning_rate * point.covariance for point in one.steps]
    changes = [point.change for point in one.steps]
    assert [point.step for point in two.steps] == [2, 4, 6, 8]
    assert [p.learning_rate * p.covariance for p in two.steps] == pytest.approx(np.reshape(products, (4, 2)).mean(1))
    assert [p.change for p in two.steps] == pytest.approx(np.reshape(changes, (4, 2)).mean(1))


def test_copies_of_a_point_do_not_narrow_the_interval():
    generator = np.random.default_rng(0)
    x = generator.normal(size=40)
    y = generator.normal(size=40) - x
    once = relation_analysis._relation(x, y, np.arange(40), "", seed=0)
    copied = relation_analysis._relation(*(np.repeat(a, 5) for a in (x, y, np.arange(40))), "", seed=0)
    assert copied.pearson_ci95 == pytest.approx(once.pearson_ci95)
    assert copied.spearman_ci95 == pytest.approx(once.spearman_ci95)
    as_if_new = relation_analysis._relation(np.repeat(x, 5), np.repeat(y, 5), np.arange(200), "", seed=0)
    assert np.diff(as_if_new.pearson_ci95) < 0.6 * np.diff(once.pearson_ci95)
    reference = stats.bootstrap(
        (x, y), lambda x, y, axis: stats.pearsonr(x, y, axis=axis).statistic, paired=True, method="percentile", rng=1
    ).confidence_interval
    assert once.pearson_ci95 == pytest.approx(reference, abs=0.05)


def test_what_does_not_vary_has_no_correlation(tmp_path):
    random_steps(tmp_path, 9, slope=0.0, flat=True)
    relation = analysis.entropy_change(read_records(tmp_path)).over_steps
    assert relation.pearson is relation.spearman is relation.pearson_ci95 is relation.slope is None


def test_entropy_change_needs_three_points(tmp_path):
    random_steps(tmp_path, 5, slope=-1.0)
    records = read_records(tmp_path)
    with pytest.raises(ValueError, match="2 points with a window of 2"):
        analysis.entropy_change(records, window=2)
    with pytest.raises(ValueError, match="`window` must be at least 1"):
        analysis.entropy_change(records, window=0)
    few = analysis.entropy_change(records)
    assert few.over_steps.pearson_ci95 is None
    assert few.over_prompts.resampled == "prompts"
    write_step(tmp_path, 1, TWO)
    with pytest.raises(ValueError, match="recorded in 0 of 1 steps"):
        analysis.entropy_change(read_records(tmp_path, [1]))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_by_difficulty(tmp_path, level):
    accuracies = [0.0, 0.25, 0.26, 0.75, 0.99, 1.0]
    completions = [
        (group, accuracy, sign * (group + 1.0), [-1.0 - (sign < 0)])
        for group, accuracy in enumerate(accuracies)
        for sign in (1, -1)
    ]
    # Log-probabilities are -1 for advantage g and -2 for -g (mean -1.5, mean advantage 0): Eq. 10 gives g / 2 twice.
    # Among the two completions of a prompt it is the same, times 2 / (2 - 1).
    write_step(tmp_path, 1, completions, after=[-0.01 * (c[0] + 1) for c in completions])
    groups = analysis.by_difficulty(read_records(tmp_path), level)
    assert [group.accuracy for group in groups] == ["0", "(0, 0.25]", "(0.25, 0.5]", "(0.5, 0.75]", "(0.75, 1)", "1"]
    assert [group.prompts for group in groups] == [1] * 6
    assert [group.covariance for group in groups] == pytest.approx(
        [(g + 1) * (0.5 if level == "token" else 1.0) for g in range(6)]
    )
    assert [group.change for group in groups] == pytest.approx([-0.01 * (g + 1) for g in range(6)], rel=1e-4)
    assert [group.standard_error for group in groups] == [None] * 6
    low, high = analysis.by_difficulty(read_records(tmp_path), level, edges=(-1.0, 0.5, 2.0))[1:3]
    assert (low.accuracy, low.prompts, high.accuracy, high.prompts) == ("(-1, 0.5]", 3, "(0.5, 2)", 3)
    means = np.array([1, 2, 3]) * (0.5 if level == "token" else 1.0)
    assert low.covariance == pytest.approx(means.mean())
    assert low.standard_error == pytest.approx(means.std(ddof=1) / 3**0.5)
    with pytest.raises(ValueError, match=r"goes from 0 to 1, outside of the edges 0, 0\.5: give others"):
        analysis.by_difficulty(read_records(tmp_path), level, edges=(0, 0.5))


def test_difficulty_of_steps_without_the_entropy_after(tmp_path):
    write_step(tmp_path, 1, TWO)
    write_step(tmp_path, 2, TWO, after=[-0.1] * 4)
    (group,) = [group for group in analysis.by_difficulty(read_records(tmp_path)) if group.prompts]
    assert (group.prompts, group.change) == (2, pytest.approx(-0.1, rel=1e-5))


# Tokens.


def test_selected_tokens(tmp_path):
    words = ["so"] * 2 + ["the"] * 8 + ["so"] * 4 + ["the"] * 6
    completions = [(0, 0.5, 1.0, [-1.0] * 10), (0, 0.5, -1.0, [-2.0] * 10)]
    write_step(tmp_path, 1, completions, selected=(0, 1, 2), control="kl_cov", words=words)
    write_step(tmp_path, 2, completions, selected=(10,), control="kl_cov", words=words)
    result = token_analysis.selected_tokens(read_records(tmp_path))
    # 12 of 40 tokens are "so", 3 of the 4 selected.
    assert (result.chosen_by, result.count, result.chosen) == ("restrained by kl_cov", 40, 4)
    so, the = result.tokens
    assert (so.token, so.token_id, so.count, so.chosen) == ("so", 0, 12, 3)
    assert so.lift == pytest.approx((3 / 4) / (12 / 40))
    assert (the.chosen, the.lift) == (1, pytest.approx((1 / 4) / (28 / 40)))
    g2 = stats.chi2_contingency([[3, 9], [1, 27]], correction=False, lambda_="log-likelihood").statistic
    assert so.keyness == pytest.approx(g2)
    assert the.keyness == pytest.approx(-g2)
    assert [part.chosen for part in result.positions] == [2, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert [part.count for part in result.positions] == [4] * 10
    assert result.positions[0].lift == pytest.approx((2 / 4) / (4 / 40))
    assert (result.positions[3].start, result.positions[3].end) == (0.3, 0.4)
    assert [row.token for row in token_analysis.selected_tokens(read_records(tmp_path), minimum_count=13).tokens] == [
        "the"
    ]


def test_tokens_of_the_highest_covariance(tmp_path):
    write_step(tmp_path, 1, TWO, words=["a", "b", "c", "d"])
    result = token_analysis.selected_tokens(read_records(tmp_path), fraction=0.25, minimum_count=1)
    assert (result.chosen_by, result.chosen) == ("top 25% covariance", 1)
    assert {row.token: row.chosen for row in result.tokens} == {"a": 1, "b": 0, "c": 0, "d": 0}
    assert [(part.count, part.chosen) for part in result.positions] == [(2, 1), (2, 0)]  # completions of two tokens
    with pytest.raises(ValueError, match="restrained none"):
        token_analysis.selected_tokens(read_records(tmp_path))
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 20"):
        token_analysis.selected_tokens(read_records(tmp_path), fraction=20)


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects text, tags and the tokens of a completion."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tokens, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self.open and "title" in self.open[-1][1]:
            self.tokens.append((data, self.open[-1][1]))


AWKWARD = ["<b>", " the", "\n\n", "\t", "  ", "\u202e", "&amp;", ""]


def test_a_rendered_completion(tmp_path):
    logps = [-0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -5.0, -7.0]
    completions = [(0, 0.5, 1.0, logps), (0, 0.5, -1.0, [-3.0] * 8)]
    write_step(tmp_path, 7, completions, selected=(0, 7), control="clip_cov", words=AWKWARD * 2)
    page = Page(token_analysis.render_completions(read_records(tmp_path), k=1))
    shown = [text for text, _ in page.tokens]
    assert shown == ["<b>", " the", "↵\n↵\n", "⇥\t", "␣␣", "\\u{202e}", "&amp;", "∅"]
    classes = [attributes["class"].split() for _, attributes in page.tokens]
    # The mean log-probability is -3: the covariance is +2.5 at the first token, 0 at the fifth, -4 at the last.
    # The quantiles 0.5, 0.8, 0.98 and 0.998 of the 16 magnitudes (nine are 0) are 0, 2, 3.55 and 3.955.
    assert [names[0] for names in classes] == ["p2", "p1", "p1", "p1", "n0", "n1", "n1", "n4"]
    assert [i for i, names in enumerate(classes) if "s" in names] == [0, 7]
    assert page.tokens[0][1]["title"] == (
        "position 0, covariance +2.500, log-prob -0.500, entropy 0.500, advantage +1.000, restrained"
    )
    assert "prompt <b>0</b> & more" in page.text
    assert "Completion 0: reward 0.5, advantage +1.00, mean reward of its prompt 0.50" in page.text
    assert "The 8 tokens with the largest covariances" in page.text
    assert [a for tag, a in page.tags if tag == "html"] == [{"lang": "en"}]
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}


def test_completions_with_restrained_tokens_come_first(tmp_path):
    completions = [(0, 0.5, 3.0, [-0.1, -5.0]), (0, 0.5, -1.0, [-2.0, -2.0]), (1, 0.5, 0.0, [-1.0, -2.0])]
    write_step(tmp_path, 1, completions, selected=(3,))
    titles = re.findall(r"<h3>Completion (\d)", token_analysis.render_completions(read_records(tmp_path), k=2))
    assert titles == ["1", "0"]


def test_colours_keep_the_text_readable():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = token_analysis.COMPLETION_CSS.split("@media", 1)
    for css in (light, dark):
        colours = dict(re.findall(r"--cov-(\w+): (#\w{6})", css))
        text = luminance(colours.pop("text"))
        shades = [colour for name, colour in colours.items() if name != "line"]
        assert len(shades) == 9
        for shade in shades:
            low, high = sorted([text, luminance(shade)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, shade


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    random_steps(folder, 15, slope=-2.0)
    return folder


def test_command(run, tmp_path, capsys):
    files = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert cli.main(["covariance", str(run), *files]) == 0
    out = capsys.readouterr().out
    assert "Table 1 of arXiv 2505.22617" in out and "step 8" in out
    assert re.search(r"^steps +15 +-1\.00 \[-1\.00, -1\.00\]", out, re.MULTILINE)
    assert "top 2% covariance: 15 of 360" in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["training"]) == 15
    assert written["entropy_change"]["over_steps"]["slope"] == pytest.approx(-2.0, rel=1e-3)
    assert (
        Page((tmp_path / "out.html").read_text()).text.count("Completion") == 1 + 9 + 1
    )  # title, heading, 3 of 3 steps


def test_command_of_some_steps_at_the_level_of_completions(run, tmp_path, capsys):
    argv = ["--steps", "3", "4", "--level", "sequence", "--fraction", "0.5", "--json", str(tmp_path / "out.json")]
    assert cli.main(["covariance", str(run), *argv]) == 0
    out = capsys.readouterr().out
    assert "Mean covariance of the completions" in out
    assert "not computed, since fewer than three points" in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["level"], written["entropy_change"]) == ("sequence", None)
    assert [table["step"] for table in written["quantiles"]] == [3, 4]
    assert written["tokens"]["chosen"] == 24


def test_command_writes_valid_json_of_a_broken_run(tmp_path, capsys):
    write_step(tmp_path, 1, [(0, 0.5, 1.0, [float("nan"), -1.0]), (0, 0.5, -1.0, [-1.0, -2.0])])
    assert cli.main(["covariance", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["training"][0]["covariance"] is None
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{tmp}"], "has no token records"),
        (["{run}", "--steps", "99"], "No records of step 99"),
        (["{run}", "--fraction", "20"], "--fraction is a share of the tokens"),
        (["{run}", "--window", "0"], "--window must be at least 1, got 0"),
        (["{run}", "--completions", "0"], "--completions must be at least 1, got 0"),
        (["{run}", "--json", "{tmp}/no/out.json"], "There is no folder"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, argv, message):
    assert cli.main(["covariance", *(part.format(run=run, tmp=tmp_path) for part in argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("entropy-trl covariance: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_only_the_needed_columns_are_read(run, monkeypatch):
    asked = []
    read = StepRecords.table
    monkeypatch.setattr(StepRecords, "table", lambda record, *columns: asked.append(columns) or read(record, *columns))
    records = read_records(run)
    analysis.quantile_table(records)
    assert set(asked) == {("covariance",)}
    analysis.entropy_change(records, "sequence")
    analysis.by_difficulty(records)
    token_analysis.selected_tokens(records, fraction=0.1)
    assert all(columns and len(columns) <= 6 for columns in asked)
