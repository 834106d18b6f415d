"""What a comparison proves: means, 95% intervals over seeds, and a verdict in plain words.

The interval is Student's t over the seeds. It covers the choice of labels and the initial weights,
not the choice of test examples. The difference between two arms is taken seed by seed where both
have the same number of seeds, because seed k of every arm reads the same labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from selfsup.reporting.runs import Compare

ARM_NAMES = {
    "pretrained": "pre-trained",
    "scratch": "from scratch",
    "baseline": "classical baseline",
}
LOWER_IS_BETTER = ("loss", "mse", "rmse", "mae", "error", "eer", "perplexity")
MODEL_DETECTORS = ("reconstruction error", "latent density")
# Student's t, two-sided 95%, for 1 to 9 degrees of freedom; `t95` has a series for more.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
Z95 = 1.959964


@dataclass(frozen=True)
class Verdict:
    """What the report says of one number of labels.

    Attributes:
        headline: one sentence with the score of every arm.
        conclusion: one or two sentences on who wins, and how sure that is.
        winner: the arm with the best mean.
        clear: whether the 95% interval of the lead over the next arm excludes zero.
    """

    headline: str
    conclusion: str
    winner: str
    clear: bool


def t95(df: int) -> float:
    """The 97.5% quantile of Student's t with `df` degrees of freedom.

    From ten on: the Cornish-Fisher series in 1/df (Abramowitz and Stegun 26.7.5).

    >>> t95(1), round(t95(20), 3)
    (12.7062, 2.086)
    """
    if df <= len(T95):
        return T95[df - 1]
    z = Z95
    return (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95% t-interval.

    None for the width where there is one value, or two or three equal ones: as scores come in steps
    of one test example, these are no sign that there is no noise.

    >>> interval([1.0]), interval([0.5, 0.5])
    ((1.0, None), (0.5, None))
    """
    mean = fmean(values)
    if len(values) < 2 or (len(values) < 4 and max(values) - min(values) < 1e-9):
        return mean, None
    return mean, t95(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def difference(one: Sequence[float], two: Sequence[float]) -> tuple[float, float | None]:
    """Mean of `one` minus mean of `two` and the half-width of its 95% interval.

    Paired by seed where both have equally many; else Welch's interval with the smaller group's
    degrees of freedom, which is on the safe side.
    """
    if len(one) == len(two):
        return interval([a - b for a, b in zip(one, two, strict=True)])
    gap = fmean(one) - fmean(two)
    if min(len(one), len(two)) < 2:
        return gap, None
    spread = math.sqrt(stdev(one) ** 2 / len(one) + stdev(two) ** 2 / len(two))
    return gap, t95(min(len(one), len(two)) - 1) * spread


def lower_is_better(compare: Compare) -> bool:
    """Whether a smaller score wins: the file's own word, else the metric's name."""
    if "higher_is_better" in compare.raw:
        return not compare.raw["higher_is_better"]
    words = compare.metric.lower().replace("_", " ").split()
    return any(word in LOWER_IS_BETTER for word in words)


def arm_name(arm: str) -> str:
    """How an arm is called in text."""
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def arm_order(compare: Compare) -> list[str]:
    """The arms, the three usual ones first."""
    usual = [arm for arm in ARM_NAMES if arm in compare.scores]
    return usual + [arm for arm in compare.scores if arm not in ARM_NAMES]


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign, a real minus included.

    >>> signed(0.131), signed(-0.02), signed(0.0)
    ('+0.13', '−0.02', '±0.00')
    """
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return ("+" if value > 0 else "−") + text


def verdict(compare: Compare, count: int) -> Verdict:
    """The verdict at one number of labels; whoever wins is named first."""
    seeds = {
        arm: compare.scores[arm][count]
        for arm in arm_order(compare)
        if count in compare.scores[arm]
    }
    means = {arm: fmean(values) for arm, values in seeds.items()}
    ranked = sorted(means, key=means.__getitem__, reverse=not lower_is_better(compare))
    winner = ranked[0]
    both = {"pretrained", "scratch"} <= set(means)
    close = both and abs(means["pretrained"] - means["scratch"]) < 0.01
    digits = 3 if close else 2
    shown = {arm: f"{means[arm]:.{digits}f} {arm_name(arm)}" for arm in means}
    if both:
        # Of the rounded scores, so that the sentence's own arithmetic is right.
        gap = round(means["pretrained"], digits) - round(means["scratch"], digits)
        owner = "pretrained" if winner == "scratch" else "scratch"
        shown[owner] += f" ({signed(gap, digits)})"
    where = f"{count:,} labelled {compare.unit}"
    if len(ranked) == 1:
        headline = f"With {where}: {shown[winner]}"
        return Verdict(headline, "There is no other arm to compare it with.", winner, False)
    gap, half = difference(seeds[winner], seeds[ranked[1]])
    clear = half is not None and abs(gap) > half
    if winner == "pretrained":
        headline = f"With {where}: {', '.join(shown.values())}"
    else:
        name = "Training from scratch" if winner == "scratch" else f"The {arm_name(winner)}"
        rest = " and ".join(text for arm, text in shown.items() if arm != winner)
        leads = "wins" if clear else "is ahead"
        headline = f"{name} {leads} with {where}: {means[winner]:.{digits}f}, against {rest}"
    return Verdict(headline, _conclusion(winner, ranked[1], gap, half, clear, where), winner, clear)


def _conclusion(
    winner: str, second: str, gap: float, half: float | None, clear: bool, where: str
) -> str:
    other = {"scratch": "training from scratch", "pretrained": "the pre-trained model"}.get(
        second, f"the {arm_name(second)}"
    )
    if gap == 0:
        return f"{arm_name(winner).capitalize()} and {arm_name(second)} are level with {where}."
    lead = f"{abs(gap):.3f}"
    if half is None:
        sure = f"a lead of {lead} over {other}, from too few seeds to say how sure that is."
    elif clear:
        sure = (
            f"a lead of {lead} over {other} (95% interval {abs(gap) - half:.3f} "
            f"to {abs(gap) + half:.3f})."
        )
    else:
        sure = (
            f"but its lead of {lead} over {other} is within the noise of the seeds "
            f"(95% interval {signed(abs(gap) - half, 3)} to {signed(abs(gap) + half, 3)})."
        )
    if winner == "pretrained":
        who = "Pre-training wins" if clear else "Pre-training is ahead"
    elif winner == "scratch":
        who = "Pre-training did not pay here: training from scratch is ahead"
    elif winner == "baseline":
        who = f"The classical baseline is {'the better choice' if clear else 'ahead'}"
    else:
        who = f"The {arm_name(winner)} arm is ahead"
    return f"{who} with {where}, {sure}"


def probe_verdict(scores: dict[str, dict[str, float]]) -> tuple[str, str]:
    """What frozen features prove, in a headline and a conclusion: one run, so no interval.

    >>> probe_verdict({"pretrained": {"linear": 0.6}, "untrained": {"linear": 0.5}})[0]
    'Frozen features, linear: pre-trained 0.600, untrained 0.500'
    """
    kinds = [kind for found in scores.values() for kind in found]
    kind = next((k for k in ("linear", "mse") if k in kinds), kinds[0])
    found = {name: values[kind] for name, values in scores.items() if kind in values}
    sign = -1 if kind in LOWER_IS_BETTER else 1
    best = max(found, key=lambda name: sign * found[name])
    shown = dict.fromkeys(["pretrained", "untrained", best])
    numbers = ", ".join(f"{arm_name(name)} {found[name]:.3f}" for name in shown if name in found)
    if best.startswith("pretrained"):
        conclusion = "More can be read off them than off the untrained network or the raw input."
    else:
        conclusion = f"Best is {arm_name(best)}: the pre-training does not pay here."
    return f"Frozen features, {kind}: {numbers}", f"{conclusion} One run, so no interval."


def anomaly_verdict(scores: dict[str, dict[str, float]]) -> tuple[str, str]:
    """Whether the model tells anomalies better than the detectors beside it.

    >>> anomaly_verdict({"reconstruction error": {"auroc": 0.9}, "PCA": {"auroc": 0.95}})[1]
    'PCA tells them better: the model does not pay here. One run, so no interval.'
    """
    found = {name: values["auroc"] for name, values in scores.items()}
    ours = next((n for n in found if n in MODEL_DETECTORS), None)  # the one that `predict` uses
    other = max((n for n in found if n not in MODEL_DETECTORS), key=found.__getitem__, default=None)
    shown = ", ".join(f"{name} {found[name]:.3f}" for name in (ours, other) if name)
    conclusion = "The model tells them better than every simpler detector beside it."
    if ours is None or (other is not None and found[other] >= found[ours]):
        conclusion = f"{other} tells them better: the model does not pay here."
    return f"Anomalies, AUROC: {shown}", f"{conclusion} One run, so no interval."
