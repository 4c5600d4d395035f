"""nanoGPT's own train.py, judged by `gptlab judge` through a command: ideas whose answer is known.

python benchmarks/judge_nanogpt.py --nanogpt PATH [--text FILE] [--lab DIR] [--updates 300]

PATH is a checkout, of which a copy is changed in one place: its seed, fixed at 1337, is taken from GPTLAB_SEED. The
recipe is the one of its README for a CPU (4 blocks, 128 wide), of fewer updates; what evaluates is in train.py, so that
an idea may change model.py and the configuration alone. FILE is the text, where the checkout's data/shakespeare_char
has no input.txt. The same command resumes a lab. Writes benchmarks/results/measured.json.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from figures import keep
from judge_night import ANSWER, judged
from time_to_loss import NEEDED, RECIPE

from gptlab.files import read_text, write_whole

ROOT = Path(__file__).parents[1]
CONFIG = RECIPE[0]
SEED = ("torch.manual_seed(1337 + seed_offset)", "torch.manual_seed(int(os.environ['GPTLAB_SEED']) + seed_offset)")


class Idea(NamedTuple):
    """expected: the judge's verdict; edits: (old text, new text) in a file; more: of another file."""

    name: str
    expected: str
    why: str
    file: str
    edits: tuple[tuple[str, str], ...]
    more: tuple[str, tuple[tuple[str, str], ...]] | None = None


RATE = "learning_rate = 1e-3", "learning_rate = 3e-3"
OPTIMIZER = "optimizer = torch.optim.AdamW(optim_groups, lr=learning_rate, betas=betas, **extra_args)"
MUON = """\
matrices = [p for n, p in param_dict.items() if p.dim() == 2 and n.startswith('transformer.h.')]
        chosen = set(map(id, matrices))
        others = [{**g, 'params': [p for p in g['params'] if id(p) not in chosen]} for g in optim_groups]
        parts = [
            torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'),
            torch.optim.AdamW(others, lr=learning_rate, betas=betas),
        ]
        class Both:
            param_groups = [group for part in parts for group in part.param_groups]
            def step(self): [part.step() for part in parts]
            def zero_grad(self, **how): [part.zero_grad(**how) for part in parts]
            def state_dict(self): return [part.state_dict() for part in parts]
        optimizer = Both()"""
INIT, WEIGHTS = "self.apply(self._init_weights)", "    def _init_weights(self, module):"
IDEAS = (
    Idea("rate_times_3", "keep", "few updates of a small model: its recipe's rate is for 5,000 of a larger one",
         CONFIG, (RATE,)),
    Idea("rate_by_10", "discard", "too slow for so few updates",
         CONFIG, (("learning_rate = 1e-3", "learning_rate = 1e-4"),)),
    Idea("other_draw", "discard", "another draw of the same first weights",
         "model.py", ((INIT, f"torch.rand(1)\n        {INIT}"),)),
    Idea("a_comment", "inactive", "the same numbers", "model.py", ((WEIGHTS, f"    # Normal.\n{WEIGHTS}"),)),
    Idea("easier_evaluation", "broken", "train.py evaluates, and may not be changed",
         "train.py", (("losses[k] = loss.item()", "losses[k] = 0.9 * loss.item()"),)),
    Idea("rate_and_warmup", "keep", "a third of so few updates is a long warm-up; bolder than rate_times_3, and tried "
         "after 8 fresh seeds had not been enough for that one",
         CONFIG, (RATE, ("warmup_iters = 100", "warmup_iters = 20"))),
    Idea("muon", "keep", "2502.16982, and better by far in docs/findings/known_answers.md; tried after those two",
         "model.py", ((OPTIMIZER, MUON),)),
    Idea("muon_rate_times_5", "keep", "Muon at the rate it has in known_answers; tried after Muon at 0.001 gained "
         "next to nothing",
         "model.py", ((OPTIMIZER, MUON),), (CONFIG, (("learning_rate = 1e-3", "learning_rate = 5e-3"),))),
)  # fmt: skip


