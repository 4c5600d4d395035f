"""A night of `gptlab judge` on the tiny preset: thirty ideas whose truth is known, unattended, killed now and then.

python benchmarks/judge_night.py [--lab DIR] [--seed 1] [--kills 20]   hours; the same command resumes it
python benchmarks/judge_night.py --quick                               minutes: a few ideas, a model of two blocks
python benchmarks/judge_night.py --smoke                               every idea for three updates: does it run?
python benchmarks/judge_night.py --collect                             the result of what its ledger holds so far

IDEAS says what is predicted of each and why, before the night. It writes them as files into the lab, judges them in an
order drawn from the seed, kills the judge at random moments (SIGKILL, whole process group) and starts it again. What
the ledger then holds is compared with the predictions: `false_keeps` may be 0 or 1 in a night at 5%. The result is
night.json in the lab, and its report.html; of a whole night also benchmarks/results/measured.json.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from figures import keep

from gptlab.files import parse_json, read_text, write_json, write_whole
from gptlab.judge.lab import read_lab
from gptlab.judge.procedure import Judge
from gptlab.judge.trial import Subject
from gptlab.training.presets import preset_options

ROOT = Path(__file__).parents[1]
PRESET = "shakespeare-tiny"
QUICK: dict[str, Any] = {
    "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "batch_size": 4, "total_batch_tokens": 256, "steps": 24,
    "warmup_steps": 3, "eval_tokens": 512, "checkpoint_every": 5, "eval_every": 100000, "sample_every": 0,
}  # fmt: skip
GPT, STEP, OPTIMIZER = (f"gptlab/{name}.py" for name in ("model/gpt", "training/step", "training/optimizer"))
BATCHES = "gptlab/data/batches.py"


ANSWER = ("verdict", "reason", "difference", "interval", "n", "seconds", "level_left")
"""What night.json keeps of the judge's answer."""


