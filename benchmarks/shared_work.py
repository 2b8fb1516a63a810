"""Work that designs share is done once: a cold study against one pass plus the heads.

Measured in one run, on the default data and base model with causal attention: one bare pass of
hidden states over all texts (nothing kept); then a study of k frozen designs and s seeds from an
empty cache. The heads' share is the sum of the study's own trial times. The target is a ratio of at
most 1.3 between the study and (pass + heads); a harness that recomputes states per trial would pay
k * s passes, which is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from bakeoff.data import embedded_default
from bakeoff.embedding import EmbeddingProblem, default_designs
from bakeoff.models import FeatureCache, hidden_states
from bakeoff.study import Designs, Study

NAMES = ("last token, causal", "mean, causal", "best layer, centred", "scalar mix of layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["smoke", "demo", "full"], default="smoke")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = embedded_default(options.size)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder) / "cache")
        problem = EmbeddingProblem(data, max_length=64, steps=20, batch_size=32, cache=cache)
        base = problem.base
        list(hidden_states(base, data.texts()[:32], max_length=64))  # warm-up
        began = time.perf_counter()
        for _ in hidden_states(base, data.texts(), max_length=64):
            pass
        one_pass = time.perf_counter() - began
        designs = Designs([design for design in default_designs() if design.name in NAMES])
        study = Study(
            problem,
            designs,
            reference="mean, causal",
            seeds=options.seeds,
            directory=Path(folder) / "study",
        )
        began = time.perf_counter()
        results = study.run()
        whole = time.perf_counter() - began
    heads = sum(
        design["cost"]["wall_seconds"]["mean"] * options.seeds for design in results["designs"]
    )
    found = {
        "texts": len(data.texts()),
        "trials": len(designs) * options.seeds,
        "pass_seconds": one_pass,
        "heads_seconds": heads,
        "study_seconds": whole,
        "ratio": whole / (one_pass + heads),
        "ratio_without_sharing": (len(designs) * options.seeds * one_pass + heads) / whole,
    }
    if options.json:
        print(json.dumps(found))
        return
    print(
        f"shared work: {found['trials']} trials on {found['texts']} texts in {whole:.1f} s, "
        f"{found['ratio']:.2f} x (one pass {one_pass:.1f} s + heads {heads:.1f} s); target 1.3; "
        f"recomputing states per trial would take {found['ratio_without_sharing']:.1f} x as long"
    )


if __name__ == "__main__":
    main()
