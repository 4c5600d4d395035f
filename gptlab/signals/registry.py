"""Every signal and sequence objective by name, and those of a user's own file by FILE.py:FUNCTION.

Adding one is one pure function in functions.py and one line here. A signal is called as
`signal(logits (n, V), targets (n,)) -> (n,)` and gives each token's contribution to the loss, in nats or as its formula
says; what it teaches is its gradient. A sequence objective sees whole sequences at the end of the model. The tables
need no torch: options are checked against them before torch is imported, and the functions are imported at the first
call of one.

Running a user's file is running their code, so it is asked for by name. The names of its arguments say what it is.
`function(logits (n, V), targets (n,)) -> (n,)` is a signal that reads blocks. What else it needs it says with
attributes: `needs = "previous" | "next" | "final"` (then it takes `other=`), `has_threshold = True` (`threshold=`),
`uses_truth = False` where it does not look at the targets, `formula`. A function that also takes `tokens` is a sequence
objective: `function(logits (B, T, V), tokens, targets) -> (B, T)`, or with `hidden_states`, the list h_0..h_L, in the
place of logits, and `read` after the targets if it wants logits of a state.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

from gptlab.errors import ConfigError, did_you_mean
from gptlab.files import MB, read_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Signal:
    """One row of the table of signals, which is called as a function of logits (n, V) and true tokens (n,).

    >>> import torch
    >>> signal = SIGNALS["deep_supervision"]
    >>> signal.formula, signal.uses_truth, signal(torch.zeros(1, 4), torch.tensor([2]))
    ('CE(z,y)', True, tensor([1.3863]))

    name: also of its function in functions.py
    formula: the loss contribution of one token
    source: where the idea comes from
    needs: the other block whose logits for the same tokens it reads, detached: judge j's previous (j-1), next (j+1)
        or the final block
    uses_truth: whether it sees the true next token
    has_threshold: whether it has a τ
    gradient_bound: greatest L1 norm of a token's gradient at its logits, over all logits and vocabularies; None where
        there is none
    """

    name: str
    formula: str
    source: str
    needs: Literal["previous", "next", "final"] | None = None
    uses_truth: bool = False
    has_threshold: bool = False
    gradient_bound: float | None = None

    @cached_property
    def function(self) -> Any:
        from gptlab.signals import functions

        return getattr(functions, self.name)

    def __call__(
        self, logits: Tensor, targets: Tensor, *, other: Tensor | None = None, threshold: float = 0.9
    ) -> Tensor:
        """Loss contributions (n,) of logits (n, V), computed in float32 or better; targets (n,) are true tokens.

        other: the logits (n, V) of the block that `needs` names, for the same tokens; threshold: τ. Raises ConfigError
        for shapes that do not fit, and where a signal that needs another block's logits gets none.

        >>> import torch
        >>> SIGNALS["confidence"](torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1]))
        tensor([-0.6931, -9.0001])
        """
        if logits.ndim != 2 or targets.shape != logits.shape[:1]:
            found = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            raise ConfigError(f"{self.name}: expected logits (n, V) and targets (n,), found {found}; flatten B and T")
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        options: dict[str, Any] = {"threshold": threshold} if self.has_threshold else {}
        if self.needs is not None:
            if other is None or other.shape != logits.shape:
                found = "none" if other is None else f"shape {tuple(other.shape)}"
                raise ConfigError(
                    f"{self.name} reads the {self.needs} block: expected its logits for the same tokens, of shape "
                    f"{tuple(logits.shape)}, found {found}; give its logits as other="
                )
            options["other"] = other.detach().to(logits.dtype)
        return self.function(logits, targets, **options)


@dataclass(frozen=True)
class Objective:
    """One row of the table of sequence objectives; name, formula and source are as a `Signal`'s.

    reads: what its function takes first, logits (B, T, V) or the hidden states h_0..h_L (B, T, C)
    """

    name: str
    formula: str
    source: str
    reads: Literal["logits", "hidden_states"] = "logits"

    @cached_property
    def function(self) -> Any:
        from gptlab.signals import functions

        return getattr(functions, self.name)

    def __call__(
        self, states: Sequence[Tensor], tokens: Tensor, targets: Tensor, read: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Each token's loss (B, T), of the hidden states h_0..h_L, tokens and targets (B, T).

        read: head(ln_f(h)), from (B, T, C) to logits (B, T, V)
        """
        if self.reads == "logits":
            return self.function(read(states[-1]), tokens, targets)
        return self.function(states, tokens, targets, read)


def _table(*signals: Signal) -> dict[str, Signal]:
    return {signal.name: signal for signal in signals}


