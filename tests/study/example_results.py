"""Synthetic ``results.json`` contents: what the report and the terminal table are tested on.

Scores are drawn from a seeded generator, so that the numbers hang together (mean of tasks, interval
around the difference, verdict from interval and margin) without running a study.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

POOLINGS = ["last token", "mean", "position-weighted mean", "last-layer trainable", "multi-layer"]
DESIGNS = [f"{p}, {a}" for p in POOLINGS for a in ("causal", "bidirectional")]
DESIGNS += ["latent attention", "best single layer"]
METRICS = {
    "reciprocal_rank": ("MRR@10", ["docstring → code", "question → answer", "title → abstract"]),
    "spearman": ("Spearman correlation", ["Lee documents", "WordSim-353", "SimLex-999"]),
    "v_measure": ("V-measure", ["newsgroups"]),
    "accuracy": ("Accuracy", ["package sections", "newsgroups (20 classes)"]),
}
EFFECTS = [-0.21, -0.18, 0.0, 0.004, 0.011, 0.016, 0.024, 0.029, 0.036, 0.047, 0.043, 0.002]
_MADE: dict[str, str] = {}
TRACEBACK = """Traceback (most recent call last):
  File "bakeoff/study/engine.py", line 212, in _run_trial
    trial = problem.run(design, seed, work)
  File "bakeoff/embedding/problem.py", line 341, in run
    head.fit(features, rng)
