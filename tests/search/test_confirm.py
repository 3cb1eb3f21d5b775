import math

import numpy as np
import pytest
from scipy.stats import t as student_t

from raydetr import UserError
from raydetr.search import confirm
from raydetr.search.confirm import (
    Gain,
    Runs,
    Verdict,
    caveat,
    dunnett,
    enough,
    estimate_gain,
    judge,
    multiplier,
    next_round,
    sentence,
    winner,
)


def simulate(random, mean, seeds, images, seed_sd=0.02, image=None, own_sd=0.1, run_sd=0.1):
    """Runs whose AP is the mean over images of numbers of each image: common ``image``, the setting's own, each run's own."""
    own = random.normal(0, own_sd, images)
    numbers = (
        mean + (0 if image is None else image) + own + random.normal(0, seed_sd, (seeds, 1)) + random.normal(0, run_sd, (seeds, images))
    )
    return Runs(numbers.mean(1), (numbers.sum(1, keepdims=True) - numbers) / (images - 1))


def test_the_parts_are_those_of_the_textbook():
    random = np.random.default_rng(0)
    one, other = (simulate(random, 0.5, 4, 30) for _ in range(2))
    gain = estimate_gain(one, other)
    count = 30
    numbers = [count * runs.ap[:, None] - (count - 1) * runs.left_out for runs in (one, other)]  # of each image
    difference = numbers[0].mean(0) - numbers[1].mean(0)
    assert gain.value == pytest.approx(difference.mean())
    assert gain.images == pytest.approx(difference.var(ddof=1) / count)
    assert gain.seeds == pytest.approx((one.ap.var(ddof=1) + other.ap.var(ddof=1)) / 4)
    single = sum(np.mean([run.var(ddof=1) / count for run in each]) - each.mean(0).var(ddof=1) / count for each in numbers)
    assert gain.both == pytest.approx(single / 3)
    assert gain.variance == pytest.approx(max(gain.images + gain.seeds - gain.both, gain.images, gain.seeds))
    assert gain.freedom == pytest.approx((gain.images + gain.seeds) ** 2 / (gain.images**2 / 29 + gain.seeds**2 / 6))


def test_the_variance_is_that_of_repeated_experiments():
    random = np.random.default_rng(1)
    gains = [estimate_gain(*(simulate(random, 0.5, 5, 40, image=image) for _ in range(2))) for image in random.normal(0, 0.2, (1500, 40))]
    assert np.mean([gain.variance for gain in gains]) == pytest.approx(np.var([gain.value for gain in gains]), rel=0.08)
    for part in ("images", "seeds"):  # either alone says too little, both without the overlap too much
        assert np.mean([getattr(gain, part) for gain in gains]) < 0.85 * np.var([gain.value for gain in gains])
    inside = [abs(gain.value) <= student_t.ppf(0.975, gain.freedom) * math.sqrt(gain.variance) for gain in gains]
    assert 0.93 <= np.mean(inside) <= 0.975


def test_the_variance_is_never_less_than_one_of_its_parts():
    gain = Gain(0.1, images=0.04, seeds=0.01, both=0.03, seed_freedom=4, image_freedom=9)
    assert gain.variance == 0.04


def test_runs_without_any_variance_do_not_divide_by_zero():
    same = Runs(np.full(2, 0.5), np.full((2, 6), 0.5))
    assert estimate_gain(same, same).freedom == 7


def test_seeds_are_pooled_over_all_settings():
    pooled, freedom = confirm.seed_variance([[1, 2, 3], [5], [4, 6]])
    assert (pooled, freedom) == (pytest.approx((2 + 2) / 3), 3)


