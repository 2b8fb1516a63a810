"""Claims are judged by fixed rules, name designs that exist, and run."""

import json
from itertools import product

import pytest

from bakeoff.claims.claim import (
    Claim,
    Evidence,
    _evidence,
    claim_slugs,
    judge,
    load_claims,
    recorded_results,
    run_claim,
    save_result,
)
from bakeoff.claims.ledger import ledger_markdown, ledger_rows
from bakeoff.errors import BakeoffError

VERDICTS = ("better", "worse", "equivalent", "undecided")


def evidence(*verdicts):
    return [Evidence("r", "score", 0.1, (0.0, 0.2), 0.01, verdict) for verdict in verdicts]


@pytest.mark.parametrize("pair", list(product(VERDICTS, repeat=2)))
def test_superiority_needs_every_comparison_and_falls_with_one(pair):
    claim = Claim("c", "s", "p", None, "t", ("a", "b"), ("score",))
    if set(pair) == {"better"}:
        expected = "holds"
    elif "worse" in pair or "equivalent" in pair:
        expected = "fails"
    else:
        expected = "undecided"
    assert judge(claim, evidence(*pair)) == expected


@pytest.mark.parametrize("pair", list(product(VERDICTS, repeat=2)))
def test_no_superiority_is_not_shown_by_an_undecided_comparison(pair):
    claim = Claim("c", "s", "p", None, "t", ("a", "b"), ("score",), expected="not better")
    if "better" in pair:
        expected = "fails"
    elif "undecided" in pair:
        expected = "undecided"
    else:
        expected = "holds"
    assert judge(claim, evidence(*pair)) == expected


def test_nothing_measured_decides_nothing():
    assert judge(Claim("c", "s", "p", None, "t", (), ()), []) == "undecided"


def test_a_claim_about_designs_that_did_not_run_is_undecided():
    scores = {"score": {"a": {}, "b": {}}}
    claim = Claim("c", "s", "p", None, "a", ("absent",), ("score",))
    assert _evidence(claim, scores, {}, 0.05) == []
    assert judge(claim, []) == "undecided"


@pytest.mark.model
@pytest.mark.parametrize("slug", claim_slugs())
@pytest.mark.parametrize("size", ["smoke", "laptop"])
def test_claims_name_designs_and_metrics_that_exist(slug, size, tmp_path):
    claims, build = load_claims(slug)
    study = build(size, tmp_path, 1)
    names = {design.name for design in study.designs}
    for design in study.designs:
        study.problem.check(design)
    assert len({claim.name for claim in claims}) == len(claims)
    for claim in claims:
        assert {claim.treatment, *claim.references} <= names
        assert set(claim.metrics) <= set(study.problem.metrics)
        assert claim.statement.endswith((".", ")."))


def test_an_unknown_claim_or_size_is_refused(tmp_path):
    with pytest.raises(BakeoffError, match=r"there are: .*nv-embed"):
        load_claims("nope")
    with pytest.raises(BakeoffError, match="size must be one of smoke, laptop, full, got 'huge'"):
        run_claim("nv-embed", "huge", directory=tmp_path)


@pytest.mark.parametrize("slug", claim_slugs())
def test_every_method_has_a_recorded_laptop_result_with_its_evidence(slug):
    found = {result["slug"]: result for result in recorded_results() if result["size"] == "laptop"}
    result = found[slug]
    claims, _ = load_claims(slug)
    assert [item["name"] for item in result["claims"]] == [claim.name for claim in claims]
    for claim, item in zip(claims, result["claims"], strict=True):
        rows = [Evidence(**row) for row in item["evidence"]]
        assert len(rows) == len(claim.references) * len(claim.metrics)
        assert item["verdict"] == judge(claim, rows)
        for row in rows:
            means = result["means"]
            difference = means[claim.treatment][row.metric] - means[row.reference][row.metric]
            assert row.difference == pytest.approx(difference, abs=1e-9)
            assert row.interval[0] <= row.difference <= row.interval[1]
    assert result["verdict"] == result["claims"][0]["verdict"]
    assert len(result["seeds"]) >= 3
    assert not result["failures"]


def test_the_ledger_shows_every_claim_and_escapes_bars():
    results = recorded_results()
    table = ledger_markdown(results)
    assert len(table.splitlines()) == 2 + len(ledger_rows(results))
    odd = json.loads(json.dumps(results[0]))
    odd["claims"][0]["statement"] = "a | b"
    assert "a \\| b" in ledger_markdown([odd])


@pytest.mark.model
def test_a_smoke_claim_runs_on_the_real_model_and_is_saved(tmp_path):
    result = run_claim("nv-embed", "smoke", directory=tmp_path / "study")
    assert result["verdict"] in {"holds", "fails", "undecided"}
    assert result["claims"][0]["evidence"][0]["reference"] == "mean, bidirectional"
    path = save_result(result, tmp_path)
    assert path.name == "nv-embed.smoke.json"
    assert json.loads(path.read_text())["verdict"] == result["verdict"]
