"""What an experiment's trials chose, for its passports and tables. Read from its folder, nothing is chosen here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptlab.runs.choice import read_kept


@dataclass(frozen=True)
class Tuning:
    """on: whether the experiment has [tune]; kept: the content of its tuning.json, empty where that is missing."""

    on: bool = False
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> Mapping[str, Mapping[str, Any]]:
        return self.kept.get("arms", {})

    def of_arm(self, arm: str) -> dict[str, Any]:
        """For the arm's passport. trials: how many its options were chosen of, None where that is not known."""
        found = self.arms.get(arm, {})
        return {"tuned": self.on, "trials": self.kept.get("trials") if found else None, "follows": found.get("follows")}

    def as_json(self) -> dict[str, Any] | None:
        """For the comparison's result: None without [tune]."""
        return {"trials": None, "seeds": None, "arms": {}, **self.kept} if self.on else None


def read_tuning(folder: Path, table: Mapping[str, Any]) -> Tuning:
    """The tuning of the experiment in `folder`, whose file holds `table`; raises ConfigError for a damaged one."""
    return Tuning(True, read_kept(folder) or {}) if "tune" in table else Tuning()
