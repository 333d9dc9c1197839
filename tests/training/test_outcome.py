"""What becomes of patients: who takes part, learners and their measures beside oracles, a known law found again, refusals."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from cxr_retrieval.cases.facts import fact_number, read_facts
from cxr_retrieval.cases.manifest import Manifest, read_manifest
from cxr_retrieval.contract import FEATURE_SIZE
from cxr_retrieval.errors import InputError, ManifestError, UsageError
from cxr_retrieval_training.checkpoints import save_checkpoint
from cxr_retrieval_training.config import OutcomeConfig, config_path, load_config
from cxr_retrieval_training.outcome.cases import Cases, choose
from cxr_retrieval_training.outcome.crossvalidation import Held, cross_validate, figures, folds_of
from cxr_retrieval_training.outcome.learners import Given, Learner, fit_predictor, learners
from cxr_retrieval_training.outcome.network import DeepAndCross, Facts, Forest, OutcomeNetwork, empty_network
from cxr_retrieval_training.outcome.train_outcome import load_outcome

CONFIG = load_config(config_path("outcome"), OutcomeConfig).model_copy(update={"facts": ("age", "spo2")})


def made_up(n: int, law: bool = True, seed: int = 0) -> tuple[Cases, NDArray[np.float64]]:
    """n films of n / 2 patients. Their features hold, beside noise, how ill the lungs are; the outcome comes by a law of that and of two facts,
    or by chance. Also the log odds of the law.
    """
    random = np.random.default_rng(seed)
    patients = np.repeat(np.arange((n + 1) // 2), 2)[:n]
    ill, facts = random.normal(size=n), random.normal(size=(n, 2))
    features = np.abs(0.3 * random.normal(size=(n, FEATURE_SIZE)) + np.outer(ill, random.normal(size=FEATURE_SIZE)) * 0.3 + 1)
    odds = 1.5 * ill + facts @ [1.0, -1.0] if law else np.zeros(n)
    came = (random.random(n) < 1 / (1 + np.exp(-odds))).astype(float)
    facts = facts * [18, 3] + [54, 91]
    return Cases(patients.astype(str), features.astype(np.float32), facts, {"went_icu": came}), odds


def manifest(folder: Path, rows: list[dict[str, str]]) -> Manifest:
    path = folder / "manifest.csv"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image_id", "path", *columns])
        writer.writeheader()
        writer.writerows({"image_id": str(i), "path": f"{i}.png", **row} for i, row in enumerate(rows))
    return read_manifest(path)


# ---------------------------------------------------------------------------------------------------------- facts


def test_facts_are_numbers_or_unknown() -> None:
    assert fact_number("age", 67.0) == 67
    assert (fact_number("sex", "M"), fact_number("sex", "F"), fact_number("sex", "O")) == (1, 0, None)
    assert (fact_number("went_icu", True), fact_number("smoker", "yes"), fact_number("pack_years", 12)) == (1, 1, 12)
    assert fact_number("spo2", 4.0) is None, "a flow of oxygen is no saturation"
    assert fact_number("view", "AP") is None
    assert fact_number("age", None) is None


def test_facts_are_read_as_people_say_them() -> None:
    assert read_facts(["age=67", "sex = F", "temperature=101.3 °F", "smoker=Y"]) == pytest.approx(
        {"age": 67, "sex": 0, "temperature": 38.5, "smoker": 1}, abs=0.01
    )


@pytest.mark.parametrize(
    "wrong", [["age"], ["age="], ["age=67", "age=68"], ["spo2=4"], ["sex=X"], ["age=old"], ["view=AP"], ["patient_id=7"], ["=3"]]
)
def test_a_fact_that_says_nothing_is_refused(wrong: list[str]) -> None:
    with pytest.raises(InputError):
        read_facts(wrong)


# ----------------------------------------------------------------------------------------------------- who takes part


def test_rows_take_part_whose_outcome_is_known(tmp_path: Path) -> None:
    rows = [
        {"label": "covid19", "went_icu": "Y", "age": "70", "spo2": "88"},
        {"label": "covid19", "went_icu": "N", "age": "", "spo2": "8"},
        {"label": "covid19", "went_icu": "", "age": "50", "spo2": "97"},
        {"label": "control", "went_icu": "N", "age": "40", "spo2": "98"},
        {"label": "covid19", "went_icu": "Y", "age": "60", "spo2": "90", "split": "extra"},
    ]
    chosen, facts, became = choose(manifest(tmp_path, rows), ["covid19"], ["age", "spo2"], ["went_icu"])
    assert [row.image_id for row in chosen] == ["0", "1"]
    np.testing.assert_array_equal(facts, [[70, 88], [np.nan, np.nan]])
    np.testing.assert_array_equal(became["went_icu"], [1, 0])


def test_within_hours(tmp_path: Path) -> None:
    """Came in time, came later, never came; came before the film or who knows when: nothing to learn from."""
    hours = [("Y", "71"), ("Y", "73"), ("N", ""), ("Y", "-2"), ("Y", "")]
    rows = [{"label": "covid19", "age": "50", "went_icu": yes, "went_icu_hours": time} for yes, time in hours]
    chosen, _, became = choose(manifest(tmp_path, rows), ["covid19"], ["age"], ["went_icu"], 72.0)
    assert [row.image_id for row in chosen] == ["0", "1", "2"]
    np.testing.assert_array_equal(became["went_icu"], [1, 0, 0])


@pytest.mark.parametrize(
    ("labels", "facts", "outcomes", "within", "said"),
    [
        (["flu"], ["age"], ["went_icu"], None, "no row has the label flu; expected covid19"),
        (["covid19"], ["age", "crp"], ["went_icu"], None, "nothing in column crp"),
        (["covid19"], ["age"], ["ventilated"], None, "nothing in column ventilated"),
        (["covid19"], ["age"], ["went_icu"], 72.0, "nothing in column went_icu_hours"),
        (["covid19"], ["view"], ["went_icu"], None, "view: text that has no order"),
        (["covid19"], ["age"], ["spo2"], None, "0: column spo2: not understood; expected Y or N"),
    ],
)
def test_columns_that_cannot_be_learnt_from(
    labels: list[str], facts: list[str], outcomes: list[str], within: float | None, said: str, tmp_path: Path
) -> None:
    rows = [{"label": "covid19", "age": "50", "spo2": "90", "view": "AP", "went_icu": "Y"}]
    with pytest.raises(ManifestError, match=said):
        choose(manifest(tmp_path, rows), labels, facts, outcomes, within)


# ----------------------------------------------------------------------------------------------------------- learners


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_a_forest_of_tensors_says_what_scikit_learn_says(seed: int, depth: int) -> None:
    """Also of values that lie on a threshold."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 6, (60, 5)).astype(np.float32) / np.float32(3)
    came = random.integers(0, 2, 60)
    came[:2] = 0, 1
    fitted = RandomForestClassifier(7, max_depth=depth, random_state=seed).fit(values, came)
    asked = np.concatenate([values, *(values[:, ::-1], np.nextafter(values, np.float32(9)))])
    odds = Forest.of(fitted.estimators_, depth)(torch.from_numpy(np.ascontiguousarray(asked)))
    share = fitted.predict_proba(asked)[:, 1].clip(0.01, 0.99)
    np.testing.assert_allclose(torch.sigmoid(odds).numpy(), share, atol=1e-5)


