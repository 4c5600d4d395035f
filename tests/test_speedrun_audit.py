"""The audit of a public contest: how runs are read from a checkout, and its statistics against SciPy's."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scripts import load_script

audit = load_script("tools/speedrun_audit.py")
LOGS = {
    "a/one.txt": "print(f'step:{step}/20 val_loss:{x}')\nstep:10/20 val_loss:3.4 t:1\nstep:20/20 val_loss:3.28 t:1\n",
    "a/two.txt": "".join(f"step:{s}/20 val_loss:{x} t:1\n" for x in (3.271, 3.272) for s in (10, 20)),
    "b/one.txt": "step:20/30 val_loss:3.29 val_ema_loss:3.27 t:1\nstep:30/30 val_loss:3.1 val_ema_loss:3.1 t:1\n",
    "c/README.md": "| seed | step 10 | step 20 |\n| -: | -: | -: |\n| 0 | 3.3 | 3.2 |\n| 1 | 3.4 | 3.1 |\n| mean |\n",
}


def test_runs_are_read_from_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in LOGS.items():
        (tmp_path / audit.TRACK / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / audit.TRACK / name).write_text(text)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    records = [audit.Record(k, "x", 20, logs, n) for k, (logs, n) in enumerate((("a/*", 3), ("b/*", 1), ("c/*", 2)))]
    monkeypatch.setattr(audit, "RECORDS", records)
    rows = audit.extract(tmp_path)
    assert [(row["record"], row["val_loss"]) for row in rows] == [
        (0, "3.28000"), (0, "3.27100"), (0, "3.27200"), (1, "3.27000"), (2, "3.20000"), (2, "3.10000")
    ]  # fmt: skip
    monkeypatch.setattr(audit, "RECORDS", [records[0]._replace(n=4)])
    with pytest.raises(SystemExit, match="#0: expected 4 runs"):
        audit.extract(tmp_path)


def test_pairs_agree_with_scipy_and_the_tracks_arithmetic() -> None:
    result = audit.audit()
    for old, new in pairwise(audit.RECORDS[2:]):
        pair, values = result["arms"][str(new.number)], [audit.steps_to_target(r.number) for r in (new, old)]
        test = stats.ttest_ind(*values, equal_var=False)
        assert pair["p"] == pytest.approx(test.pvalue)
        assert pair["interval"] == pytest.approx(list(test.confidence_interval()))
        means = [np.mean(one) for one in values]
        assert pair["margin"] == pytest.approx((means[1] - means[0]) * audit.SLOPE / np.sqrt(1 / new.n + 1 / old.n))
    shift = audit.detectable(1.0, 8, 16) / np.sqrt(1 / 8 + 1 / 16)
    bound = stats.t.ppf(0.975, 22)
    assert stats.nct.sf(bound, 22, shift) + stats.nct.cdf(-bound, 22, shift) == pytest.approx(audit.POWER, abs=2e-3)
    found = audit.needed(-1.0, 1.0)
    powers = [stats.nct.sf(stats.t.ppf(0.975, 2 * n - 2), 2 * n - 2, np.sqrt(n / 2)) for n in (found - 1, found)]
    assert powers[0] < audit.POWER <= powers[1] + 2e-3