@pytest.mark.parametrize(
    ("comparisons", "freedom", "value"),  # Dunnett (1955), table 1a
    [(1, 10, 1.81), (2, 10, 2.15), (3, 10, 2.34), (4, 10, 2.47), (9, 10, 2.81), (3, 20, 2.19), (2, math.inf, 1.92), (4, math.inf, 2.16)],
)
def test_dunnetts_table(comparisons, freedom, value):
    assert dunnett(comparisons, freedom) == pytest.approx(value, abs=0.006)


def test_the_multiplier_is_never_below_students():
    assert multiplier(1, 12) == pytest.approx(student_t.ppf(0.975, 12))
    assert multiplier(31, 12) == pytest.approx(dunnett(31, 12))


def test_a_small_budget_goes_evenly_to_two_candidates():
    assert confirm.candidate_count(19) == 2
    results = {0: [], 5: [], 9: []}
    while chosen := next_round(results, 11):
        assert chosen == [0, 5, 9]
        for number in chosen:
            results[number].append(0.1 * number)
    assert [len(each) for each in results.values()] == [3, 3, 3]


def test_a_race_drops_who_is_behind_but_never_the_defaults():
    assert confirm.candidate_count(20) == 4
    results = {0: [0.1, 0.12], 1: [0.5, 0.52], 2: [0.51, 0.49], 3: [0.3, 0.32], 4: [0.2, 0.22]}
    assert next_round(results, 20) == [0, 1, 2]
    for number in (0, 1, 2):
        results[number].append(0.5)
    assert 3 not in next_round(results, 20)
    assert winner(results) == 1
    one_round = {number: [0.1 * number] for number in range(5)}
    assert next_round(one_round, 20) == [0, 1, 2, 3, 4]  # a single run each says nothing about seeds


def test_a_race_spends_its_budget_and_no_more():
    random = np.random.default_rng(3)
    for budget in range(20, 31):
        results = {number: [] for number in range(5)}
        while chosen := next_round(results, budget):
            for number in chosen:
                results[number].append(random.normal(0.5, 0.02))
        spent = sum(map(len, results.values()))
        assert budget - len(results) < spent <= budget


def test_the_winner_was_trained_to_the_end():
    assert winner({0: [0.5] * 3, 1: [0.9] * 2, 2: [0.6] * 3}) == 2


@pytest.mark.parametrize("candidates", [2, 4])
def test_where_nothing_is_better_few_claims_are_made(candidates):
    random = np.random.default_rng(candidates)
    claims = 0
    for _ in range(600):
        image = random.normal(0, 0.2, 50)
        claims += judge({number: simulate(random, 0.5, 4, 50, image=image) for number in range(candidates + 1)}, 50).better
    assert 0.005 <= claims / 600 <= 0.075  # 5 %, and two standard errors


def test_the_searchs_own_images_ask_for_more():
    random = np.random.default_rng(5)
    runs = {number: simulate(random, 0.5 + 0.01 * number, 5, 60) for number in range(3)}
    fresh, own = judge(runs, 60), judge(runs, 60, searched_trials=64)
    assert own.low < fresh.low
    assert own.gain == fresh.gain


def test_the_number_of_images_and_seeds_that_would_do_does():
    random = np.random.default_rng(7)
    design = {"seed_sd": 0.01, "own_sd": 0.06, "run_sd": 0.06}
    gains = [estimate_gain(*(simulate(random, 0.5, 4, 40, **design) for _ in range(2))) for _ in range(200)]
    typical = Gain(0.0, *(float(np.mean([getattr(gain, part) for gain in gains])) for part in ("images", "seeds", "both")), 6, 39)
    images, seeds = enough(typical, 40, 4, 1, wanted=0.03)
    assert images > 40
    shown = [
        judge({0: simulate(random, 0.5, 4, images, **design), 1: simulate(random, 0.53, 4, images, **design)}, images).better
        for _ in range(400)
    ]
    assert 0.72 <= np.mean(shown) <= 0.9
    assert seeds is None or seeds > 4


