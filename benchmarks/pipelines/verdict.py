"""Compare the runs of a pipeline, without the planner and with it: sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.pipelines.choose import Pipeline
from benchmarks.pipelines.datasets import SECOND, numbers_of

Run = Mapping[str, Any]
Batch = list[int]  #: numbers of its samples
Epochs = list[list[Batch]]

#: words for another size than planned
SAYS = ("stays", "is not planned", "were planned and set", "cannot be", "alone", "length of the data is not known")


def failure(p: Pipeline, plain: Run, found: Run) -> str:
    """Say why training with the planner is worse than without it; empty where it is not.

    >>> plain = {"error": "", "epochs": [[[0, 1], [2, 3]]], "validations": 0, "steps": 2}
    >>> with_it = {**plain, "epochs": [[[0, 1, 2, 3]]], "method": "probe", "batch_size": 4, "said": [], "notes": []}
    >>> failure(Pipeline(count=4), plain, with_it)
    ''
    >>> failure(Pipeline(count=4), plain, {**with_it, "batch_size": 8})
    'size: 8 samples are announced, and the first batch has 4'
    """
    if left_out(plain):
        return ""
    if found["error"]:
        return str(found["error"])
    return next((text for check in _CHECKS for text in check(p, plain, found)), "")


def left_out(plain: Run) -> bool:
    """Return True if a pipeline does not train by itself: it fails, or an epoch has no batch."""
    return bool(plain["error"]) or not plain["steps"] or not all(plain["epochs"])


def outcome(plain: Run, found: Run, reason: str) -> str:
    """Name what happened, in a word or two."""
    if left_out(plain):
        return "left out: does not train without the planner"
    if found["error"]:
        hung, out = "no answer within" in found["error"], "out of memory" in found["error"]
        return "hung" if hung else "out of memory" if out else "stopped"
    if reason:
        return f"wrong {reason.partition(':')[0]}"
    if found["method"] is None:
        return "own size, not planned"
    return f"own size, by {found['method']}" if _stays(found) else f"planned by {found['method']}"


def _stays(found: Run) -> bool:
    return any("the batch size stays" in text for text in (*found["said"], *found["notes"]))


# ------------------------------------------------------------------------------------------------------------- the size
def _announced(p: Pipeline, plain: Run, found: Run) -> Iterator[str]:
    """The first batch has the size that is announced, or the planner says that it has another."""
    firsts, planned = _firsts(found["epochs"]), found.get("batch_size")
    if planned is None:
        if not found["said"]:
            yield "size: nothing is planned, without a word"
        elif _sizes(found["epochs"]) != _sizes(plain["epochs"]) and not _drawn(p):
            yield f"size: nothing is planned, and batches have {_sizes(found['epochs'])}, not {_sizes(plain['epochs'])}"
        return
    texts = " ".join((*found["said"], *found.get("notes", ())))
    hidden = p.module == "iterator" or p.combined or p.batch in ("object", "list_of_parts")
    if hidden and (p.collate == "drops" or p.streams):
        return  # only the module sees how many samples a batch has: what a loader leaves of it, or a stream
    if planned not in firsts and not any(words in texts for words in SAYS):
        yield f"size: {planned} samples are announced, and the first batch has {' and '.join(map(str, firsts))}"


def _kept(p: Pipeline, plain: Run, found: Run) -> Iterator[str]:
    """All epochs have batches of the size of the first."""
    if p.sampler in ("tokens", "own_batches") or p.collate == "drops" or p.combined:
        return
    firsts, before = ({_firsts([epoch])[0] for epoch in run["epochs"] if epoch} for run in (found, plain))
    if len(firsts) > 1 and len(before) == 1:
        yield f"size: the first batches of epochs have {sorted(firsts)}"


def _firsts(epochs: Epochs) -> list[int]:
    """Return the number of samples of the first batch, of each loader that it comes from."""
    batches = next((epoch for epoch in epochs if epoch), [[]])
    firsts = [next((len(part) for part in batches if part), 0) for batches in zip(*map(_parts, batches), strict=True)]
    return [count for count in firsts if count] or [0]


def _parts(batch: Batch) -> tuple[Batch, Batch]:
    """Return the samples of each of two loaders."""
    return [n for n in batch if n < SECOND], [n for n in batch if n >= SECOND]


def _sizes(epochs: Epochs) -> list[list[int]]:
    return [[len(batch) for batch in epoch] for epoch in epochs]


# ---------------------------------------------------------------------------------------------- epochs and validations
def _epochs(p: Pipeline, plain: Run, found: Run) -> Iterator[str]:
    """There are as many epochs, each with a step; where steps end training, as many steps in no fewer epochs."""
    before, after = len(plain["epochs"]), len(found["epochs"])
    if not all(found["epochs"]):
        yield f"epochs: {_sizes(found['epochs'])}, one without a batch"
    if p.stop == "epochs" and after != before:
        yield f"epochs: {after}, not {before}"
    if p.stop == "steps" and found["steps"] != plain["steps"]:
        yield f"epochs: {found['steps']} optimizer steps, not {plain['steps']}"
    fewer = after < before and found["steps"] < plain["steps"]  # max_steps may end training in an earlier epoch
    if fewer or found["steps"] < min(after, plain["steps"]):
        yield f"epochs: {after} with {found['steps']} optimizer steps, not {before} with {plain['steps']}"


def _validations(p: Pipeline, plain: Run, found: Run) -> Iterator[str]:
    """No validation is lost but those within an epoch, of which there are fewer batches."""
    least = min(plain["validations"], len(plain["epochs"]) // p.every)
    if found["validations"] < least:
        yield f"validations: {found['validations']}, not {plain['validations']}"


# ---------------------------------------------------------------------------------------------------------- the samples
def _samples(p: Pipeline, plain: Run, found: Run) -> Iterator[str]:
    """Every whole epoch has the samples that it has without the planner.

    Of two loaders, one may end or begin anew before the other: there each sample that is seen without is seen.
    """
    whole = slice(None) if p.stop == "epochs" else slice(-1)  # max_steps ends the last one early
    for before, after in zip(plain["epochs"][whole], found["epochs"][whole], strict=False):
        old, new = (Counter(n for batch in epoch for n in batch) for epoch in (before, after))
        most = max((len(part) for batch in after for part in _parts(batch)), default=0)
        if p.combined:
            yield from _of_two(p, old, new, most)
        else:
            yield from _of_one(p, old, new, max(most, found.get("batch_size") or 0))


def _of_one(p: Pipeline, old: Counter[int], new: Counter[int], most: int) -> Iterator[str]:
    """Compare an epoch of one loader; ``most`` samples are in a batch."""
    if not _drawn(p) and (extra := {n: times for n, times in new.items() if times > 1}):
        yield f"samples: seen more than once: {extra}"
    lost = old.total() - new.total()
    if p.overfit or p.limit != 1.0:
        # a part of an epoch is rounded down to whole batches, and drop_last leaves a remainder: less than a batch each
        rounded = isinstance(p.overfit or p.limit, float) or p.drop_last
        if lost >= (most if rounded else 1):
            yield f"samples: {new.total()} of a limited epoch, not {old.total()}"
    elif p.drop_last:
        # what is dropped is a remainder, smaller than a batch of the new size, in each worker that shares a stream
        dropped, shares = len(numbers_of(p)) - new.total(), max(1, p.workers) if p.streams else 1
        if dropped >= most * shares and lost > 0:
            yield f"samples: {dropped} are dropped, with batches of {most}"
    elif lost if _drawn(p) else old - new:
        yield f"samples: {new.total()} in an epoch, not {old.total()}; lost {sorted((old - new).keys())[:8]}"


def _of_two(p: Pipeline, old: Counter[int], new: Counter[int], most: int) -> Iterator[str]:
    if p.limit != 1.0 or p.drop_last or _drawn(p) or p.combined == "min_size":
        lost = min(sum(old.values()), most) - new.total()  # which of them come depends on the sizes: at least a batch
        if lost > 0:
            yield f"samples: {new.total()} in an epoch of two loaders, not {old.total()}"
    elif missing := old.keys() - new.keys():
        yield f"samples: of two loaders, lost {sorted(missing)[:8]}"


def _drawn(p: Pipeline) -> bool:
    """Return True if an epoch has some samples more than once: drawn with replacement, or from a stream without end."""
    return p.sampler in ("weighted", "replacement") or p.data == "endless_stream"


_CHECKS = (_announced, _kept, _epochs, _validations, _samples)
