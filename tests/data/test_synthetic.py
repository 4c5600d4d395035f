"""Sources that are made up, against closed forms, long samples, and predictors that know the source."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gptlab.data.batches import ValidationWindows
from gptlab.data.corpus import MANIFEST, open_corpus
from gptlab.data.prepare import default_folder, prepare
from gptlab.data.synthetic import ALPHABET, CHANCES, LPN, VALIDATION_TOKENS, Copy, Dialogue, Markov, synthetic
from gptlab.errors import ConfigError, DataError

LONG = 2**17
NAMES = (
    "markov:order=2,symbols=4",
    "lpn:bits=6,ones=3,noise=0.2",
    "copy:length=4,symbols=5",
    "dialogue:kappa=0.5,questions=3,length=2",
)


def within(found: np.ndarray, expected: float, batches: int = 64) -> bool:
    """Whether a mean is as expected, to 5 standard errors; from means of batches, since neighbours may hang together.

    Without any spread it must be equal but for rounding.
    """
    means = found[: len(found) // batches * batches].reshape(batches, -1).mean(1)
    return abs(found.mean() - expected) <= 5 * means.std(ddof=1) / math.sqrt(batches) + 1e-12


def binary(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def symbols_of(text: str) -> np.ndarray:
    return np.array([ALPHABET.index(c) for c in text])


def test_two_states_in_closed_form() -> None:
    """π = (b, a) / (a + b) of a chain that leaves its states with probability a and b; rate = Σ π·H."""
    for seed in range(5):
        chain = Markov(order=1, symbols=2, seed=seed)
        a, b = chain.chances[0, 1] / CHANCES, chain.chances[1, 0] / CHANCES
        assert chain.stationary.tolist() == pytest.approx([b / (a + b), a / (a + b)], rel=1e-12)
        floor = chain.floor()
        assert floor.rate == pytest.approx((b * binary(a) + a * binary(b)) / (a + b), rel=1e-12)
        assert floor.start == (pytest.approx(binary(a / (a + b)), rel=1e-12),)


@pytest.mark.parametrize(("order", "symbols"), [(1, 5), (2, 3), (3, 4)])
def test_contexts_are_stationary_and_every_symbol_possible(order: int, symbols: int) -> None:
    chain = Markov(order=order, symbols=symbols)
    assert chain.chances.shape == (symbols**order, symbols)
    assert (chain.chances.sum(1) == CHANCES).all()
    assert chain.chances.min() >= CHANCES // (8 * symbols)
    states = symbols**order
    P = np.zeros((states, states))
    for state, symbol in itertools.product(range(states), range(symbols)):
        P[state, (state * symbols + symbol) % states] += chain.chances[state, symbol] / CHANCES
    system = np.vstack([P.T - np.eye(states), np.ones(states)])
    solved = np.linalg.lstsq(system, np.append(np.zeros(states), 1.0), rcond=None)[0]
    np.testing.assert_allclose(chain.stationary, solved, atol=1e-12)
    floor = chain.floor()
    falling = [*floor.start, floor.rate]
    assert falling == sorted(falling, reverse=True), "more in sight never surprises more"


def test_the_default_chain_leaves_something_to_learn_and_something_open() -> None:
    floor = Markov().floor()
    assert floor.start[0] == pytest.approx(math.log(16), abs=0.01)
    assert floor.rate == pytest.approx(1.757, abs=0.001)


@pytest.mark.parametrize("order", [1, 3])
def test_a_long_walk_surprises_at_the_entropy_rate(order: int) -> None:
    chain = Markov(order=order, symbols=4)
    x = symbols_of(chain.text(LONG, "val", 0))
    context = sum(x[n : len(x) - order + n] * 4 ** (order - 1 - n) for n in range(order))
    surprise = -np.log(chain.chances[context, x[order:]] / CHANCES)
    assert surprise.std() > 0.5
    assert within(surprise, chain.floor().rate)
    assert not within(surprise, chain.floor().rate + 0.02), "the test sees a difference of 0.02 nats"


@pytest.mark.parametrize("block_size", [1, 2, 5, 64])
def test_who_knows_the_chain_reaches_the_floor_of_windows(block_size: int, tmp_path: Path) -> None:
    """The predictor of what a window shows: joint probabilities of the stationary chain, by the chain rule."""
    chain = Markov(order=2, symbols=4, tokens=4096)
    prepare(chain.name, tmp_path, "bytes")
    windows = ValidationWindows(open_corpus(tmp_path), block_size, 256, VALIDATION_TOKENS)
    assert len(windows) * block_size == VALIDATION_TOKENS - VALIDATION_TOKENS % block_size
    pair = chain.stationary.reshape(4, 4)
    single, P = pair.sum(1), (chain.chances / CHANCES).reshape(4, 4, 4)
    x = symbols_of("".join(map(chr, windows.stream[1:])))
    before, place = np.roll(x, 1), np.arange(len(x)) % block_size
    by_sight = single[x], (pair / single[:, None])[before, x], P[np.roll(x, 2), before, x]
    sight = np.minimum(2, place + (np.arange(len(x)) >= block_size))
    surprises = -np.log(np.choose(sight, by_sight))
    assert windows.floor is not None
    assert within(surprises, windows.floor)
    if block_size < 64:
        assert not within(surprises, chain.floor().rate), "short windows show too little"


@pytest.mark.parametrize(("noise", "label"), [(0.0, 0.0), (0.1, 0.3250829733914482), (0.5, math.log(2))])
def test_noisy_parity_in_closed_form(noise: float, label: float) -> None:
    floor = LPN(bits=14, ones=3, noise=noise).floor()
    assert floor.rate == pytest.approx((14 * math.log(2) + label) / 16, rel=1e-12)
    assert floor.parts == {"bit": math.log(2), "label": pytest.approx(label), "label_by_chance": math.log(2)}


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_who_knows_the_secret_reaches_the_floor_and_no_other_secret_does(noise: float) -> None:
    source = LPN(bits=6, ones=3, noise=noise)
    lines = np.array([[int(c) for c in line] for line in source.text(LONG, "val", 0).split("\n")[:-1]])
    bits, label = lines[:, :6], lines[:, 6]
    assert bits.shape == (LONG // 8, 6)
    for secret in itertools.chain.from_iterable(itertools.combinations(range(6), n) for n in range(7)):
        wrong = bits[:, secret].sum(1) % 2 != label
        assert within(wrong.astype(float), noise if secret == source.secret else 0.5), secret
    all_patterns = np.bincount(bits @ 2 ** np.arange(6), minlength=64)
    assert ((all_patterns - len(bits) / 64) ** 2 / (len(bits) / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)
    wrong = bits[:, source.secret].sum(1) % 2 != label
    surprise = np.full(lines.shape[0] * 8, math.log(2)).reshape(-1, 8)  # the bits, by a fair coin
    surprise[:, 6] = -np.log(np.where(wrong, noise, 1 - noise))
    surprise[:, 7] = 0.0  # the line's end
    assert within(surprise.mean(1), source.floor().rate)


def test_more_noise_only_adds_wrong_labels_to_the_same_bits() -> None:
    clean, some, more = (np.array(list(LPN(bits=14, noise=n).text(16_000, "train", 0))) for n in (0.0, 0.1, 0.3))
    changed = [noisy != clean for noisy in (some, more)]
    assert not (changed[0] & ~changed[1]).any()
    assert {int(place) for place in np.flatnonzero(changed[1]) % 16} == {14}
    assert within(changed[1].reshape(-1, 16)[:, 14].astype(float), 0.3, batches=20)


def test_copies_begin_anywhere_and_cost_what_the_floor_says() -> None:
    """A draw is uniform over what is left, so every line costs the same: the floor to the last digit."""
    source = Copy(length=4, symbols=6)
    lines = source.text(10 * 3000, "val", 0).split("\n")[:-1]
    starts, firsts = [], []
    for line in lines:
        said, again = line.split(":")
        assert len(said) == len(set(said)) == 4
        assert again in {said[n:] + said[:n] for n in range(4)}
        starts.append(said.index(again[0]))
        firsts.append(said)
    assert len(lines) == 3000
    for counts in (np.bincount(starts, minlength=4), np.unique(firsts, return_counts=True)[1]):
        expected = 3000 / len(counts)
        freedom = len(counts) - 1
        assert len(counts) in (4, 6 * 5 * 4 * 3)
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)
    cost = math.log(6 * 5 * 4 * 3) + math.log(4)
    assert source.floor().rate == pytest.approx(cost / 10, rel=1e-14)
    assert source.floor().parts == {"where_it_begins": math.log(4), "said_again": 0.0}


DIALOGUES = (
    Dialogue(),
    Dialogue(kappa=0.0, questions=3, answers=4),
    Dialogue(kappa=-1.0, determined=1.0),
    Dialogue(truth=0.5, decoy=0.3, kappa=-0.4, replies=3),
    Dialogue(truth=0.25, decoy=0.75, determined=0.0),
    Dialogue(questions=4, answers=5, replies=4, length=3),
)


def joint(source: Dialogue) -> dict[tuple[int, int, int], float]:
    """P(question, answer, reply) by what the docs say, word by word."""
    found = {}
    for q, a, r in itertools.product(range(source.questions), range(source.answers), range(source.replies)):
        place = source.order[q].tolist().index(a)
        share = (1 - source.truth - source.decoy) / (source.answers - 2)
        chance = (source.truth, source.decoy)[place] if place < 2 else share
        if source.kappa >= 0:
            after = 1.0 if place == 0 else 1 - source.kappa
        else:
            after = 1 + source.kappa if place == 0 else 1.0
        sure = source.determined * after
        replied = sure * (source.reply[q, a] == r) + (1 - sure) / source.replies
        found[q, a, r] = chance * replied / source.questions
    return found


def lines_of(source: Dialogue, text: str) -> np.ndarray:
    """(lines, 3): which question, answer and reply the lines of a text hold."""
    n, lines = source.length, text.split("\n")[:-1]
    spelled = [[bytes(word).decode() for word in words] for words in source.spelling]
    return np.array([[s.index(line[k * n : k * n + n]) for k, s in enumerate(spelled)] for line in lines])


@pytest.mark.parametrize("source", DIALOGUES, ids=lambda source: source.name)
def test_a_dialogues_floor_is_the_entropy_of_all_lines_there_are(source: Dialogue) -> None:
    p = joint(source)
    assert math.fsum(p.values()) == pytest.approx(1, rel=1e-12)
    brute = -math.fsum(x * math.log(x) for x in p.values() if x > 0)
    floor = source.floor()
    assert floor.rate == pytest.approx(brute / source.period, rel=1e-12)
    parts = floor.parts or {}
    assert parts["question"] + parts["answer"] + parts["reply"] == pytest.approx(brute, rel=1e-12)
    assert len(floor.period) == source.period


@pytest.mark.parametrize("source", DIALOGUES, ids=lambda source: source.name)
def test_lines_come_as_often_as_they_should(source: Dialogue) -> None:
    """Chi-square over all lines that are possible; the pair's own reply is the one that comes."""
    p = joint(source)
    found = lines_of(source, source.text(30_000 * source.period, "val", 0))
    assert len(found) == 30_000
    counts = dict.fromkeys(p, 0)
    for line in found.tolist():
        counts[tuple(line)] += 1
    assert not any(count for key, count in counts.items() if p[key] == 0)
    possible = [(counts[key], 30_000 * chance) for key, chance in p.items() if chance > 0]
    chi = sum((count - expected) ** 2 / expected for count, expected in possible)
    freedom = len(possible) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_worlds_differ_in_their_replies_alone() -> None:
    """So that arms of another kappa ask and answer the same."""
    one, none, errors = (lines_of(s, s.text(4000, "train", 0)) for s in (Dialogue(kappa=k) for k in (1.0, 0.0, -1.0)))
    assert (one[:, :2] == none[:, :2]).all()
    assert (one[:, :2] == errors[:, :2]).all()
    true = one[:, 1] == Dialogue().order[one[:, 0], 0]
    assert (one[true] == none[true]).all()
    assert (errors[~true] == none[~true]).all()
    assert (one != none).any()