def test_more_seeds_do_not_help_against_too_few_images():
    images, seeds = enough(Gain(0.0, images=0.01, seeds=1e-4, both=0.0, seed_freedom=8, image_freedom=12), 13, 5, 1, wanted=0.05)
    assert seeds is None
    assert images > 100


VERDICT = Verdict(17, 0.031, 0.008, 0.056, 5, 58, 58, 5, 0.02)


def test_a_claim_in_words():
    assert sentence(VERDICT) == "Settings 17 beat the defaults by 3.1 AP (95 % interval 0.8 to 5.6; 5 seeds, 58 test images)."


def test_no_claim_in_words():
    def words(**other):
        return sentence(Verdict(**{**VERDICT.__dict__, "gain": 0.01, "low": -0.02, "high": 0.04, **other}))

    start = "No difference can be shown with these images and seeds (95 % interval -2.0 to 4.0; 5 seeds, 58 test images); "
    assert words(enough_images=233, enough_seeds=12) == start + "to show 2 AP about 240 images or 12 seeds would be needed."
    assert words(enough_images=233, enough_seeds=None).endswith("about 240 images would be needed, more seeds alone would not do.")
    assert words(enough_images=None, enough_seeds=40).endswith("about 40 seeds would be needed, more images alone would not do.")
    assert words(enough_images=None, enough_seeds=None).endswith("both more images and more seeds would be needed.")
    assert words().endswith("a gain of 2 AP would probably have shown.")


def test_worse_in_words():
    worse = Verdict(**{**VERDICT.__dict__, "gain": -0.03, "low": -0.05, "high": -0.01})
    assert sentence(worse).startswith("The defaults beat settings 17, the best of the search, by 3.0 AP (95 % interval 1.0 to 5.0;")


def test_a_confirmation_by_masks_says_so():
    assert sentence(VERDICT, "val", "segm_AP").startswith("Settings 17 beat the defaults by 3.1 mask AP (95 %")
    worse = Verdict(**{**VERDICT.__dict__, "gain": -0.03, "low": -0.05, "high": -0.01})
    assert "the best of the search, by 3.0 mask AP (95 %" in sentence(worse, judged_by="segm_AP")
    open_question = sentence(Verdict(**{**VERDICT.__dict__, "low": -0.02, "enough_images": 233}), judged_by="segm_AP")
    assert open_question.startswith("No difference in mask AP can be shown")
    assert "to show 2 mask AP about 240 images" in open_question
    assert "a gain of 2 mask AP would probably have shown" in sentence(Verdict(**{**VERDICT.__dict__, "low": -0.02}), judged_by="segm_AP")


def test_too_few_images_claim_nothing():
    few = Verdict(**{**VERDICT.__dict__, "images": 4})
    assert not few.better
    assert sentence(few) == "With 4 images no difference can be shown, whatever the number of seeds; at least 5 images are needed to try."


@pytest.mark.parametrize("images", [1, 4])
def test_too_few_images_are_no_reason_to_fail(images):
    random = np.random.default_rng(0)
    verdict = judge({0: simulate(random, 0.2, 3, max(images, 2)), 1: simulate(random, 0.9, 3, max(images, 2))}, images)
    assert not verdict.better
    assert "no difference can be shown" in sentence(verdict)


def test_a_single_seed_is_refused():
    random = np.random.default_rng(0)
    with pytest.raises(UserError, match="two seeds or more"):
        judge({0: simulate(random, 0.5, 1, 20), 1: simulate(random, 0.5, 1, 20)}, 20)


def test_caveats():
    assert caveat("test") == ""
    assert "among 32 trials" in caveat("val", 32)
    assert "overstated" in caveat("val", 32)
    assert "folds" in caveat("folds")


def test_the_sentence_names_the_images_that_judged():
    verdict = Verdict(3, 0.03, 0.01, 0.05, 5, 40, None, None, 0.02)
    assert "40 test images" in sentence(verdict)
    assert "40 validation images" in sentence(verdict, "val")
