"""Statistics against scipy, statsmodels and known data; reading times against their README."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from fusion_model.data.text import Document
from fusion_model.errors import FusionLMError
from fusion_model.experiments.reading.data import (
    Frequencies,
    ReadingTimes,
    read_natural_stories,
    read_tsv,
)
from fusion_model.experiments.reading.regression import compare, held_out_log_likelihood, predictors
from fusion_model.experiments.report import Table, p_value, signed
from fusion_model.experiments.statistics import (
    bootstrap_groups,
    holm,
    mean_estimate,
    paired_losses,
    sign_flip,
)

rng = np.random.default_rng(0)


def test_mean_is_scipys_t_interval() -> None:
    x = [3.1, 2.9, 3.6]
    found = mean_estimate(x)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(x), scale=stats.sem(x))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(x), low, high))
    assert math.isnan(mean_estimate([1.0]).low)


def test_paired_losses_with_a_token_a_sentence_are_the_t_test() -> None:
    ours, theirs = rng.normal(5.0, 1, 400), rng.normal(5.1, 1, 400)
    found = paired_losses(ours, theirs, np.arange(400))
    test = stats.ttest_rel(ours, theirs)
    assert found.value == pytest.approx(np.mean(ours - theirs))
    assert found.p == pytest.approx(test.pvalue, rel=0.01)
    interval = test.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=0.01)


def test_paired_losses_count_sentences_not_tokens() -> None:
    """Tokens that repeat their sentence's difference add no evidence."""
    per_sentence = rng.normal(0.02, 0.1, 50)
    sentences = np.repeat(np.arange(50), 20)
    found = paired_losses(per_sentence[sentences], np.zeros(1000), sentences)
    low, high = stats.t.interval(0.95, 49, per_sentence.mean(), stats.sem(per_sentence))
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.02, abs=1e-3)


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


def test_clustered_errors_are_the_textbook_formula() -> None:
    """Sentences of unequal length, whose tokens go together (Cameron & Miller 2015, eq. 11)."""
    generator = np.random.default_rng(2)
    sentences = np.repeat(np.arange(60), generator.integers(3, 30, 60))
    difference = generator.normal(0.1, 1, len(sentences)) + generator.normal(0, 1, 60)[sentences]
    found = paired_losses(difference, np.zeros_like(difference), sentences)
    n, g, mean = len(sentences), 60, difference.mean()
    sums = np.bincount(sentences, difference - mean)
    error = math.sqrt((sums**2).sum() / n**2 * g / (g - 1) * (n - 1) / (n - 1))
    half = stats.t.ppf(0.975, g - 1) * error
    assert (found.value, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, g - 1))


def test_bootstrap_of_equal_groups_is_scipys() -> None:
    values = rng.normal(1.0, 2.0, 40)
    low, high = bootstrap_groups(
        lambda rows: np.array([values[rows].mean()]), np.arange(40), resamples=4000
    )
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1)
    interval = theirs.confidence_interval
    assert low[0] == pytest.approx(interval.low, abs=0.05)
    assert high[0] == pytest.approx(interval.high, abs=0.05)


def test_bootstrap_keeps_groups_whole() -> None:
    groups = np.repeat([0, 1], 500)
    values = np.repeat([0.0, 1.0], 500)
    low, high = bootstrap_groups(lambda rows: np.array([values[rows].mean()]), groups)
    assert (low[0], high[0]) == (0.0, 1.0)