def repository(checkout: Path, text: Path, folder: Path) -> None:
    """A git repository with nanoGPT, its seed an environment variable, and its data prepared and ignored."""
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "out*", "*.ipynb", "assets"))
    train = read_text(folder / "train.py")
    if train.count(SEED[0]) != 1:
        raise SystemExit(f"expected {SEED[0]!r} once in {checkout / 'train.py'}, found it {train.count(SEED[0])} times")
    write_whole(folder / "train.py", train.replace(*SEED))
    data = folder / "data/shakespeare_char"
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "input.txt").exists():
        shutil.copyfile(text, data / "input.txt")
    subprocess.run([sys.executable, str(data / "prepare.py")], check=True, stdout=subprocess.DEVNULL)
    write_whole(folder / ".gitignore", "*.bin\n*.pkl\ninput.txt\n__pycache__/\nout*/\n")
    git = ["git", "-C", str(folder), "-c", "user.name=judge", "-c", "user.email=judge@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "The seed is an environment variable"]):
        subprocess.run([*git, *words], check=True)


def write_lab(lab: Path, updates: int) -> None:
    """lab.toml over the repository next to it."""
    words = [sys.executable, "train.py", *RECIPE, f"--max_iters={updates}", f"--lr_decay_iters={updates}"]
    words += [f"--eval_interval={updates}", "--out_dir=out"]
    write_whole(lab / "lab.toml", "\n".join([
        "[baseline]", f'command = "OMP_NUM_THREADS=1 {" ".join(words)}"', 'path = "../nanogpt"',
        "[metric]", "pattern = 'step \\d+: train loss [\\d.]+, val loss ([\\d.]+)'",
        "[plan]", "looks = [2, 4]", "confirm = [4, 8]", "time_limit = 1200", f"jobs = {os.cpu_count() or 1}",
        "[paths]", f'allow = ["model.py", "{CONFIG}"]', 'deny = ["train.py"]', "",
    ]))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Judge them all and compare with what was expected; 1 where a verdict is another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, help="the text [input.txt of the checkout's data/shakespeare_char]")
    parser.add_argument("--lab", type=Path, default=ROOT / "log" / "judge_nanogpt" / "lab")
    parser.add_argument("--updates", type=int, default=300)
    asked = parser.parse_args(argv)
    text = asked.text or asked.nanogpt / "data/shakespeare_char/input.txt"
    for path in (text, *(asked.nanogpt / name for name in NEEDED)):
        if not path.is_file():
            parser.error(f"expected a file {path}, found none; give a checkout of nanoGPT, and --text")
    tree, began, answers = asked.lab.parent / "nanogpt", time.monotonic(), dict[str, dict[str, object]]()
    if not (asked.lab / "lab.toml").exists():
        asked.lab.mkdir(parents=True)
        repository(asked.nanogpt, text, tree)
        write_lab(asked.lab, asked.updates)
    for idea in IDEAS:
        lines = list[str]()
        for file, edits in filter(None, ((idea.file, idea.edits), idea.more)):
            before = after = read_text(tree / file)
            for old, new in edits:
                if after.count(old) != 1:
                    raise SystemExit(f"{idea.name}: expected {old!r} once in {file}, found it {after.count(old)} times")
                after = after.replace(old, new)
            lines += difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"a/{file}", f"b/{file}")
        path = asked.lab.parent / f"{idea.name}.diff"
        write_whole(path, "".join(lines))
        found = judged(path, asked.lab, None) or {}
        reason = found["reason"].replace(f"{path.parent}/", "")  # no path of this machine
        answer = {**{key: found[key] for key in ANSWER}, "reason": reason}
        answers[idea.name] = {"expected": idea.expected, "why": idea.why, **answer}
        print(f"{idea.expected:<9} {found['verdict']:<9} {idea.name}: {found['reason']}", flush=True)
    hits = sum(answer["expected"] == answer["verdict"] for answer in answers.values())
    result = {"date": date.today().isoformat(), "cores": os.cpu_count(), "updates": asked.updates, "hits": hits,
              "ideas": len(answers), "seconds": time.monotonic() - began, "answers": answers}  # fmt: skip
    if asked.updates == parser.get_default("updates"):
        keep("judge_nanogpt", result)
    print(f"{hits} of {len(answers)} as expected, {result['seconds']:,.0f} s")
    return int(hits < len(answers))


if __name__ == "__main__":
    sys.exit(main())