SIGNALS: dict[str, Signal] = _table(
    Signal("confidence", "log(1-p_m)", "N4", gradient_bound=2),
    Signal("overconfidence_penalty", "-log(1-p_m)", "N4 typed with a plus", gradient_bound=2),
    Signal("gated_confidence", "[p_m>=τ]·log(1-p_m)", "N2, N3", has_threshold=True, gradient_bound=2),
    Signal(
        "verified_confidence", "[p_m>=τ, m=y]·log(1-p_m)", "N2", uses_truth=True, has_threshold=True, gradient_bound=2
    ),
    Signal(
        "confident_error",
        "[p_m>=τ, m≠y]·(-log(1-p_m))",
        "N2's penalty; unlikelihood, Welleck 2019 (1908.04319)",
        uses_truth=True,
        has_threshold=True,
        gradient_bound=2,
    ),
    Signal(
        "advantage",
        "log(1-p_m,j) - sg log(1-p_m,j-1) where negative, else 0",
        "N3: what was said made the judge sure",
        needs="previous",
        gradient_bound=2,
    ),
    Signal("target_confidence", "log(1-p_y)", "N4 with the true token", uses_truth=True, gradient_bound=2),
    Signal("confidence_weighted_ce", "sg(p_m)·CE(z,y)", "N2 literally", uses_truth=True, gradient_bound=2),
    Signal("negated_cross_entropy", "-CE(-z,m)", "N5 as first coded", gradient_bound=2),
    Signal("negative_self_cross_entropy", "-CE(z,m) = log p_m", "N5 read literally, own target", gradient_bound=2),
    Signal(
        "negative_deep_supervision", "-CE(z,y)", "N5 read literally, true target", uses_truth=True, gradient_bound=2
    ),
    Signal(
        "deep_supervision",
        "CE(z,y)",
        "Lee 2015 (1409.5185); Al-Rfou 2018 (1808.04444); LayerSkip (2404.16710); all live",
        uses_truth=True,
        gradient_bound=2,
    ),
    Signal("pseudo_label", "[p_m>=τ]·(-log p_m)", "FixMatch (2001.07685)", has_threshold=True, gradient_bound=2),
    Signal(
        "information_gain",
        "CE(z_j,y)·sg[log p_j(y) - log p_j-1(y)]_+",
        "RLP (2510.01265), made blockwise",
        needs="previous",
        uses_truth=True,
    ),
    Signal("brier", "Σ_k (p_k-[k=y])²", "Brier 1950; RLCR (2507.16806)", uses_truth=True, gradient_bound=32 / 27),
    Signal("entropy", "H(p)", "Grandvalet & Bengio 2005"),
    Signal("confidence_penalty", "-H(p)", "Pereyra 2017 (1701.06548)"),
    Signal("self_certainty", "-(LSE(z) - mean z - log V)", "Intuitor (2505.19590)", gradient_bound=2),
    Signal("collision", "1 - Σp²", "Rényi-2; RLSC (2506.06395)", gradient_bound=16 / 27),
    Signal(
        "self_distillation", "KL(sg p_L ‖ p_j)", "Be Your Own Teacher (1905.08094)", needs="final", gradient_bound=2
    ),
)

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("label_smoothing", "-mean_k log p_k", "Szegedy 2016 (1512.00567)"),
        Objective("z_loss", "LSE(z)²", "PaLM (2204.02311)"),
        Objective(
            "multi_token_prediction",
            "CE(head(ln_f(h_L-1)), the token after y)",
            "Gloeckle 2024 (2404.19737), without heads of its own",
            "hidden_states",
        ),
        Objective(
            "prefix_token_prediction",
            "CE(z, the longest other token that y begins with)",
            "the NanoGPT speedrun's record of July 2026",
        ),
    )
}


CONVERSATION = "conversation"
SAMPLED = {CONVERSATION: Objective(CONVERSATION, "-mean_k A_k·log p(a_k|x)", "N3, between tokens")}
"""The sampled objectives. What one does is in training/conversation.py."""


def known_names() -> tuple[str, ...]:
    """What `--signal.name` knows."""
    return ("none", *SIGNALS, *OBJECTIVES, *SAMPLED)


class GivenFunction(str):
    """The name FILE.py:FUNCTION of a function that was given as an object, and the function.

    It is a text wherever a name is one, so that it is copied, compared and recorded as such. FILE.py is the file in
    which the function stands, or the name of its module where there is none, as in a notebook.
    """

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> GivenFunction:
        word = getattr(function, "__name__", type(function).__name__)
        if not word.isidentifier():
            raise ConfigError(f"signal.name: expected a function with a name, found {word}; define it with def")
        found = super().__new__(cls, f"{_file_of(function) or getattr(function, '__module__', 'given') + '.py'}:{word}")
        found.function = function
        return found

    @property
    def content(self) -> bytes:
        """What the record's checksum is taken of: its file, else its source, else its compiled code."""
        if file := _file_of(self.function):
            return read_bytes(file, limit=MB, error=ConfigError)
        try:
            return inspect.getsource(self.function).encode()
        except (OSError, TypeError):
            code = getattr(self.function, "__code__", None)
            return repr(_compiled(code) if code else type(self.function)).encode()


