"""A whole problem in a page: scores are a seeded normal sample around the design's `effect`.

Every run leaves a file in `log`, ``<method params>-<seed>.<random>.started``, renamed to ``.done``
when it ends, so that tests can count what was computed. Params of a design choose its mischief.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bakeoff.study.design import Design
from bakeoff.study.protocol import Metric, Trial, Work

METRICS = {
    "score": Metric("mean score", combines=("hit", "rank"), margin=0.001),
    "hit": Metric("hit rate"),
    "rank": Metric("reciprocal rank"),
    "loss": Metric("loss", higher_is_better=False),
}
DESIGNS = (
    Design("plain", "toy"),
    Design("good", "toy", {"effect": 1.0}),
    Design("bad", "toy", {"effect": -1.0}),
)


@dataclass(frozen=True)
class Toy:
    log: Path
    data: str = "some data"
    version: str = "1"
    n_units: int = 20
    seconds: float = 0.0
    artifact: bool = False

    name = "toy"
    metrics = METRICS

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.data} {self.n_units}".encode()).hexdigest()

    def describe(self) -> Mapping[str, object]:
        return {"data": self.data, "units": self.n_units}

    def method_version(self, method: str) -> str:
        return self.version

    def prepare(self, designs: Sequence[Design], seeds: Sequence[int], work: Work) -> None:
        work.progress(0.5, "half")
        self._leave("prepare").rename(self.log / f"prepare.{secrets.token_hex(8)}.done")

    def run(self, design: Design, seed: int, work: Work) -> Trial:
        label = f"{json.dumps(dict(design.params), sort_keys=True)}-{seed}".replace("/", "_")
        started = self._leave(label)
        assert not any(work.directory.iterdir())
        work.progress(0.5, "half")
        params = design.params
        misbehave = seed in params.get("seeds", [seed])
        if params.get("mischief") == "raise" and misbehave:
            raise RuntimeError("the toy broke\nsecond line")
        if params.get("mischief") == "exit" and misbehave:
            os._exit(3)
        if params.get("mischief") == "sys.exit" and misbehave:
            sys.exit("enough")
        if params.get("mischief") == "raise once" and not (self.log / "mended").exists():
            (self.log / "mended").touch()
            raise RuntimeError("only the first time")
        time.sleep(self.seconds)
        artifact = None
        if self.artifact:
            artifact = work.directory / "model"
            artifact.mkdir()
            (artifact / "weights.txt").write_text(f"{design.name} {seed}")
        scores = toy_scores(params.get("effect", 0.0), seed, self.n_units)
        if params.get("mischief") == "replace" and misbehave:
            scores = odd_scores(params["with"])
        started.rename(started.with_suffix(".done"))
        return Trial(
            scores, {"labels_used": 10.0 + seed}, artifact, (f"{design.method} says hello",)
        )

    def _leave(self, label: str) -> Path:
        path = self.log / f"{label}.{secrets.token_hex(8)}.started"
        path.touch()
        return path


def toy_scores(effect: float, seed: int, n_units: int) -> dict[str, dict[str, np.ndarray]]:
    units = np.random.default_rng(0).normal(size=n_units)
    noise = np.random.default_rng([seed, int(1000 * (effect + 10))]).normal(size=(4, n_units)) / 4
    return {
        "hit": {"news": effect + units + noise[0], "law": 2 + effect + units[:7] + noise[1, :7]},
        "rank": {"news": effect + units + noise[2]},
        "loss": {"news": -effect + units + noise[3]},
    }


def odd_scores(kind: str) -> object:
    """Scores that must be refused."""
    good = toy_scores(0.0, 0, 20)
    return {
        "nan": good | {"loss": {"news": np.full(20, np.nan)}},
        "unknown metric": good | {"bleu": {"news": np.zeros(20)}},
        "combined metric": good | {"score": {"news": np.zeros(20)}},
        "other task": good | {"loss": {"sports": np.zeros(20)}},
        "other length": good | {"loss": {"news": np.zeros(19)}},
        "missing metric": {"hit": good["hit"], "rank": good["rank"]},
        "two dimensions": good | {"loss": {"news": np.zeros((2, 10))}},
        "strings": good | {"loss": {"news": ["high", "low"]}},
        "nothing": {},
    }[kind]


def runs(log: Path) -> Counter[str]:
    """How often each trial was begun, by its label; `prepare` too."""
    return Counter(path.name.rsplit(".", 2)[0] for path in log.iterdir() if path.name != "mended")


def statistics(results: Mapping[str, object]) -> dict[str, object]:
    """The part of results that must not depend on how the trials came about."""
    designs = [
        {
            "name": design["name"],
            "metrics": design["metrics"],
            "labels": design["cost"].get("labels_used"),
            "artifact": design["artifact"],
        }
        for design in results["designs"]
    ]
    return {
        "designs": designs,
        "ranks": results["ranks"],
        "winner": results["winner"],
        "metrics": results["metrics"],
        "failures": [(f["design"], f["seed"], f["error"]) for f in results["failures"]],
    }
