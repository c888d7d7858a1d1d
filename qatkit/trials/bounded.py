"""Find the smallest or fastest model whose metric loses at most a given part, with training inside the search.

1. The loss increase of every layer group and format is measured without training, on training data, and so is its cost
   on exported files: bytes, or the runtime's time.
2. An integer program gives the least predicted increase for each of several costs: the ladder.
3. The metric on the validation split bisects the ladder without training. What is within the limit is the upper end of
   a finer ladder.
4. If there are alternatives of the whole model, successive halving chooses one of them, unless none is promising.
5. Short trainings bisect that ladder; full trainings decide. A model is within the limit if another split
   of the same size would show this with a probability of 95%.
6. The result is compared with the dense model on the test split, which no decision has used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from qatkit.errors import QatkitError
from qatkit.pipeline.baselines import example_of
from qatkit.quantization.mixed.records import Sensitivity
from qatkit.quantization.mixed.sensitivity import measure_sensitivity
from qatkit.schemes import Scheme
from qatkit.trials.budget import Budget
from qatkit.trials.decisions import Decision, decisions
from qatkit.trials.halving import Ladder, halve, with_increases
from qatkit.trials.ladder import Rung, Step, chosen, climb, confirmed, ladder, screen
from qatkit.trials.latency import priced, timed
from qatkit.trials.promise import Promise, compare, runtime_of
from qatkit.trials.sizes import sized
from qatkit.trials.subject import Subject, Trained
from qatkit.trials.variants import Variant

RUNGS = 8
"""Number of costs on the ladder."""
Goal = Literal["size", "latency"]


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    kept: bool
    """Whether the metric on the test split lost at most the limit, and the file passed verification."""
    failures: list[str]
    """The differences that verification found; empty if it passed."""
    limit: float
    minimize: Goal
    promise: Promise
    """The comparison on the test split."""
    file: str
    """The path of the exported file."""
    bytes: int
    dense_bytes: int
    latency: dict[str, Any] | None
    """The measured latencies of the "dense" and the "found" file; None if latency is not minimized."""
    variant: str
    """The alternative of the whole model."""
    confirmed: bool
    """Whether a training was within the limit on the validation split."""
    step: Step
    """The training whose result it is."""
    steps: list[Step]
    spent: str
    """The cost of all trainings."""
    decisions: list[Decision]
    """Why each layer group has its format."""
    notes: list[str]
    """Everything that was left out, with the reason, and measured latencies."""
    ladders: dict[str, list[Rung]]
    """The choices of formats by variant; of the chosen one, those that were trained."""
    trained: Trained = field(repr=False)


def shown(goal: Goal) -> Callable[[int], str]:
    """Return a function that formats a cost."""
    return (lambda cost: f"{cost:,} bytes") if goal == "size" else (lambda cost: f"{cost / 1e6:.4f} ms")


def find(
    subject: Subject, candidates: Mapping[str, Scheme], variants: Sequence[Variant], limit: float, goal: Goal,
    budget: Budget, batch: int, say: Callable[[str], None],
) -> Found:  # fmt: skip
    """Search, and compare the result with the dense model on the test split.

    Args:
        subject: What is searched.
        candidates: Formats by name.
        variants: Alternatives of the whole model; the first is the model as it is.
        limit: The largest loss of the metric; see `Metric.lost`.
        goal: What is minimized.
        budget: The cost of all trainings.
        batch: Samples per call, for latency.
        say: Called with a line about every step.

    Raises:
        QatkitError: a training fails, the data has no validation or test split, or the latency of files in the format
            is not measured.
    """
    row = subject.format
    if goal == "latency" and not row.benchmark:
        raise QatkitError(f"the latency of '{row.name}' exports is not measured", key="--minimize", advice="use size")
    for split in ("validation", "test"):
        subject.batches(split)
    subject.prepare(variants)
    show = shown(goal)
    ladders, notes = _ladders(subject, candidates, variants, goal, batch)
    for each in ladders:
        low, high = each.rungs[0].cost, each.rungs[-1].cost
        say(f"{each.variant.name}: {len(each.rungs)} choices of formats, from {show(low)} to {show(high)}")
    for note in notes:
        say(note)
    dense = subject.dense().model()
    done: dict[tuple[str, int, float], Trained] = {}

    def judge(each: Ladder, index: int, share: float) -> Step:
        name, rung = each.variant.name, each.rungs[index]
        trained = done[name, rung.cost, share] = subject.train(each.variant, rung, share)
        promise = compare(dense, trained.model(), subject.batches("validation"), subject.task)
        step = Step(index, share, promise.lost, promise.bound, promise.bound <= limit + 1e-12, name, rung.cost)
        steps = f"{share:.1%} of the steps" if share else "no training"
        say(
            f"{name}, {show(rung.cost)}, {steps}: the validation {promise.metric} loses "
            f"{step.lost:.2%}, at most {step.bound:.2%}: {'within' if step.within else 'beyond'} {limit:.2%}"
        )
        return step

    whole = ladders[0]
    screening = screen(len(whole.rungs), partial(judge, whole))
    passed = min((step for step in screening if step.within), key=lambda step: step.rung, default=None)
    top = whole.rungs[passed.rung if passed is not None else -1]
    smaller, halving, dropped = halve(ladders[1:], judge, budget, limit, top.cost)
    for sentence in dropped:
        say(f"dropped {sentence}")
    known: list[Step] = []
    if smaller is not None:
        winner = replace(smaller, rungs=ladder(smaller.sensitivity, RUNGS, smaller.fixed, top.cost - 1))
    else:
        finer = ladder(whole.sensitivity, RUNGS, whole.fixed, top.cost)
        winner = replace(whole, rungs=[*(rung for rung in finer if rung.cost < top.cost), top])
        if passed is not None:  # what is larger needs no training
            known = [replace(passed, rung=len(winner.rungs) - 1)]
    climbed = climb(len(winner.rungs), partial(judge, winner), budget, known)
    trained_ladder, step, found_any = winner, chosen(climbed), bool(confirmed(climbed))
    if not found_any and passed is not None:  # the smaller model fails, and the whole one needs no training
        trained_ladder, step, found_any = whole, passed, True
    name, rung = trained_ladder.variant.name, trained_ladder.rungs[step.rung]
    last = done[name, rung.cost, step.share]
    file, dense_file, model = last.file(), subject.dense().file(), last.model()
    promise = compare(dense, runtime_of(row, model, file), subject.batches("test"), subject.task)
    failures = last.failures()
    latency = None
    if goal == "latency":
        example = example_of(next(iter(subject.batches("test"))))
        latency = dict(timed({"dense": dense_file, "found": file}, example, batch, row.name))
    return Found(
        kept=not failures and promise.lost <= limit + 1e-12, failures=failures, limit=limit, minimize=goal,
        promise=promise, file=str(file), bytes=row.size(file), dense_bytes=row.size(dense_file), latency=latency,
        variant=name, confirmed=found_any, step=step, steps=[*screening, *halving, *climbed[len(known) :]],
        spent=budget.spent, decisions=decisions(trained_ladder.sensitivity, rung, show), notes=[*notes, *dropped],
        ladders={each.variant.name: each.rungs for each in ladders} | {name: trained_ladder.rungs}, trained=last,
    )  # fmt: skip


def _ladders(
    subject: Subject, candidates: Mapping[str, Scheme], variants: Sequence[Variant], goal: Goal, batch: int
) -> tuple[list[Ladder], list[str]]:
    """The ladders of all variants that are cheaper than the model as it is, and why the others are left out."""
    found: list[Ladder] = []
    notes: list[str] = []
    first: Sensitivity | None = None
    for variant in variants:
        model = subject.plain(variant)
        sensitivity = measure_sensitivity(model, candidates, subject.loss(), **subject.select())
        first = first or sensitivity
        sensitivity = with_increases(sensitivity, first)
        if goal == "latency":
            example = example_of(next(iter(subject.batches("validation"))))
            own = priced(
                sensitivity,
                lambda rung, variant=variant: subject.train(variant, rung, 0.0).file(),  # type: ignore[misc]  # not inferred
                lambda files, example=example: timed(files, example, batch, subject.format.name),  # type: ignore[misc]
            )
        else:
            types = {name: type(layer).__name__.removeprefix("QAT") for name, layer in model.named_modules()}
            own = sized(sensitivity, types.__getitem__, partial(subject.size, model))
        notes += [f"{variant.name}: {sentence}" for sentence in [*sensitivity.left_out, *own.notes]]
        rungs = ladder(own.sensitivity, RUNGS, own.fixed)
        each = Ladder(variant, own.sensitivity, rungs, own.fixed)
        if found and each.rungs[0].cost > 0.99 * found[0].rungs[0].cost:
            show = shown(goal)
            notes.append(
                f"{variant.name} is left out: its cheapest file, {show(each.rungs[0].cost)}, saves less than 1% of "
                f"that of the {found[0].variant.name}, {show(found[0].rungs[0].cost)}"
            )
        else:
            found.append(each)
    return found, notes