def test_truth_is_rare_by_default_and_may_be_the_commonest() -> None:
    for source, commonest in ((Dialogue(), 1), (Dialogue(truth=0.5, decoy=0.3), 0)):
        assert source.chances.argmax() == commonest
        assert source.chances.sum() == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("source", [Dialogue(tokens=4096), Dialogue(questions=3, length=2, tokens=4096)])
def test_validation_knows_which_answer_is_true(source: Dialogue, tmp_path: Path) -> None:
    prepare(source.name, tmp_path, "bytes")
    T = 4 * source.period
    windows = ValidationWindows(open_corpus(tmp_path), T, 256, 40 * T)
    wanted = windows.wanted["truth_probability"]
    assert wanted.shape == (40, T)
    text = "".join(map(chr, windows.stream[1:]))
    questions, answers = (["".join(map(chr, word)) for word in words] for words in source.spelling[:2])
    for place, token in enumerate(wanted.flatten().tolist()):
        line, within_line = divmod(place, source.period)
        if within_line == source.length:
            asked = text[line * source.period : line * source.period + source.length]
            assert chr(token) == answers[source.order[questions.index(asked), 0]][0]
        else:
            assert token == -1
    answered = wanted[wanted >= 0] == windows.rows(0, 40)[1][wanted >= 0]
    assert 0.1 < answered.double().mean() < 0.5  # of 160: how often the truth was said


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_drawn_from_a_global_generator(name: str) -> None:
    def draw(seed: int) -> tuple[str, object, object, object]:
        np.random.seed(seed)  # noqa: NPY002  # the very generator that must not be used
        random.seed(seed)
        torch.manual_seed(seed)
        before = repr(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
        text = synthetic(name).text(2000, "train", 1)
        after = repr(np.random.get_state()), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
        assert before == after
        return (text, *before)

    one, other = draw(1), draw(2)
    assert one[0] == other[0]
    assert one[1:] != other[1:]


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_their_own_and_begin_alike_however_many_there_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptlab.data.synthetic.DOCUMENT_TOKENS", 1000)
    source, longer = synthetic(f"{name},tokens=2500"), synthetic(f"{name},tokens=4000")
    train = list(source.documents("train"))
    assert source.count() == 1 + len(train)
    assert sum(len(text) + 1 for text, _ in train) == 2500
    assert all((len(text) + 1) % source.period == 0 for text, _ in train[:-1]), "lines stay in step"
    assert [text for text, _ in longer.documents("train")][:2] == [text for text, _ in train[:2]]
    for done, (_, position) in enumerate(train, 1):
        assert list(source.documents("train", json.loads(json.dumps(position)))) == train[done:]
    ((val, _),) = source.documents("val")
    assert len(val) == VALIDATION_TOKENS // source.period * source.period
    beginnings = {text[:100] for text, _ in [*train, (val, 0)]}
    assert len(beginnings) == len(train) + 1
    assert synthetic(f"{name},seed=2").text(100, "val", 0) != val[:100]
    assert all(c in ALPHABET + ":\n" for c in val)


def test_a_name_is_the_shortest_that_means_the_source() -> None:
    assert synthetic("lpn").name == synthetic("lpn:").name == synthetic("lpn:noise=0.1,ones=2").name == "lpn"
    assert synthetic("markov:seed=3,symbols=16,order=3").name == "markov:order=3,seed=3"
    assert default_folder("markov:seed=3,order=3", "bytes") == Path("data/markov-order=3,seed=3-bytes")
    assert default_folder("lpn:noise=0.1", "bytes") == Path("data/lpn-bytes")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("markov:ordr=2", "found 'ordr=2'; did you mean 'order'"),
        ("markov:order", "expected parameters of tokens, seed, order, symbols, found 'order'"),
        ("markov:order=two", "order: expected a whole number, found 'two'"),
        ("markov:order=4", "markov: expected order from 1 to 3, found 4"),
        ("markov:order=7,symbols=4", "expected order from 1 to 6, found 7"),
        ("markov:symbols=63", "expected symbols from 2 to 62, found 63"),
        ("lpn:ones=7", "expected ones from 1 to 6, found 7"),
        ("lpn:bits=63", "expected bits from 1 to 62, found 63"),
        ("lpn:noise=0.6", "expected noise from 0 to 0.5, found 0.6"),
        ("dialogue:truth=0.6,decoy=0.5", "expected truth . decoy to be at most 1, found 0.6 . 0.5; lower one of them"),
        ("dialogue:truth=1.2", "dialogue: expected truth from 0 to 1, found 1.2"),
        ("dialogue:kappa=-2", "dialogue: expected kappa from -1 to 1, found -2"),
        ("dialogue:kapa=1", "found 'kapa=1'; did you mean 'kappa'"),
        ("dialogue:answers=2", "expected answers from 3 to 26, found 2"),
        ("dialogue:replies=11", "expected replies from 2 to 10, found 11"),
        ("dialogue:determined=nan", "determined: expected a number, found 'nan'"),
        ("copy:length=27", "expected length from 2 to 26, found 27"),
        ("copy:tokens=3", "copy: expected tokens from 64 to "),
    ],
)
def test_unfit_parameters_are_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        synthetic(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_prepared_corpus_knows_its_floor(name: str, tmp_path: Path) -> None:
    source = synthetic(f"{name},tokens=4096")
    made = prepare(source.name, tmp_path / "a", "bytes")
    assert made.floor == source.floor()
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["floor"]["rate"] == source.floor().rate
    assert manifest["source"]["tokens"] == 4096
    assert prepare(f"{name},tokens=4_096", tmp_path / "a", "bytes") == made, "another spelling of the same name"
    assert prepare(source.name, tmp_path / "b", "bytes").identity() == made.identity()
    with pytest.raises(DataError, match="finished corpus of another name and source"):
        prepare(f"{name},seed=2", tmp_path / "a", "bytes")
    with pytest.raises(ConfigError, match="is made of bytes, found tokenizer gpt2"):
        prepare(name, tmp_path / "c", "gpt2")
    (tmp_path / "a" / MANIFEST).write_text(json.dumps({**manifest, "floor": {"period": [-1], "start": []}}))
    with pytest.raises(DataError, match="is damaged"):
        open_corpus(tmp_path / "a")