def test_sign_flips_are_scipys_exact_permutation_test() -> None:
    x = rng.normal(0.5, 1, 9)
    theirs = stats.permutation_test(
        (x,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(x) == pytest.approx(theirs.pvalue)
    assert sign_flip(np.ones(10)) == 2 / 1024
    with pytest.raises(ValueError, match="at most 20"):
        sign_flip(np.ones(21))


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
        fits[alignment] = compare(data, {"noise": noise, "true": surprisal}, "noise")
        own = surprisal[data.rows]
        assert fits[alignment]["true"].r.value == pytest.approx(
            stats.pearsonr(own, data.times).statistic
        )
    right, wrong = fits["corrected"]["true"], fits["stored"]["true"]
    assert right.r.value > 0.8
    assert right.delta.low > 0.3
    assert right.delta_versus is not None
    assert right.delta_versus.low > 0.3
    assert right.delta_versus.p == 2 / 2**8
    assert abs(wrong.r.value) < 0.2  # the next word's time
    assert fits["corrected"]["noise"].delta_versus is None
    assert fits["corrected"]["noise"].delta.low < 0.01


def test_spillover_reaches_the_words_before() -> None:
    """Times that the previous word's surprisal drives: the regression sees it, r does not."""
    made, surprisal = corpus(effect=3.0, shifted=False)
    moved = ReadingTimes("made", made.words, made.stories, np.roll(made.times, 1), False)
    data = predictors(moved, "stored", Frequencies([Document("d", ["x xx"])]))
    other = np.random.default_rng(9).normal(size=len(surprisal))
    fit = compare(data, {"noise": other, "true": surprisal}, "noise")["true"]
    assert abs(fit.r.value) < 0.2
    assert fit.delta.low > 0.3


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


def test_tables_in_markdown_and_latex() -> None:
    table = Table("t", "A caption, 5 %.", ["arm", "Δ"], [["a_b|c", signed(-0.5, 1)]])
    assert table.markdown() == "| arm | Δ |\n| --- | --: |\n| a_b\\|c | −0.5 |\n\nA caption, 5 %."
    assert "a\\_b|c & $-$0.5 \\\\" in table.latex()
    assert "5 \\%" in table.latex()
    assert [p_value(p) for p in (None, 0.0002, 0.0421)] == ["", "<0.001", "0.042"]


def latex_faults(source: str) -> list[str]:
    """What would stop LaTeX, or print another thing, in one of our tables."""
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    plain = "\n".join(lines).replace(r"{!}{%", "{!}{")
    plain = re.sub(r"\\\\$", "", plain, flags=re.MULTILINE)  # ends of rows
    faults = [] if plain.isascii() else ["not ASCII"]
    escaped = re.sub(r"\\[a-zA-Z]+|\\[&%$#_{}]", "", plain)  # commands and escapes are fine
    if escaped.count("$") % 2:
        faults.append("a formula without end")
    text = re.sub(r"\$[^$]*\$", "", escaped)
    faults += [f"bare {c}" for c in "%#_^~\\" if c in text]
    depth = 0
    for c in text:
        depth += (c == "{") - (c == "}")
        if depth < 0:
            faults.append("a brace too many")
    faults += ["a brace without end"] if depth else []
    begun = re.findall(r"\\begin\{(\w+)\}", source)
    ended = re.findall(r"\\end\{(\w+)\}", source)
    faults += [] if begun == ended[::-1] else ["environments do not match"]
    rows = [line for line in lines if line.endswith(r"\\")]
    cells = {len(re.findall(r"(?<!\\)&", row)) for row in rows}
    return faults + ([] if len(cells) == 1 else ["rows of several lengths"])


def test_latex_survives_what_names_and_words_hold() -> None:
    nasty = [r"a_b^c~d%e#f$g&h{i}\j", "−1 ± 2 × 10⁻³", "“Δ” → … – — ‘a’ ≤ <b>"]
    table = Table("t", " ".join(nasty), nasty, [nasty, ["", *nasty[:2]]], wrapped=(1,))
    assert latex_faults(table.latex("fusion")) == []
    assert r"\label{tab:fusion-t}" in table.latex("fusion")
    faults = latex_faults(table.latex().replace(r"\%", "%").replace(r"\_", "_"))
    assert faults == ["bare %", "bare _"]  # the check sees them
    assert latex_faults(table.latex().replace(r"\end{tabular}", "")) != []


def test_saved_tables_are_latex() -> None:
    folder = Path(__file__).parents[1] / "docs" / "experiments"
    tables = sorted(folder.glob("*/*.tex"))
    assert tables
    faults = {str(t): latex_faults(t.read_text(encoding="utf-8")) for t in tables}
    # Words of the examples are the corpus' own.
    found = {t: f for t, f in faults.items() if f and (f != ["not ASCII"] or "examples" not in t)}
    assert not found
