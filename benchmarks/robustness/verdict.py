"""Compare the runs of one job: without the planner, with default arguments, and with ``apply=False``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.robustness.job import Samples

Runs = Mapping[str, Mapping[str, Any]]  #: by way


def failure(runs: Runs, samples: Samples) -> str:
    """Say why a job failed; empty where it did not.

    >>> plain = {"error": "", "epochs": [[4, 4]], "validations": 0}
    >>> failure({"without": plain, "default": {**plain, "epochs": [[8]]}, "apply=False": plain}, "same")
    ''
    >>> failure({"without": plain, "default": {**plain, "epochs": [[7]]}, "apply=False": plain}, "same")
    'default: samples by epoch [7], not [8]'
    """
    plain = runs["without"]
    if plain["error"]:
        return f"the job is wrong, it does not train without the planner: {plain['error']}"
    for way in ("default", "apply=False"):
        found = runs[way]
        if found["error"]:
            return f"{way}: {found['error']}"
        if way == "apply=False" and found["epochs"] != plain["epochs"]:
            return f"{way}: batches {found['epochs']}, not {plain['epochs']}"
        seen, expected = ([sum(epoch) for epoch in each["epochs"]] for each in (found, plain))
        fewer = len(seen) != len(expected) or any(a < b for a, b in zip(seen, expected, strict=True))
        if (samples == "same" and seen != expected) or (samples == "more" and fewer):
            return f"{way}: samples by epoch {seen}, not {expected}"
        if found["validations"] < min(plain["validations"], len(expected)):
            return f"{way}: {found['validations']} validations, not {plain['validations']}"
    return ""


def outcome(runs: Runs, reason: str) -> str:
    """Name what happened with default arguments, in a word or two."""
    if reason.startswith("the job is wrong"):
        return "wrong job"
    if reason:
        errors = " ".join(runs[way]["error"] for way in ("default", "apply=False"))
        return "hung" if "no answer within" in errors else "stopped" if errors.strip() else "samples lost"
    found = runs["default"]
    if found.get("method"):
        return f"planned by {found['method']}"
    return "user's size, with a warning" if found["said"] else "user's size, without a word"


def doubts(runs: Runs) -> list[str]:
    """List what is no failure and no good sign: a size that training does not have, steps that are not measured."""
    found, said = runs["default"], []
    epochs = [epoch for epoch in found["epochs"] if epoch]
    if found.get("method") and epochs and epochs[0][0] != found["batch_size"]:
        said.append(f"announced {found['batch_size']}, trained {epochs[0][0]}")
    for way in ("default", "apply=False") if epochs else ():
        if runs[way].get("measured") == 0 and not runs[way]["error"]:
            said += [f"{way}: no step is measured"]
    unplanned = [text for text in runs["apply=False"]["said"] if "is not planned" in text]
    if unplanned and found.get("method"):
        said.append(f"apply=False alone: {unplanned[0][:200]}")
    return said
