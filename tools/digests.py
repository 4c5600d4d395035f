"""Do these revisions train the same numbers, bit for bit? For changes of structure, which must not change any.

    python tools/digests.py FILE              before a change: write every arm's digest and figures
    python tools/digests.py FILE --compare    after it: make them again and name every arm that differs

An arm is a few updates of a tiny run with explicit options, started as a user starts it, so that the file outlives any
change inside the package. Digests cover weights, moments and data cursor; figures are the loss rows without times.
They are this machine's: processors round differently, so the file is never committed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptlab.cli.main import main as gptlab

TINY = (
    "--seed 7 --steps 8 --n_layer 3 --n_embd 64 --n_head 4 --block_size 64 --batch_size 4 --total_batch_tokens 512 "
    "--warmup_steps 2 --dose_every 3 --noise_every 5 --eval_every 4 --eval_tokens 4096 --sample_every 0 --threads 1 "
    "--device cpu --compile off --learning_rate 0.01 --resume never"
)
CONFIDENCE = "--signal.name confidence --signal.weight 0.3 "
ARMS = {
    "baseline": "",
    "confidence": CONFIDENCE,
    "confidence live": CONFIDENCE + "--signal.evaluator live",
    "confidence local": CONFIDENCE + "--signal.reach local --signal.embeddings off",
    "gated": "--signal.name gated_confidence --signal.threshold 0.05",
    "advantage": "--signal.name advantage",
    "information_gain": "--signal.name information_gain --signal.evaluator live",
    "self_distillation": "--signal.name self_distillation --signal.layers 1",
    "brier": "--signal.name brier --signal.start 2 --signal.anneal 4",
    "placebo": CONFIDENCE + "--signal.control placebo",
    "placebo live": CONFIDENCE + "--signal.control placebo --signal.evaluator live",
    "shuffled": CONFIDENCE + "--signal.control shuffled --signal.evaluator live",
    "flipped": "--signal.name deep_supervision --signal.control flipped --signal.flip 0.5",
    "flipped to argmax": "--signal.name target_confidence --signal.control flipped --signal.flip_to argmax",
    "target_flip": "--target_flip 0.2",
    "target_flip to argmax": CONFIDENCE + "--target_flip 0.2 --target_flip_to argmax",
    "gradient_noise": "--gradient_noise 0.5 --gradient_bias 0.1",
    "gradient_noise with signal": CONFIDENCE + "--gradient_noise 0.5",
    "rotate": CONFIDENCE + "--signal.layers rotate",
    "positions": CONFIDENCE + "--signal.positions 0.25",
    "dose held": CONFIDENCE + "--signal.dose 0.2",
    "two signals": '{"signal": [{"name": "confidence"}, {"name": "brier", "control": "placebo", "dose": 0.3}]}',
    "share_blocks": CONFIDENCE + "--share_blocks on",
    "muon": CONFIDENCE + "--optimizer muon",
    "recomputed": CONFIDENCE + "--activation_checkpointing on",
    "deterministic": CONFIDENCE + "--deterministic on --signal.control placebo",
    "wsd, clipped": "--schedule wsd --grad_clip 0.05",
}
EVERYWHERE = ("baseline", "confidence", "confidence live", "placebo", "rotate", "dose held", "share_blocks", "muon")
"""Arms that are trained in bf16 too."""
RANKS = ("confidence", "placebo live", "deterministic", "gradient_noise with signal")
"""Arms that are trained by two processes too, and with sharded blocks where that is possible."""
TIMES = ("tokens_per_second", "mfu", "seconds")


def options_of(arm: str, dtype: str, folder: Path) -> list[str]:
    """An arm's options; one that takes several signals has them in a file, the only place they can be."""
    words = [*TINY.split(), "--dtype", dtype, "--out", str(folder / "run")]
    given = ARMS[arm]
    if not given.startswith("{"):
        return [*words, *given.split()]
    tables = json.loads(given)["signal"]
    toml = "".join("[[signal]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in t.items()) for t in tables)
    (folder / "signals.toml").write_text(toml, encoding="utf-8")
    return [*words, "--config", str(folder / "signals.toml")]


def outcome(arm: str, dtype: str, *, ranks: int = 1, parallel: str = "ddp") -> dict[str, Any]:
    """The digest of a finished run, and its loss rows."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = ["train", *options_of(arm, dtype, folder), "--parallel", parallel]
        words += ["--noise_every", "0"] if parallel == "fsdp" else []
        if ranks == 1:
            quietly(words)
        else:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            program = str(Path(__file__).parents[1] / "train_gpt2.py")
            subprocess.run([*launcher, program, *words[1:]], check=True, capture_output=True)
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] in ("train", "val")]
        figures = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        return {**json.loads(quietly(["digest", str(folder / "run"), "--json"])), "rows": figures}


def quietly(words: list[str]) -> str:
    """Run a command of ours in this process; what it prints."""
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(shown):
        code = gptlab(words)
    if code:
        raise SystemExit(f"gptlab {' '.join(words)}: exit {code}\n{shown.getvalue()}")
    return said.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true", help="compare with FILE instead of writing it")
    parser.add_argument("--ranks", action="store_true", help="also the arms of two processes, which take a minute")
    options = parser.parse_args()
    cases: dict[str, tuple[str, dict[str, Any]]] = {f"{arm}, fp32": (arm, {"dtype": "fp32"}) for arm in ARMS}
    cases |= {f"{arm}, bf16": (arm, {"dtype": "bf16"}) for arm in EVERYWHERE}
    if options.ranks:
        for arm in RANKS:
            cases[f"{arm}, two ranks"] = (arm, {"dtype": "fp32", "ranks": 2})
            if "deterministic" not in ARMS[arm]:
                cases[f"{arm}, fsdp"] = (arm, {"dtype": "fp32", "ranks": 2, "parallel": "fsdp"})
    kept = json.loads(options.file.read_text(encoding="utf-8")) if options.compare else {}
    found, differ = {}, []
    for name, (arm, how) in cases.items():
        found[name] = outcome(arm, **how)
        if options.compare and found[name] != kept.get(name):
            differ.append(name)
            print(f"differs: {name}", flush=True)
    if options.compare:
        print(f"{len(found) - len(differ)} of {len(found)} arms are equal")
        return bool(differ)
    options.file.write_text(json.dumps(found), encoding="utf-8")
    print(f"{len(found)} arms written, {len({case['sha256'] for case in found.values()})} digests differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