def _compiled(code: CodeType) -> tuple[Any, ...]:
    """What a function does, of its compiled code and that of the functions in it: nothing that says where it stands."""
    constants = [_compiled(c) if inspect.iscode(c) else c for c in code.co_consts]
    return code.co_code, code.co_names, constants


def _file_of(function: Callable[..., Any]) -> str | None:
    """The Python file in which a function is defined; None where there is none on disk."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except (TypeError, ValueError):
        return None
    return os.path.relpath(file) if file and file.endswith(".py") and os.path.isfile(file) else None


def user_signal(name: str) -> Signal | Objective:
    """The signal or sequence objective named FILE.py:FUNCTION as its file stands now.

    Raises ConfigError where there is none, where its file does not run, or where it says what it cannot need. What
    the function itself does wrong is said when it is called.
    """
    content = _content(name)
    function = name.function if isinstance(name, GivenFunction) else _function(name, content)
    takes = _arguments(function)
    if "tokens" in takes:
        return _objective(function, takes, name, _source(name, content))
    needs = getattr(function, "needs", None)
    if needs not in (None, "previous", "next", "final"):
        raise ConfigError(f"{name}: needs must be previous, next or final, found {needs!r}")
    signal = Signal(
        name=name,
        formula=_formula(function, name),
        source=_source(name, content),
        needs=needs,
        uses_truth=bool(getattr(function, "uses_truth", True)),
        has_threshold=bool(getattr(function, "has_threshold", False)),
    )
    signal.__dict__["function"] = _checked(function, name)  # in place of the one that `Signal` would look up
    return signal


def _objective(function: Callable[..., Any], takes: list[str], name: str, source: str) -> Objective:
    if takes[:3] not in (["logits", "tokens", "targets"], ["hidden_states", "tokens", "targets"]):
        raise ConfigError(
            f"{name}: expected a sequence objective to take logits or hidden_states, then tokens and targets, "
            f"found {', '.join(takes)}"
        )
    reads = "logits" if takes[0] == "logits" else "hidden_states"
    objective = Objective(name, _formula(function, name), source, reads)
    used = (
        function
        if reads == "logits" or "read" in takes
        else lambda states, tokens, targets, read: function(states, tokens, targets)
    )
    objective.__dict__["function"] = _checked(used, name)
    return objective


def _arguments(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a built-in function does not say
        return []


def _formula(function: Callable[..., Any], name: str) -> str:
    text = (function.__doc__ or "").strip() or name
    return getattr(function, "formula", text.splitlines()[0])


def _source(name: str, content: bytes) -> str:
    return f"{name}, sha256 {hashlib.sha256(content).hexdigest()[:12]}"


def file_hash(name: str) -> str:
    """SHA-256 of the file of FILE.py:FUNCTION, for the record."""
    return hashlib.sha256(_content(name)).hexdigest()


def next_to(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under dotted keys with the files of users' signals taken as lying in `folder`, as a TOML file's do.

    >>> next_to(Path("ideas"), {"signal.name": "margin.py:margin", "steps": 3})
    {'signal.name': 'ideas/margin.py:margin', 'steps': 3}
    """
    return _renamed(options, lambda name: os.path.normpath(folder / name))


def without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under dotted keys with users' signals named without their folder: a project may be moved."""
    return _renamed(options, os.path.basename)


def _renamed(options: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    found = dict(options)
    for key in ("name", "signal.name"):
        if isinstance(name := found.get(key), str) and ".py:" in name:
            found[key] = rename(name)
    if found.get("also"):
        found["also"] = tuple(_renamed(one, rename) for one in found["also"])
    return found


def _content(name: str) -> bytes:
    if isinstance(name, GivenFunction):
        return name.content
    path = Path(name.rpartition(":")[0])
    try:
        return read_bytes(path, limit=MB, error=ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"signal {name}: expected a Python file at {path}, found none") from None
    except ConfigError as error:
        raise ConfigError(f"signal {name}: {error}") from None


@lru_cache(maxsize=16)
def _function(name: str, content: bytes) -> Any:
    """The function of a file of that content: a file that has changed is run again, an equal one only once."""
    path, function = Path(name.rpartition(":")[0]), name.rpartition(":")[2]
    module = ModuleType(f"gptlab_user_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"signal {name}: {path} does not run: {_one_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v)]
        raise ConfigError(f"signal {name}: {path} has no function {function!r}{did_you_mean(function, known)}")
    return found


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    """The function, with an error or another shape than a value a token as an error that is the user's to mend."""
    from torch import Tensor

    @wraps(function)
    def signal(*given: Any, **options: Any) -> Tensor:  # the last tensor has a row for each value
        targets = next(one for one in reversed(given) if isinstance(one, Tensor))
        try:
            values = function(*given, **options)
        except Exception as error:
            raise ConfigError(f"signal {name} failed: {_one_line(error)}") from error
        if not isinstance(values, Tensor) or values.shape != targets.shape:
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ConfigError(
                f"signal {name}: expected one value a token, a tensor of shape {tuple(targets.shape)}, found {found}"
            )
        return values

    return signal


def _one_line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
