"""Regenerate docs/ledger.md and the README's table from the recorded claims.

With ``--check`` nothing is written and the exit code is 1 if either is out of date.
"""

import re
import sys
from pathlib import Path

from bakeoff.claims.claim import recorded_results
from bakeoff.claims.ledger import ledger_markdown

ROOT = Path(__file__).parent.parent
INTRODUCTION = """# The ledger

Each row is a sentence from a paper, run as a study by `bakeoff claim SLUG --size laptop --record`
and judged by the same statistics as any comparison. *Fails* and *undecided* are results, too: they
say what happened with this base model, this data and this budget, and nothing about others. The
table is generated from `src/bakeoff/claims/results/`.

"""


def main() -> int:
    """Write or check both places."""
    results = recorded_results()
    table = ledger_markdown(results)
    # A reader of the README wants each method's central claim; the rest is a click away.
    central = ledger_markdown([{**result, "claims": result["claims"][:1]} for result in results])
    readme = ROOT / "README.md"
    marked = re.compile(r"(<!-- ledger -->\n).*?(<!-- /ledger -->)", re.DOTALL)
    wanted = {
        ROOT / "docs" / "ledger.md": INTRODUCTION + table,
        readme: marked.sub(lambda found: found[1] + central + found[2], readme.read_text("utf-8")),
    }
    stale = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run `make ledger`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
