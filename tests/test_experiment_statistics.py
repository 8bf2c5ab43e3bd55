"""Statistics against scipy, statsmodels and known data; reading times against their README."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from fusion_model.data.text import Document
from fusion_model.errors import FusionLMError
from fusion_model.experiments.figures import curves
from fusion_model.experiments.ngrams import KneserNey
from fusion_model.experiments.reading.data import (
    Frequencies,
    ReadingTimes,
    read_natural_stories,
    read_tsv,
)
from fusion_model.experiments.reading.regression import (
    Measured,
    at_equal_perplexity,
    held_out_log_likelihood,
    measure,
    predictors,
)
from fusion_model.experiments.report import Table, p_value, signed
from fusion_model.experiments.statistics import (
    estimate,
    holm,
    resampled_means,
    verdict,
)

rng = np.random.default_rng(0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_holm_is_its_definition() -> None:
    """Holm 1979: the i-th smallest of m times m - i + 1, never less than one before it."""
    generator = np.random.default_rng(1)
    for size in (1, 2, 5, 12):
        family = generator.uniform(size=size) ** 3
        expected = np.empty(size)
        least = 0.0
        for i, at in enumerate(np.argsort(family)):
            least = max(least, min((size - i) * family[at], 1.0))
            expected[at] = least
        assert holm(family.tolist()) == pytest.approx(expected.tolist())


def test_documents_and_seeds_are_both_drawn() -> None:
    """The variance is the textbook's: of documents, and of seeds, over their numbers; and it is
    unbiased, which drawing n of n is not."""
    generator = np.random.default_rng(2)
    seeds, documents, tokens = 3, 40, 100
    found, expected = [], []
    for _ in range(60):
        sums = generator.normal(0, 1, documents) + generator.normal(0, 0.5, (seeds, 1))
        values = resampled_means({"a": tokens * sums}, np.full(documents, float(tokens)))["a"]
        assert values[0] == pytest.approx(sums.mean())
        found.append(values[1:].var())
        expected.append(sums.mean(0).var(ddof=1) / documents + sums.mean(1).var(ddof=1) / seeds)
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.03)


def test_documents_are_drawn_alike_for_all_arms() -> None:
    """Arms that differ by the same in every document differ by that in every draw."""
    sums = rng.normal(5, 2, (1, 30))
    weights = rng.integers(50, 200, 30).astype(float)
    found = resampled_means({"a": sums, "b": sums + 0.1 * weights}, weights)
    again = resampled_means({"c": sums}, weights)
    assert found["b"] - found["a"] == pytest.approx(np.full(4001, 0.1))
    assert np.array_equal(again["c"], found["a"])
    assert found["a"][1:].std() > 0


def test_interval_and_p_are_of_the_draws() -> None:
    values = np.concatenate([[2.0], rng.normal(2, 1, 4000)])
    found = estimate(values)
    low, high = stats.norm.interval(0.95, 2, 1)
    assert (found.value, found.low, found.high) == pytest.approx((2, low, high), abs=0.15)
    assert found.p == pytest.approx(2 * stats.norm.sf(2), abs=0.02)
    assert estimate(np.zeros(4001)).p == 1.0


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [
        (3.0, 1.0, "better"),
        (-3.0, 1.0, "worse"),
        (0.5, 0.5, "equivalent"),
        (0.0, 2.0, "undecided"),
        (1.9, 1.0, "undecided"),
    ],
)
def test_no_gain_and_undecided_are_told_apart(mean: float, spread: float, expected: str) -> None:
    """The margin is 2."""
    drawn = np.random.default_rng(1).normal(mean, spread, 4000)
    assert verdict(np.concatenate([[mean], drawn]), 2.0) == expected


def test_a_margin_that_is_not_known_is_drawn_too() -> None:
    """A difference of 0 ± 0.1 is within 2, but not shown to be within 2 ± 2."""
    generator = np.random.default_rng(1)
    difference = np.concatenate([[0.0], generator.normal(0, 0.1, 4000)])
    margin = np.concatenate([[2.0], generator.normal(2, 2, 4000)])
    assert verdict(difference, 2.0) == "equivalent"
    assert verdict(difference, margin) == "undecided"


def brute_kneser_ney(
    train: list[list[int]], word: int, context: tuple[int, ...], vocabulary: int, order: int
) -> float:
    """p(word | context) from the definition: counts of tuples, Chen & Goodman's equations."""
    if order == 0:
        return 1 / vocabulary
    full = 1 + len(context)
    grams = Counter(
        tuple(([s[0]] * (full - 1) + s[1:])[i - full : i])
        for s in train
        for i in range(full, len(s) + full - 1)
    )
    if order < full:  # in how many ways is it continued to the left?
        for n in range(full - 1, order - 1, -1):
            grams = Counter(g[-n:] for g in grams)
    have = Counter(grams.values())
    n1, n2, n3, n4 = (max(have[i], 1) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    d = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    d = [min(max(x, 0.0), float(i)) for i, x in enumerate(d)]
    before = context[len(context) - order + 1 :] if order > 1 else ()
    after = {g: c for g, c in grams.items() if g[:-1] == before}
    lower = brute_kneser_ney_below(train, word, context, vocabulary, order)
    if not after:
        return lower
    left = sum(d[min(c, 3)] for c in after.values())
    own = after.get((*before, word), 0)
    return (own - d[min(own, 3)] + left * lower) / sum(after.values())


def brute_kneser_ney_below(
    train: list[list[int]], word: int, context: tuple[int, ...], vocabulary: int, order: int
) -> float:
    return brute_kneser_ney(train, word, context, vocabulary, order - 1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_is_its_definition(order: int) -> None:
    generator = np.random.default_rng(4)
    vocabulary, bos, eos = 12, 1, 2
    text = [
        [bos, *(3 + generator.geometric(0.35, n) % 8).tolist(), eos]
        for n in generator.integers(1, 9, 60)
    ]
    train, test = text[:50], text[50:]
    model = KneserNey(train, vocabulary, order)
    expected = []
    for s in test:
        padded = [bos] * (order - 1) + s[1:]
        for i in range(order - 1, len(padded)):
            context = tuple(padded[i - order + 1 : i])
            expected.append(
                -math.log(brute_kneser_ney(train, padded[i], context, vocabulary, order))
            )
    assert model.nats(test) == pytest.approx(expected)
    for context in ([bos, 5, 6], [bos], [bos, 11, 11]):  # the last was never seen
        each = [model.nats([[*context, w]])[-1] for w in range(vocabulary)]
        assert np.exp(-np.array(each)).sum() == pytest.approx(1)


def test_held_out_log_likelihood_is_statsmodels() -> None:
    x, stories = rng.normal(size=(90, 3)), np.repeat([1, 2, 3], 30)
    y = x @ [1.0, -2.0, 0.5] + rng.normal(size=90)
    found = held_out_log_likelihood(x, y, stories)
    for story in (1, 2, 3):
        train, test = stories != story, stories == story
        fit = sm.OLS(y[train], sm.add_constant(x[train])).fit()
        scale = math.sqrt(fit.ssr / fit.nobs)  # maximum likelihood
        mean = fit.predict(sm.add_constant(x[test]))
        assert found[test] == pytest.approx(stats.norm.logpdf(y[test], mean, scale))


def corpus(
    effect: float, shifted: bool = True, stories: int = 8
) -> tuple[ReadingTimes, np.ndarray]:
    """A corpus whose times are 300 + effect * surprisal + noise, and that surprisal."""
    generator = np.random.default_rng(3)
    size = 120 * stories
    words = ["x" * n for n in generator.integers(1, 9, size)]
    surprisal = generator.gamma(2.0, 4.0, size)
    times = 300 + effect * surprisal + generator.normal(0, 10, size)
    if shifted:  # stored one position early
        times = np.roll(times, -1)
    return ReadingTimes(
        "made", words, np.repeat(np.arange(stories), 120), times, shifted
    ), surprisal


def test_surprisal_that_drives_times_is_found_under_the_right_alignment_only() -> None:
    made, surprisal = corpus(effect=3.0)
    frequencies = Frequencies([Document("d", ["x xx xxx xxxx"])])
    noise = np.random.default_rng(9).normal(size=len(surprisal))
    fits = {}
    for alignment in made.alignments:
        data = predictors(made, alignment, frequencies)
        surprisals = {("noise", ""): noise[None], ("true", ""): np.stack([surprisal, surprisal])}
        fits[alignment] = measure(data, surprisals)
        own = surprisal[data.rows]
        r = stats.pearsonr(own, data.times).statistic
        assert fits[alignment]["true", ""].r[0] == pytest.approx(r)
        assert fits[alignment]["true", ""].bits[0] == pytest.approx(own.mean())
    right, wrong = fits["corrected"]["true", ""], fits["stored"]["true", ""]
    assert right.r[0] > 0.8
    assert estimate(right.delta).low > 0.3
    assert estimate(right.delta - fits["corrected"]["noise", ""].delta).low > 0.3
    assert abs(wrong.r[0]) < 0.2  # the next word's time
    assert estimate(fits["corrected"]["noise", ""].delta).low < 0.01


def test_spillover_reaches_the_words_before() -> None:
    """Times that the previous word's surprisal drives: the regression sees it, r does not."""
    made, surprisal = corpus(effect=3.0, shifted=False)
    moved = ReadingTimes("made", made.words, made.stories, np.roll(made.times, 1), False)
    data = predictors(moved, "stored", Frequencies([Document("d", ["x xx"])]))
    fit = measure(data, {("true", ""): surprisal[None]})["true", ""]
    assert abs(fit.r[0]) < 0.2
    assert estimate(fit.delta).low > 0.3
    log = predictors(moved, "stored", Frequencies([Document("d", ["x xx"])]), log=True)
    assert np.exp(log.times) == pytest.approx(data.times)


def test_equal_perplexity_is_the_distance_of_parallel_lines() -> None:
    """ΔLL = 9 - bits for one arm, half a unit more for the other, whose models are better."""
    generator = np.random.default_rng(5)

    def model(bits: float, more: float) -> Measured:
        drawn = bits + generator.normal(0, 0.01, 4001)
        return Measured(drawn, drawn, 9 - drawn + more)

    reference = [model(b, 0.0) for b in (8.0, 7.0, 6.5)]
    ours = [model(b, 0.5) for b in (7.5, 6.0, 5.5)]
    assert at_equal_perplexity(reference, ours) == pytest.approx(np.full(4001, 0.5))
    x = sm.add_constant(np.array([[8, 0], [7, 0], [6.5, 0], [7.5, 1], [6, 1], [5.5, 1]]))
    y = np.array([1.0, 2.2, 2.4, 1.9, 3.6, 4.1])
    points = [
        Measured(np.full(3, bits), np.zeros(3), np.full(3, delta))
        for bits, delta in zip(x[:, 1], y, strict=True)
    ]
    found = at_equal_perplexity(points[:3], points[3:])
    assert found == pytest.approx(np.full(3, sm.OLS(y, x).fit().params[2]))
    one = at_equal_perplexity(reference[:1], ours[:1])
    assert one == pytest.approx(ours[0].delta - reference[0].delta)


def test_corrected_alignment_moves_times_within_a_story() -> None:
    times = np.array([1.0, 2.0, 3.0, 10.0, 20.0])
    made = ReadingTimes("made", list("abcde"), np.array([1, 1, 1, 2, 2]), times, True)
    assert made.aligned("corrected").tolist()[1:3] == [1.0, 2.0]
    assert np.isnan(made.aligned("corrected")[[0, 3]]).all()
    assert made.aligned("corrected")[4] == 10.0
    assert made.aligned("stored") is made.times


def test_natural_stories_are_read_as_their_readme_says(shared_data: Path) -> None:
    """Pearson's r of the stored time with word length at offsets −2 … 2 (shared/data/README.md)."""
    stories = read_natural_stories(shared_data / "natural-stories")
    assert len(stories.words) == 10_256
    length = np.array([len(w) for w in stories.words], dtype=float)
    found = []
    for offset in range(-2, 3):
        rows = np.arange(2, len(length) - 2)
        same = stories.stories[rows] == stories.stories[rows + offset]
        rows = rows[same & np.isfinite(stories.times[rows])]
        found.append(np.corrcoef(length[rows + offset], stories.times[rows])[0, 1])
    assert found == pytest.approx([0.080, 0.145, 0.321, 0.253, 0.035], abs=0.005)
    assert sum(len(s.split()) for d in stories.documents() for s in d.sentences) == 10_256


def test_tsv_of_another_corpus(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text('story\tword\ttime\nB\t"Oh\t300\nB\tno."\t\nA\tYes.\t310.5\n')
    made = read_tsv(path)
    assert made.words == ['"Oh', 'no."', "Yes."]
    assert made.stories.tolist() == [1, 1, 2]
    assert made.alignments == ("stored",)
    assert made.times[2] == 310.5
    assert math.isnan(made.times[1])
    path.write_text("story\tword\ttime\nA\ta\t1\nB\tb\t2\nA\tc\t3\n")
    with pytest.raises(FusionLMError, match="not together"):
        read_tsv(path)
    path.write_text("story\tword\ttime\nA\ta\tfast\n")
    with pytest.raises(FusionLMError, match="line 2: 'fast' is no time"):
        read_tsv(path)


def test_frequencies_ignore_case_and_punctuation() -> None:
    counted = Frequencies([Document("d", ["The cat, the dog."])])
    assert counted.log("“THE,") == pytest.approx(math.log(3 / 8))
    assert counted.log("cat") == pytest.approx(math.log(2 / 8))
    assert counted.log("unseen") == pytest.approx(math.log(1 / 8))


def test_an_arm_looks_alike_in_every_figure() -> None:
    point = [(1.0, 2.0)]
    looks = []
    for names in (("unfused", "static", "another", "fused"), ("another", "more", "fused")):
        drawn = curves({name: point for name in names}, "x", "y").axes[0].get_lines()
        looks.append({line.get_label(): (line.get_color(), line.get_marker()) for line in drawn})
        assert len(set(looks[-1].values())) == len(names)
    assert looks[0]["fused"] == looks[1]["fused"]


def test_tables_in_markdown() -> None:
    table = Table("t", "A caption, 5 %.", ["arm", "Δ"], [["a_b|c", signed(-0.5, 1)]])
    assert table.markdown() == "| arm | Δ |\n| --- | --: |\n| a_b\\|c | −0.5 |\n\nA caption, 5 %."
    assert [p_value(p) for p in (None, 0.0002, 0.0421)] == ["", "<0.001", "0.042"]
