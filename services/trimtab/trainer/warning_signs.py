"""Signs that a run goes wrong, read off its metrics step by step; each has a name and something to try.

A sign never stops a run. It becomes the metric ``warning_NAME`` (1 while it stands), a line of the log, and a remark
beside what the run says it is doing. docs/warnings.md explains them; thresholds are the constants here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev

Row = Mapping[str, float]

EARLY = 5  # the first steps, which the run is compared with
RECENT = 5
ENTROPY_LEFT = 0.3
KL_NATS_PER_TOKEN = 0.5
KL_TIMES = 5.0
KL_JUMP_NATS = 10.0
LENGTH_TIMES = 1.5
MUST_BE_FINITE = ("loss", "grad_norm", "score_", "normalized_score", "kl_", "entropy", "validation_loss")


@dataclass(frozen=True)
class WarningSign:
    """One sign: `found` looks at all rows of a run, newest last, and gives what it saw, or None."""

    name: str
    advice: str
    found: Callable[[Sequence[Row]], str | None]

    @property
    def metric(self) -> str:
        return f"warning_{self.name}"


def _not_finite(rows: Sequence[Row]) -> str | None:
    row = rows[-1]
    broken = [name for name, value in row.items() if name.startswith(MUST_BE_FINITE) and not math.isfinite(value)]
    if broken:
        return f"{', '.join(broken)} {'is' if len(broken) == 1 else 'are'} not finite"
    if row.get("skipped_steps", 0) > 0:
        return f"{row['skipped_steps']:g} optimizer steps were skipped for a loss or gradient that was not finite"
    return None


def _entropy_collapse(rows: Sequence[Row]) -> str | None:
    entropy = _column(rows, "entropy_mean")
    if len(entropy) < EARLY + RECENT:
        return None
    before, now = median(entropy[:EARLY]), median(entropy[-RECENT:])
    return f"entropy fell from {before:.3g} to {now:.3g} nats a token" if now < ENTROPY_LEFT * before else None


def _kl_explosion(rows: Sequence[Row]) -> str | None:
    kl, lengths = _column(rows, "kl_nats_per_sequence"), _column(rows, "response_length_mean")
    if not kl or not lengths:
        return None
    per_token = kl[-1] / max(lengths[-1], 1.0)
    if per_token > KL_NATS_PER_TOKEN:
        return f"KL to the reference is {per_token:.2g} nats a token"
    before = kl[-1 - RECENT : -1]
    if len(before) == RECENT and kl[-1] > KL_JUMP_NATS and kl[-1] > KL_TIMES * max(median(before), 0.0):
        return f"KL jumped from {median(before):.3g} to {kl[-1]:.3g} nats a sequence"
    return None


def _length_drift(rows: Sequence[Row]) -> str | None:
    lengths, scores = _column(rows, "response_length_mean"), _column(rows, "normalized_score_mean")
    if min(len(lengths), len(scores)) < EARLY + RECENT or median(scores[-RECENT:]) <= median(scores[:EARLY]):
        return None
    before, now = median(lengths[:EARLY]), median(lengths[-RECENT:])
    if 1 / LENGTH_TIMES < now / max(before, 1e-9) < LENGTH_TIMES:
        return None
    return f"the reward rises while responses went from {before:.3g} to {now:.3g} tokens"


def _gold_divergence(rows: Sequence[Row]) -> str | None:
    proxy, gold = _column(rows, "normalized_score_mean"), _column(rows, "gold_score_mean")
    if min(len(proxy), len(gold)) < 2 * RECENT:
        return None
    rises, falls = _change(proxy), -_change(gold)
    if rises <= 0 or falls <= _noise(gold):
        return None
    return f"the reward model's score rose by {rises:.3g} while the gold score fell by {falls:.3g}"


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]


def _change(values: Sequence[float]) -> float:
    """Mean of the recent steps less that of as many before them."""
    return (sum(values[-RECENT:]) - sum(values[-2 * RECENT : -RECENT])) / RECENT


def _noise(values: Sequence[float]) -> float:
    """Two standard errors of `_change`, were it chance."""
    spread = (stdev(values[-RECENT:]) + stdev(values[-2 * RECENT : -RECENT])) / 2
    return 2 * spread * math.sqrt(2 / RECENT)


SIGNS = (
    WarningSign(
        "not_finite",
        "lower the learning rate, or compute in float32; look at the samples of the step",
        _not_finite,
    ),
    WarningSign(
        "entropy_collapse",
        "raise entropy_coefficient or kl_coefficient, or lower the learning rate; go back to an earlier version",
        _entropy_collapse,
    ),
    WarningSign(
        "kl_explosion",
        "raise kl_coefficient or set adaptive_kl_target, lower the learning rate or inner_epochs",
        _kl_explosion,
    ),
    WarningSign(
        "length_drift",
        "read samples: the reward model may pay for length alone; raise kl_coefficient, or rank answers of all lengths",
        _length_drift,
    ),
    WarningSign(
        "gold_divergence",
        "stop here and take the version before it turned; collect rankings on newer answers and train the reward model",
        _gold_divergence,
    ),
)


class WarningWatch:
    """The signs of one run. `rows` are the steps that it reported before."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = [dict(row) for row in rows]
        self._standing: dict[str, str] = {}

    @property
    def standing(self) -> Mapping[str, str]:
        """What stands now: name to what was seen and what to try."""
        return self._standing

    def judge(self, row: Row) -> dict[str, float]:
        """Look at the next step; its `warning_NAME` metrics, of the signs that this run can show."""
        self._rows.append(dict(row))
        metrics, self._standing = {}, {}
        for sign in SIGNS:
            seen = sign.found(self._rows)
            metrics[sign.metric] = float(seen is not None)
            if seen is not None:
                self._standing[sign.name] = f"{seen}; {sign.advice}"
        return metrics