@dataclass(frozen=True)
class Idea:
    """predicted: "null", "better" or "worse"; edits: (file, old text, new text) of a diff; options: of an arm."""

    name: str
    predicted: str
    why: str
    edits: tuple[tuple[str, str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: str = ""


def _null(name: str, why: str, *edits: tuple[str, str, str], **options: Any) -> Idea:
    return Idea(name, "null", why, edits, {key.replace("__", "."): value for key, value in options.items()})


NO_EFFECT, OTHER_DRAW, TOO_SMALL = (
    "the same numbers: inactive", "another draw of the same distribution", "far below the spread of seeds"
)  # fmt: skip
INIT, ORDER = 'torch_generator("init", seed, name)', "= corpus, block_size, vocab_size, seed"
EPSILON = "betas=betas, eps=1e-8,"
KNOWN = "experiments/known_answers.toml"


def ideas(steps: int, rate: float, batch: int, sequences: int) -> list[Idea]:
    """All of them, for a recipe of so many updates, at this rate, of so many tokens and sequences."""
    return [
        _null("renamed_qkv", NO_EFFECT, (GPT, "q, k, v = (part", "query, key, value = (part"),
              (GPT, "attention(q, k, v, is", "attention(query, key, value, is")),
        _null("renamed_peak", NO_EFFECT, (STEP, "peak, low = config", "highest, lowest = config"),
              (STEP, "return peak * (step + 1)", "return highest * (step + 1)"),
              (STEP, "return low + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (peak - low)",
               "return lowest + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (highest - lowest)"),
              (STEP, "return peak + min(1.0, max(0.0, falling)) * (low - peak)\n    return peak",
               "return highest + min(1.0, max(0.0, falling)) * (lowest - highest)\n    return highest")),
        _null("a_comment", NO_EFFECT, (OPTIMIZER, "    if not matrices:", "    # AdamW alone.\n    if not matrices:")),
        _null("a_temporary", NO_EFFECT, (GPT, "added = self.mlp(self.ln_2(x))",
                                         "hidden = self.ln_2(x)\n        added = self.mlp(hidden)")),
        _null("log_less", NO_EFFECT, log_every=50),
        _null("validate_more", NO_EFFECT, eval_every=max(1, steps // 4)),
        _null("other_init", OTHER_DRAW, (GPT, INIT, INIT.replace("init", "initial"))),
        _null("other_init_again", OTHER_DRAW, (GPT, INIT, INIT.replace("seed", "seed + 5000"))),
        _null("init_by_length", OTHER_DRAW, (GPT, INIT, INIT.replace("seed", "len(name), seed"))),
        _null("other_order", OTHER_DRAW, (BATCHES, ORDER, f"{ORDER} + 5000")),
        _null("other_order_again", OTHER_DRAW, (BATCHES, ORDER, ORDER.replace("seed", "7 * seed + 1"))),
        _null("epsilon_1e_9", TOO_SMALL, (OPTIMIZER, EPSILON, EPSILON.replace("1e-8", "1e-9"))),
        _null("epsilon_3e_8", TOO_SMALL, (OPTIMIZER, EPSILON, EPSILON.replace("1e-8", "3e-8"))),
        _null("norm_epsilon", TOO_SMALL, (GPT, "ln_2 = nn.LayerNorm(config.n_embd)",
                                           "ln_2 = nn.LayerNorm(config.n_embd, eps=2e-5)")),
        _null("rate_up_by_a_thousandth", TOO_SMALL, learning_rate=rate * 1.001),
        _null("rate_down_by_a_thousandth", TOO_SMALL, learning_rate=rate * 0.999),
        _null("decay_up_by_a_thousandth", TOO_SMALL, weight_decay=0.1001),
        _null("clip_at_1_001", TOO_SMALL, grad_clip=1.001),
        _null("beta2_0_9901", TOO_SMALL, beta2=0.9901),
        _null("signal_of_weight_0", NO_EFFECT, signal__name="confidence", signal__weight=0.0),
        Idea("muon", "better", f"2502.16982; {KNOWN}", options={"optimizer": "muon"}),
        Idea("relu_squared", "better", f"2109.08668; {KNOWN}", patch="relu_squared.diff"),
        Idea("more_tokens", "better", f"an eighth more in every update; {KNOWN}",
             options={"total_batch_tokens": batch * 9 // 8, "batch_size": sequences * 9 // 8}),
        Idea("longer", "better", "a quarter more updates of the same tokens", options={"steps": steps * 5 // 4}),
        Idea("rate_times_3", "worse", f"the rate was tuned; {KNOWN}", options={"learning_rate": 3 * rate}),
        Idea("no_warmup", "worse", KNOWN, options={"warmup_steps": 0}),
        Idea("untied_head", "worse", f"a second table of the bytes to learn; {KNOWN}", patch="untied_head.diff"),
        Idea("multi_token", "worse", f"2404.19737: small models lose by it; {KNOWN}",
             options={"signal.name": "multi_token_prediction", "signal.weight": 0.3}),
        Idea("information_gain", "worse", "docs/findings/supervised.md",
             options={"signal.name": "information_gain", "signal.evaluator": "live"}),
        Idea("half_as_long", "worse", "half of the updates", options={"steps": steps // 2}),
    ]  # fmt: skip


def write_idea(idea: Idea, folder: Path) -> Path:
    """Its file in `folder`, a diff against the package in use or an arm's TOML; the same bytes at every call."""
    if idea.patch or not idea.options:
        path = folder / f"{idea.name}.diff"
        text = read_text(ROOT / "experiments" / "patches" / idea.patch) if idea.patch else _diff(idea)
    else:
        path = folder / f"{idea.name}.toml"
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in idea.options.items())
    write_whole(path, text)
    return path


def _diff(idea: Idea) -> str:
    before = {name: read_text(ROOT / name) for name, _, _ in idea.edits}
    after = dict(before)
    for name, old, new in idea.edits:
        if after[name].count(old) != 1:
            raise SystemExit(f"{idea.name}: expected {old!r} once in {name}, found it {after[name].count(old)} times")
        after[name] = after[name].replace(old, new)
    return "".join(
        line
        for name in before
        for line in difflib.unified_diff(
            before[name].splitlines(True), after[name].splitlines(True), f"a/{name}", f"b/{name}"
        )
    )


def write_lab(folder: Path, options: Mapping[str, Any], looks: Sequence[int], confirm: Sequence[int]) -> None:
    """A lab of the preset with these options, unless it is there already."""
    if (folder / "lab.toml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["[baseline]", f'preset = "{PRESET}"', "[plan]", f"looks = {list(looks)}", f"confirm = {list(confirm)}"]
    lines += [f"jobs = {os.cpu_count() or 1}"]
    lines += ["[paths]", 'allow = ["gptlab/**"]', 'deny = ["gptlab/training/evaluate.py"]']
    lines += ["[options]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
    write_whole(folder / "lab.toml", "\n".join(lines) + "\n")


def judged(idea: Path, lab: Path, until: float | None) -> dict[str, Any] | None:
    """The judge's answer, or None where it was killed after `until` seconds, with all that it had started."""
    words = [sys.executable, "-m", "gptlab", "judge", str(idea), "--lab", str(lab), "--json"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, cwd=ROOT
    )
    try:
        output, _ = process.communicate(timeout=until)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    found = json.loads(output)
    if "verdict" not in found:
        raise SystemExit(f"{idea.name}: the judge ended with exit code {process.returncode}: {found}")
    return found


def night(chosen: Sequence[Idea], lab: Path, seed: int, kills: int) -> dict[str, Any]:
    """Judge them all, with so many kills over the whole night; the result, which is in night.json too."""
    choose, began, killed, answers = random.Random(seed), time.monotonic(), 0, dict[str, dict[str, Any]]()
    order = choose.sample(chosen, len(chosen))
    targets = [choose.randrange(len(order)) for _ in range(kills)]
    (lab / "ideas").mkdir(exist_ok=True)
    for place, idea in enumerate(order):
        path = write_idea(idea, lab / "ideas")
        for _ in range(targets.count(place)):
            found = judged(path, lab, choose.expovariate(1 / 60))
            killed += found is None
        while (found := judged(path, lab, None)) is None:
            pass
        answers[idea.name] = {
            "predicted": idea.predicted, "why": idea.why,
            **{key: found[key] for key in ANSWER},
        }  # fmt: skip
        print(f"{place + 1:>3}/{len(order)}  {idea.predicted:<7} {found['verdict']:<10} {idea.name}", flush=True)
        write_json(lab / "night.json", summary(answers, killed, time.monotonic() - began))
    return collect(chosen, lab)


def collect(chosen: Sequence[Idea], lab: Path) -> dict[str, Any]:
    """The result of all ideas in the lab's ledger, written as night.json too; kills are those of the night's own.

    Raises DataError where a line of the ledger is not as it was written.
    """
    from gptlab.judge.report import write_report

    judge = Judge(read_lab(lab))
    tries, journal = judge.ledger.read()
    last = {line["name"].rpartition(".")[0]: line for line in tries}
    answers = {
        idea.name: {"predicted": idea.predicted, "why": idea.why, **{key: last[idea.name][key] for key in ANSWER}}
        for idea in chosen
        if idea.name in last
    }
    night = parse_json(read_text(lab / "night.json"))
    began, ended = (datetime.fromisoformat(line["time"]) for line in (journal[0], tries[-1]))
    result = summary(answers, night["kills"], night["seconds"]) | {
        "hours": (ended - began).total_seconds() / 3600, "of": len(chosen),
    }  # fmt: skip
    write_json(lab / "night.json", result)
    write_report(judge)
    return result


def summary(answers: Mapping[str, Mapping[str, Any]], killed: int, seconds: float) -> dict[str, Any]:
    """Keeps against the predictions, and how many ideas of each prediction had each verdict.

    seconds: since this start, not of earlier ones; `night` adds the hours from the lab's first line to its last.
    """
    kept = [answer["predicted"] for answer in answers.values() if answer["verdict"] == "keep"]
    verdicts = Counter(f"{answer['predicted']}_{answer['verdict']}" for answer in answers.values())
    better = sum(answer["predicted"] == "better" for answer in answers.values())
    return {
        "ideas": len(answers), "false_keeps": len(kept) - kept.count("better"), "found": kept.count("better"),
        "better": better, "kills": killed, "seconds": seconds,
        "seconds_of_runs": sum(answer["seconds"] for answer in answers.values()),
        "verdicts": dict(sorted(verdicts.items())), "answers": dict(answers),
    }  # fmt: skip


def smoke(chosen: Sequence[Idea], lab: Path) -> dict[str, str]:
    """{idea: "ok", or how a run of it ended}; each is forked from a process that has imported PyTorch."""
    import torch

    assert torch.get_num_threads() > 0
    judge = Judge(read_lab(lab))
    (lab / "ideas").mkdir(exist_ok=True)
    found = {}
    for idea in chosen:
        subject = judge.baseline.changed_by(write_idea(idea, lab / "ideas"), judge.lab)
        with tempfile.TemporaryDirectory() as scratch:
            if not (child := os.fork()):
                _train(subject, Path(scratch))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output = read_text(Path(scratch, "output.txt")).strip().splitlines() or [""]
        found[idea.name] = "ok" if code == 0 else f"exit code {code}: {output[-1]}"
        print(f"{idea.name}: {found[idea.name]}", flush=True)
    return found


def _train(subject: Subject, folder: Path) -> NoReturn:
    """Train with a subject's code and options in this process, which ends with it."""
    output = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        subject.write(folder / "code")
        sys.path.insert(0, str(folder / "code"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "gptlab"]:
            del sys.modules[name]
        from gptlab.cli.main import main as gptlab

        words = [f"--{key}={value}" for key, value in {"preset": PRESET, "threads": 1, **subject.options}.items()]
        code = gptlab(["train", *words, "--out", str(folder / "run")])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lab", type=Path, default=ROOT / "log" / "judge_night")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--data", help="a prepared corpus in place of the preset's")
    parser.add_argument("--quick", action="store_true", help="every sixth idea, a small model, two kills")
    parser.add_argument("--collect", action="store_true", help="judge nothing more: the result as the ledger has it")
    parser.add_argument("--smoke", action="store_true", help="run every idea for three updates")
    asked = parser.parse_args()
    small = asked.quick or asked.smoke
    options = {**(QUICK if small else {"sample_every": 0, "eval_every": 100000})}
    options |= {"data": asked.data} if asked.data else {}
    options |= {"steps": 4} if asked.smoke else {}
    write_lab(asked.lab, options, [2] if small else [2, 4, 8], [2, 3] if small else [4, 8])
    used = {"learning_rate": 0.005, "batch_size": 16, "total_batch_tokens": 1024, "steps": 1300}
    used |= preset_options(PRESET, options) | options
    chosen = ideas(used["steps"], used["learning_rate"], used["total_batch_tokens"], used["batch_size"])
    if asked.smoke:
        raise SystemExit(any(one != "ok" for one in smoke(chosen, asked.lab).values()))
    chosen = chosen[::6] if asked.quick else chosen
    if asked.collect:
        result = collect(chosen, asked.lab)
    else:
        result = night(chosen, asked.lab, asked.seed, 2 if asked.quick else asked.kills)
    if not asked.quick:
        keep("judge_night", result)
    print(json.dumps({key: value for key, value in result.items() if key != "answers"}, indent=1))


if __name__ == "__main__":
    main()