RuntimeError: the loss is not finite after 40 steps; lower learning_rate (now 0.1)
"""


def example(
    names: list[str] | None = None,
    effects: list[float] | None = None,
    *,
    n_seeds: int = 3,
    reference: str | None = None,
    margin: float | None = 0.01,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """A complete study: nine tasks in four metrics under a combined headline."""
    key = repr((names, effects, n_seeds, reference, margin, higher_is_better))
    if key not in _MADE:
        made = _make(names, effects, n_seeds, reference, margin, higher_is_better)
        _MADE[key] = json.dumps(made)
    return json.loads(_MADE[key])


def _make(
    names: list[str] | None,
    effects: list[float] | None,
    n_seeds: int,
    reference: str | None,
    margin: float | None,
    higher_is_better: bool,
) -> dict[str, Any]:
    names = DESIGNS if names is None else names
    rng = np.random.default_rng(7)
    effects = EFFECTS if effects is None else effects
    effect = dict(zip(names, np.resize(effects, len(names)).astype(float), strict=True))
    reference = reference or ("mean, causal" if "mean, causal" in names else names[0])
    for name in names:
        effect[name] -= 0.0 if name == reference else effect[reference]
    effect[reference] = 0.0
    sign = 1.0 if higher_is_better else -1.0

    metrics: dict[str, Any] = {
        "mean_score": {
            "label": "mean score",
            "higher_is_better": higher_is_better,
            "combines": list(METRICS),
            "margin": margin,
            "tasks": [task for _, tasks in METRICS.values() for task in tasks],
        }
    }
    for name, (label, tasks) in METRICS.items():
        metrics[name] = {
            "label": label,
            "higher_is_better": higher_is_better,
            "combines": [],
            "margin": margin,
            "tasks": tasks,
        }
    base = {task: 0.25 + 0.5 * rng.random() for task in metrics["mean_score"]["tasks"]}
    difference = {
        (name, task): sign * effect[name] * rng.uniform(0.3, 1.7)
        + (0 if name == reference else rng.normal(0, 0.006))
        for name in names
        for task in base
    }

    def record(name: str, tasks: list[str], spread: float) -> dict[str, Any]:
        value = float(np.mean([difference[name, task] for task in tasks]))
        mean = float(np.mean([base[task] for task in tasks])) + value
        if name == reference:
            value, spread = 0.0, 0.0
        low, high = value - spread, value + spread
        n_units = 260 * len(tasks)
        units = rng.normal(value, 0.12, n_units) * (rng.random(n_units) < 0.6)
        if name == reference:
            units = np.zeros(n_units)
        p_value = float(np.exp(-(((value / max(spread, 1e-9)) * 1.96) ** 2) / 2))
        p_holm = min(1.0, p_value * (len(names) - 1))
        if name == reference:
            verdict = None
        elif p_holm < 0.05:
            verdict = "better" if (value > 0) == higher_is_better else "worse"
        elif margin is not None and low > -margin and high < margin:
            verdict = "equivalent"
        else:
            verdict = "undecided"
        wins, losses = int(np.sum(sign * units > 0)), int(np.sum(sign * units < 0))
        return {
            "mean": mean,
            "difference": value,
            "interval": [low, high],
            "p_value": None if name == reference else p_value,
            "p_holm": None if name == reference else p_holm,
            "effect_size": None if name == reference else value / 0.12,
            "verdict": verdict,
            "n_units": n_units,
            "n_seeds": n_seeds,
            "n_tasks": len(tasks),
            "wins": wins,
            "ties": n_units - wins - losses,
            "losses": losses,
            "difference_quantiles": [float(q) for q in np.quantile(units, np.linspace(0, 1, 21))],
            "needed_units": n_units * 4 if verdict == "undecided" else None,
            "needed_seeds": n_seeds * 4 if verdict == "undecided" else None,
        }

    designs = []
    for i, name in enumerate(names):
        seconds = 40.0 + 25.0 * i
        trained = 0 if i < 6 else 590_000 * (i - 5)
        designs.append(
            {
                "name": name,
                "method": "latent-attention" if "latent" in name else "pooling",
                "params": {"attention": "bidirectional" if "bidi" in name else "causal"},
                "method_version": "1",
                "artifact": f"trials/{i:04x}/model",
                "metrics": {
                    metric: {
                        "overall": record(name, facts["tasks"], 0.009 + 0.0008 * i),
                        "tasks": {task: record(name, [task], 0.022) for task in facts["tasks"]},
                    }
                    for metric, facts in metrics.items()
                },
                "cost": {
                    "wall_seconds": {"mean": seconds, "min": seconds * 0.95, "max": seconds * 1.1},
                    "peak_memory_bytes": _constant(1.1e9 + 2e7 * i),
                    "trained_parameters": _constant(trained),
                    "forward_flops_per_text": _constant(2.7e10 * (1 + 0.02 * i)),
                },
                "notes": ["12 of 4,174 texts were longer than 512 tokens and were cut."]
                if i == 3
                else [],
            }
        )
    designs.sort(
        key=lambda d: d["metrics"]["mean_score"]["overall"]["mean"], reverse=higher_is_better
    )
    ordered = [design["name"] for design in designs]
    better = [d for d in designs if d["metrics"]["mean_score"]["overall"]["verdict"] == "better"]
    winner = better[0]["name"] if better else reference
    planned = len(names) * n_seeds
    return {
        "schema_version": 1,
        "study": {
            "name": "embedding-default",
            "started": "2026-03-02T09:14:05+00:00",
            "finished": "2026-03-02T09:22:41+00:00",
            "complete": True,
            "seeds": list(range(n_seeds)),
            "alpha": 0.05,
            "trials": {"planned": planned, "finished": planned, "failed": 0, "reused": 0},
            "wall_seconds": 516.4,
            "workers": 2,
        },
        "problem": {
            "name": "embedding",
            "fingerprint": "9f2c" * 16,
            "description": {
                "data": "embedded default",
                "base model": "SmolLM2-135M-Instruct (134.5M parameters, frozen)",
                "tasks": dict.fromkeys(base, "260 units"),
                "training": {"pairs": 3_000, "epochs": 2, "batch size": 64},
                "languages": ["en"],
                "usage": [
                    "from sentence_transformers import SentenceTransformer",
                    'model = SentenceTransformer("winner/")',
                ],
            },
        },
        "metrics": metrics,
        "reference": reference,
        "designs": designs,
        "ranks": {metric: _ranks(ordered, float(rng.uniform(1.2, 2.4))) for metric in metrics},
        "shared_cost": {"wall_seconds": 171.3, "peak_memory_bytes": 2.4e9},
        "failures": [],
        "winner": {
            "design": winner,
            "seed": 0,
            "artifact": "winner",
            "reason": f"{winner} has the best mean of those that beat {reference}."
            if better
            else f"Nothing beat {reference}, so the simplest stays.",
        },
        "notes": ["26 training texts that also occur in a task were removed."],
        "environment": {
            "bakeoff": "0.1.0",
            "python": "3.12.4",
            "platform": "Linux-6.1-x86_64",
            "processor": "x86_64",
            "cores": 2,
            "memory_bytes": 8.2e9,
            "packages": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
        },
        "command": "bakeoff run embedding --seeds 3 --workers 2",
    }


def _constant(value: float) -> dict[str, float]:
    return {"mean": value, "min": value, "max": value}


def _ranks(ordered: list[str], critical_difference: float) -> dict[str, Any]:
    ranks = {name: 1.0 + i * 0.93 for i, name in enumerate(ordered)}
    cliques: list[list[str]] = []
    for i in range(len(ordered)):
        clique = [n for n in ordered[i:] if ranks[n] - ranks[ordered[i]] <= critical_difference]
        if len(clique) > 1 and not any(set(clique) <= set(other) for other in cliques):
            cliques.append(clique)
    return {
        "average_ranks": ranks,
        "critical_difference": critical_difference,
        "cliques": cliques,
        "n_blocks": 9,
        "test": "Friedman test, then Wilcoxon signed-rank tests of all pairs; block: task",
    }


def with_failure() -> dict[str, Any]:
    results = example()
    results["study"]["trials"].update(finished=35, failed=1)
    results["failures"] = [
        {
            "design": "latent attention",
            "seed": 2,
            "error": "RuntimeError: the loss is not finite after 40 steps",
            "traceback": TRACEBACK,
        }
    ]
    return results


def partial() -> dict[str, Any]:
    """An interrupted study: fewer trials, and one design that has not run at all."""
    results = with_failure()
    results["study"].update(complete=False, finished=None)
    results["study"]["trials"].update(finished=21)
    results["designs"][-1].update(metrics={}, cost={}, artifact=None)
    for ranks in results["ranks"].values():
        ranks["average_ranks"].pop(results["designs"][-1]["name"])
        ranks["cliques"] = [
            [name for name in clique if name in ranks["average_ranks"]]
            for clique in ranks["cliques"]
        ]
    return results


def one_design() -> dict[str, Any]:
    results = example(["mean"], [0.0])
    results["ranks"] = {}
    return results


def with_nulls() -> dict[str, Any]:
    """Every number that may be null is null in some design."""
    results = example()
    nothing = dict.fromkeys(results["designs"][0]["metrics"]["mean_score"]["overall"], None) | {
        "verdict": "undecided"
    }
    for design in results["designs"][1:4]:
        for metric in design["metrics"].values():
            metric["overall"] = dict(nothing)
            metric["tasks"] = {task: dict(nothing) for task in metric["tasks"]}
        design["cost"] = {"wall_seconds": {"mean": None, "min": None, "max": None}}
        design["artifact"] = None
    some = results["designs"][5]["metrics"]["mean_score"]["overall"]
    some["interval"] = [None, None]
    some["difference_quantiles"] = [None] * 21
    for metric in results["metrics"].values():
        metric["margin"] = None
    for ranks in results["ranks"].values():
        ranks["critical_difference"] = None
    results["shared_cost"] = {"wall_seconds": None, "peak_memory_bytes": None}
    results["winner"].update(artifact=None)
    results["environment"].update(processor=None, cores=None, memory_bytes=None)
    results["study"]["wall_seconds"] = None
    return results


def nothing_finished() -> dict[str, Any]:
    results = with_failure()
    for design in results["designs"]:
        design.update(metrics={}, cost={}, artifact=None)
    results["study"]["trials"].update(finished=0, failed=36)
    results["ranks"] = {}
    results["winner"] = {"design": None, "seed": None, "artifact": None, "reason": "None ran."}
    return results


def sixty_designs() -> dict[str, Any]:
    names = [f"{p}, layer {layer:02d}" for layer in range(10) for p in [*POOLINGS, "attention"]]
    effects = list(np.random.default_rng(3).normal(0.0, 0.03, len(names)))
    results = example(names, effects, n_seeds=167)
    results["study"]["trials"].update(planned=10_020, finished=10_000, failed=20)
    results["failures"] = [
        {"design": names[i % 60], "seed": i, "error": "MemoryError", "traceback": TRACEBACK}
        for i in range(20)
    ]
    return results


HOSTILE = [
    "mean",
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked=2">',
    "平均プーリング（双方向）ñ é 🤗",
    "a very long name " * 8 + "that-has-one-word-which-does-not-break-" + "x" * 80,
    "`back` {{ 7 * 7 }} </style></title>",
]


def hostile_names() -> dict[str, Any]:
    results = example(HOSTILE, [0.0, 0.05, -0.03, 0.002, 0.02, 0.03], reference="mean")
    evil = "</pre><script>window.hacked = 3</script>"
    results["study"]["name"] = evil
    results["notes"] = [evil]
    results["command"] = f"bakeoff run '{evil}'"
    results["problem"]["description"]["data"] = evil
    results["problem"]["description"][evil] = {evil: [evil]}
    results["failures"] = [{"design": evil, "seed": 0, "error": evil, "traceback": evil}]
    results["designs"][0]["notes"] = [evil]
    results["designs"][0]["params"] = {evil: evil}
    results["designs"][0]["cost"][evil] = _constant(3.0)
    results["designs"][1]["cost"][evil] = _constant(4.0)
    for metric in results["metrics"].values():
        metric["label"] += evil
    return results


def nothing_beats() -> dict[str, Any]:
    return example(effects=[-0.21, -0.18, 0.0, 0.001, 0.001, -0.04], margin=0.02)


def undecided() -> dict[str, Any]:
    return example(effects=[0.001, 0.003, 0.0, 0.002, 0.004, 0.001], margin=0.001)


def lower_is_better() -> dict[str, Any]:
    return example(higher_is_better=False)