def test_the_cross_part_is_that_of_the_paper() -> None:
    """x_{l+1} = x_0 (x_lᵀ w_l) + b_l + x_l (Wang et al. 2017, eq. 3)."""
    torch.manual_seed(3)
    network = DeepAndCross(5, (7, 11)).double()
    for offset in network.offsets:
        torch.nn.init.normal_(offset)
    x0 = torch.randn(13, 5, dtype=torch.float64)
    crossed = x0
    for weigh, offset in zip(network.crosses.parameters(), network.offsets, strict=True):
        crossed = torch.einsum("bi,b->bi", x0, crossed @ weigh[0]) + offset + crossed
    deep = x0
    for layer in network.deep.modules():
        if isinstance(layer, torch.nn.Linear):
            deep = torch.relu(deep @ layer.weight.T + layer.bias)
    expected = torch.cat([crossed, deep], dim=1) @ network.last.weight[0] + network.last.bias
    torch.testing.assert_close(network(x0), expected)


def test_what_is_not_known_is_the_median_of_those_fitted_on() -> None:
    filled = Facts(torch.tensor([50.0, 95.0]))(torch.tensor([[70.0, 12345.0]]), torch.tensor([[1.0, 0.0]]))
    assert filled.tolist() == [[70.0, 95.0, 1.0, 0.0]]
    cases, _ = made_up(40)
    cases.facts[:20, 1] = np.nan
    cases.facts[20:, 1] = np.arange(20)
    given_ = Given.of(cases)
    network = fit_predictor(given_, cases.outcomes["went_icu"], CONFIG, [(1.0, 0.0)] * 3)
    assert network.facts.medians[1] == 9.5


