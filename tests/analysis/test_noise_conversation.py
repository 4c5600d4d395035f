"""The premise of N3: areas over all pairs, replies by full passes without any cache, and what draws depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from gptlab.analysis.noise import ALTERNATIVES, NoiseConfig
from gptlab.analysis.noise import conversation as module
from gptlab.analysis.noise.conversation import _word_beginnings, auc, bounded, conversation, shuffled, utterances
from gptlab.analysis.noise.measure import Subject
from gptlab.analysis.statistics import jackknife
from gptlab.cli.main import main
from gptlab.cli.noise import _subject
from gptlab.data.tokenizers import get_tokenizer
from gptlab.errors import ConfigError
from gptlab.runs.init_weights import any_state

Capture = pytest.CaptureFixture[str]
Words = Callable[..., list[str]]


def by_all_pairs(x: np.ndarray, y: np.ndarray) -> float:
    return sum((a > b) + 0.5 * (a == b) for a in x for b in y) / len(x) / len(y)


@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_the_area_is_that_of_all_pairs_and_a_window_is_left_out_with_both(n: int, levels: int) -> None:
    generator = np.random.default_rng(n * levels)
    x, y = generator.integers(levels, size=(2, n)) / 7
    found = auc(x, y)
    assert found.value == pytest.approx(by_all_pairs(x, y), abs=1e-14)
    left_out = [by_all_pairs(np.delete(x, i), np.delete(y, i)) for i in range(n)]
    assert found.left_out.tolist() == pytest.approx(left_out, abs=1e-13)
    low, high = jackknife(by_all_pairs(x, y), left_out)
    assert bounded(found) == pytest.approx([max(low, 0), min(high, 1)], abs=1e-12)


def test_the_interval_covers_the_true_area_of_pairs_that_hang_together() -> None:
    """x = s + e + 0.5, y = s + f of normal numbers: P(x > y') = Phi(0.5 / sqrt(2·(1 + 1)))."""
    from scipy.stats import norm

    generator = np.random.default_rng(3)
    true, missed = norm.cdf(0.5 / 2), 0
    for _ in range(400):
        s, e, f = generator.standard_normal((3, 60))
        low, high = auc(s + e + 0.5, s + f).interval
        missed += not low <= true <= high
    assert 6 <= missed <= 36  # of 400, 5% are 20


@pytest.fixture(scope="module")
def subject(finished_run: Path) -> Subject:
    state, config = any_state(str(finished_run))
    options = NoiseConfig(device="cpu", threads=1, eval_tokens=16 * 11)
    made = _subject(str(finished_run), state, config, options, print)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # a model that is sure of different things
        for p in state.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return made


def asked(subject: Subject, **options: Any) -> dict[str, Any]:
    return conversation(subject, NoiseConfig(**{"say": 4, "batch_size": 4, **options}))


@torch.no_grad()
def test_replies_are_those_of_full_passes(subject: Subject) -> None:
    """Every window alone, nothing cached: the text, what stands elsewhere, the same shuffled, random tokens."""
    found = asked(subject)
    model, n = subject.state.model, len(subject.validation)
    assert (found["windows"], found["replies"], found["context"], found["shuffled"]) == (11, [1, 4], 9, "words")
    tokens = subject.validation.rows(0, n)[0]
    said = utterances(tokens[:, 9:13].numpy(), _word_beginnings(subject), 256, subject.windows.seed)
    sure = {}
    for name, of_kind in said.items():
        sure[name] = np.zeros((n, 4, 2))
        for row in range(n):
            read = torch.cat([tokens[row, :9], torch.from_numpy(of_kind[row])])
            for place in range(4):
                states = model.hidden_states(read[None])[1:]
                logits = [model.read(h)[0, -1] for h in states]
                sure[name][row, place] = [float(z.softmax(0).max()) for z in logits]
                read = torch.cat([read, logits[-1].argmax()[None]])
    for name in ("elsewhere", "shuffled", "random"):
        for length in (1, 4):
            for block in (0, 1):
                x, y = (sure[kind][:, :length, block].mean(1) for kind in ("text", name))
                one = found["against"][name]["blocks"][block][str(length)]
                assert one["auc"] == pytest.approx(by_all_pairs(x, y), abs=1e-9)
        assert found["against"][name]["total"] == found["against"][name]["blocks"][-1]
    for name, mean in found["confidence"].items():
        if name != "sample":
            assert mean["4"] == pytest.approx(sure[name][:, :, 1].mean(), rel=1e-5)


def test_batches_change_nothing_and_the_seed_decides(subject: Subject) -> None:
    whole = asked(subject, batch_size=16)
    for size in (1, 3):
        other = asked(subject, batch_size=size)
        for name in whole["confidence"]:
            assert other["confidence"][name] == pytest.approx(whole["confidence"][name], rel=1e-5)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  # no global generator counts
    assert asked(subject, batch_size=16) == whole
    subject.windows.seed += 1
    try:
        other = asked(subject, batch_size=16)["confidence"]
    finally:
        subject.windows.seed -= 1
    assert other["text"] == whole["confidence"]["text"]
    assert all(other[name] != whole["confidence"][name] for name in ("sample", "random"))


@torch.no_grad()
def test_samples_come_as_often_as_the_model_says(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """One context for all windows, two tokens: chi-square of the first over those that are not rare."""
    windows = subject.validation

    class Alike:
        block_size = 16

        def __len__(self) -> int:
            return 2000

        def rows(self, first: int, count: int) -> Any:
            return (windows.rows(0, 1)[0].expand(count, -1),) * 2

    drawn: list[np.ndarray] = []
    real = module._sample
    monkeypatch.setattr(module, "_sample", lambda *given: drawn.append(real(*given)) or drawn[-1])
    same = Subject(subject.state, subject.config, subject.windows, cast(Any, Alike()), subject.placement)
    conversation(same, NoiseConfig(say=2, batch_size=500))
    first = np.concatenate(drawn)[:, 0]
    context = 16 - 2 - 4 + 1
    p = subject.state.model(windows.rows(0, 1)[0][:, :context])[0, -1].double().softmax(0).numpy()
    common = p * 2000 > 5
    counts = np.bincount(first, minlength=256)
    expected = np.append(p[common], p[~common].sum()) * 2000
    seen = np.append(counts[common], counts[~common].sum())
    chi, freedom = ((seen - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom)
    assert len(set(first.tolist())) > 3


def test_what_is_said_instead() -> None:
    bytes_ = get_tokenizer("bytes")
    texts = [" be or not to be", "thequickbrownfox", "a  b  c  d  e  f"]
    text = np.array([list(line.encode()) for line in texts] * 4)
    begins = np.array([bytes_.decode([token])[:1].isspace() for token in range(256)])
    said = utterances(text, begins, 256, seed=1)
    assert (said["text"] == text).all()
    for before, after in zip(text, said["shuffled"], strict=True):
        assert sorted(before) == sorted(after)
        assert (before != after).any()
        assert before[-1] == after[-1]
    for row in said["shuffled"][::3]:
        words = bytes(row.astype(np.uint8)).decode().split()
        assert sorted(words) == ["be", "be", "not", "or", "to"]
        assert words[-1] == "be"
    assert sorted(map(bytes, said["elsewhere"].astype(np.uint8))) == sorted(map(bytes, text.astype(np.uint8)))
    assert said["random"].min() >= 0
    assert said["random"].max() < 256
    assert len(np.unique(said["random"])) > 50
    for far_from in range(3, 12):
        rows = np.arange(far_from)[:, None]
        distance = (utterances(rows, None, 99, seed=far_from)["elsewhere"] - rows) % far_from
        assert len(np.unique(distance)) == 1
        assert min(distance[0, 0], far_from - distance[0, 0]) >= max(1, far_from // 4)
    assert (shuffled(np.array([7, 7, 7]), None, 1) == 7).all()  # no other order


def test_who_continues_a_text_is_surer_after_it(
    tiny: Callable[..., list[str]], tmp_path: Path, capsys: Capture
) -> None:
    """A model that has learnt a text by heart, on that text: yes against noise, from the command line."""
    run = tmp_path / "run"
    assert main(tiny(run, steps=250, learning_rate=0.01, eval_every=0, checkpoint_every=250, dose_every=0)) == 0
    capsys.readouterr()
    html = tmp_path / "page.html"
    words = ["noise", str(run), "--conversation", "--say", "4", "--threads", "1", "--html", str(html)]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["conversation"]
    assert result.keys() == {"source", "step", "seed", "block_size", "n_layer", "dtype", "conversation"}
    assert list(found["against"]) == list(ALTERNATIVES)
    for one in found["against"].values():
        assert len(one["blocks"]) == result["n_layer"]
        for length in ("1", "4"):
            low, high = one["total"][length]["interval"]
            assert 0 <= low <= one["total"][length]["auc"] <= high <= 1
    assert found["against"]["random"]["total"]["4"]["interval"][0] > 0.5
    assert main([*words, f"--figure={tmp_path / 'a.svg'}", f"--latex={tmp_path / 'a.tex'}"]) == 0
    for file in ("a.svg", "a.tex"):
        assert "random tokens" in (tmp_path / file).read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert out.split(":")[0] in ("Yes", "No", "In part")
    assert "Surer after what was really said" in out
    assert "The same by block" in out
    page = html.read_text(encoding="utf-8")
    assert "surer after what was really said" in page
    assert "<svg" in page


def test_a_conversation_without_room_is_refused(subject: Subject, finished_run: Path, capsys: Capture) -> None:
    with pytest.raises(ConfigError, match=r"found 11 of 16; say less, or give more --eval_tokens"):
        asked(subject, say=16)
    for words, message in (
        (["--say", "0"], "--say must be at least 1, found 0"),
        (["--signals", "confidence"], "--signals: --conversation measures the model without any signal"),
        (["--signal.weight", "2"], "--signal.weight: --conversation measures the model without any signal"),
    ):
        assert main(["noise", str(finished_run), "--conversation", *words]) == 2
        assert message in capsys.readouterr().err


def test_an_imported_folder_is_asked_too(
    finished_run: Path, tiny_corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    assert main(["export", str(finished_run), str(folder)]) == 0
    capsys.readouterr()
    words = ["--conversation", "--say", "2", "--eval_tokens", "160", "--threads", "1", "--json"]
    found = []
    for source, more in ((folder, ["--data", str(tiny_corpus)]), (finished_run, [])):
        assert main(["noise", str(source), *more, *words]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["conversation"]["windows"] == 10
    assert found[0]["dtype"] == found[1]["dtype"] == "fp32"
    for name in ("text", "elsewhere", "shuffled"):
        ours, theirs = (one["conversation"]["confidence"][name] for one in found)
        assert ours == pytest.approx(theirs, rel=1e-4)