def test_a_fact_that_nobody_knows_changes_nothing() -> None:
    cases, _ = made_up(60)
    cases.facts[:, 1] = np.nan
    for learner in learners(CONFIG):
        assert np.isfinite(learner.scores(Given.of(cases), cases.outcomes["went_icu"], Given.of(cases))).all(), learner


# ----------------------------------------------------------------------------------------------------------- measures


def test_no_patient_is_in_two_folds() -> None:
    cases, _ = made_up(101)
    fold = folds_of("went_icu", cases.outcomes["went_icu"], cases.patients, CONFIG)
    assert all(len(set(fold[cases.patients == patient])) == 1 for patient in cases.patients)
    assert set(fold) == set(range(5))


def test_too_few_patients_are_refused() -> None:
    came, patients = np.array([1.0] * 8 + [0.0] * 30), np.array([str(i // 2) for i in range(38)])
    with pytest.raises(UsageError, match=r"not every fold has films with and without it.*4 patients with it, 15 without"):
        folds_of("went_icu", came, patients, CONFIG)


def test_what_is_chance_is_said_to_be() -> None:
    """Scores without sense are calibrated to how often the outcome came; upside-down ones, too."""
    cases, _ = made_up(200, law=False)
    held, known = cross_validate(cases, "went_icu", CONFIG)
    found = figures(held)
    assert known.all()
    for row in found["learners"]:
        low, high = row["auc_ci"]
        assert low < row["auc"] < high
        assert abs(row["auc"] - 0.5) < 0.15
    share = held.came.mean()
    backwards = replace(held, scores=dict.fromkeys(held.scores, -5 * (held.came - share)))
    np.testing.assert_allclose(backwards.probabilities(held.served("both")), share, atol=0.05)


def test_a_known_law_is_found_again() -> None:
    """The law's own area on the same films; film and facts together come within 0.02 of it, each alone does not."""
    cases, odds = made_up(600)
    came, given_ = cases.outcomes["went_icu"], Given.of(cases)
    fold = folds_of("went_icu", came, cases.patients, CONFIG)
    scores = {learner: np.zeros(len(came)) for learner in learners(CONFIG)[:3]}
    for number in range(CONFIG.folds):
        mine = fold == number
        for learner, found in scores.items():
            found[mine] = learner.scores(given_[~mine], came[~mine], given_[mine])
    law = Learner("the law", "", lambda *_: odds)
    told = figures(Held("went_icu", came, cases.patients, fold, {**scores, law: odds}))
    by = {row["part"]: row for row in told["learners"]}
    assert told["served"] == {"image": "random forest", "facts": "random forest", "both": "Deep & Cross"}
    assert by["the law"]["auc"] - by["both"]["auc"] < 0.02
    assert max(by["image"]["auc"], by["facts"]["auc"]) < by["the law"]["auc"] - 0.05
    assert told["features_add"]["auc_ci"][0] > 0.05
    assert by["both"]["ece"] < 0.08
    assert by["both"]["brier"] < told["brier_of_the_share"] - 0.05


def test_a_checkpoint_holds_the_network(tmp_path: Path) -> None:
    cases, _ = made_up(80)
    predictor = fit_predictor(Given.of(cases), cases.outcomes["went_icu"], CONFIG, [(0.5, 0.1), (2.0, -0.3), (1.0, 0.0)])
    network = OutcomeNetwork([predictor])
    about = {"config": CONFIG.model_dump(mode="json"), "facts": ["age", "spo2"], "outcomes": ["went_icu"]}
    save_checkpoint(tmp_path / "outcome.pt", {**about, "state": network.state_dict()})
    again, told = load_outcome(tmp_path / "outcome.pt")
    given_ = Given.of(cases)
    parts = (given_.features, given_.facts, given_.known)
    torch.testing.assert_close(again(*parts)[0], network(*parts)[0])
    assert told["outcomes"] == ["went_icu"]
    assert empty_network(about)(*parts)[0].shape == (80, 1, 3)
    save_checkpoint(tmp_path / "other.pt", {"state": {}})
    with pytest.raises(UsageError, match="no checkpoint of an outcome"):
        load_outcome(tmp_path / "other.pt")
