"""Draw a pipeline: a choice on each of many axes, such as the dataset, the sampler and the Trainer's flags."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

WIDTH = 8  #: values in a row
MOST = 120  #: samples of a dataset: their numbers, and a second dataset's from 128 on, are exact in bfloat16

#: the choices on each axis, the plainest first
AXES: dict[str, tuple[Any, ...]] = {
    "data": (
        *("map", "getitems", "cached", "subset", "concat", "tensors", "corrupt", "stream", "sized_stream"),
        *("some_none", "shuffled_stream", "own_iterator", "endless_stream", "batched_stream"),
    ),
    "leaf": ("row", "pair", "dict", "record", "arrays", "words", "user_dict", "sequence"),
    "sampler": (
        *("in_order", "shuffle", "weighted", "replacement", "subset", "batches", "own_batches", "tokens", "tuples"),
        *("objects", "bulk", "distributed"),
    ),
    "collate": ("default", "own", "padding", "even", "drops"),
    "batch": ("dict", "record", "named_tuple", "user_dict", "list_of_parts", "object"),
    "workers": (0, 1, 2),
    "persistent": (False, True),
    "worker_init": (False, True),
    "pinned": (False, True),
    "drop_last": (False, True),
    "loader": ("plain", "finishing", "own_length", "keeps_size", "hides", "background", "wrapper"),
    "holder": (
        *("passed", "attribute", "hparams", "datamodule", "datamodule_hparams", "fixed_hook", "fixed_datamodule"),
        *("attribute_passed", "ratio", "kept_loader", "made_in_setup"),
    ),
    "module": ("plain", "batch_norm", "manual", "iterator", "fixed", "halves", "carries"),
    "memory": ("small", "large"),
    "count": (48, 24, 37, 61, MOST, 7),
    "batch_size": (4, 1, 3, 8, 16, 64),
    "combined": ("", "dict", "list", "max_size_cycle", "min_size", "max_size"),
    "second": ("double", "half", "equal"),
    "validates": (False, True),
    "accumulate": (1, 2, 4),
    "limit": (1.0, 3, 0.5),
    "interval": (1.0, 0.5, 2),
    "overfit": (0, 2, 0.5),
    "stop": ("epochs", "steps", "either"),
    "sanity": (0, 2),
    "reload": (0, 1),
    "every": (1, 2),
    "clip": (0.0, 1.0),
    "precision": ("32-true", "16-mixed", "bf16-mixed", "bf16-true"),
}

#: chance that an axis is not at its plainest choice; those that few pipelines have in practice are drawn less often
CHANCE = {
    "combined": 0.12,
    "holder": 0.6,
    "overfit": 0.08,
    "limit": 0.15,
    "memory": 0.3,
    "loader": 0.3,
    "count": 0.7,
    "batch_size": 0.6,
}
USUAL = 0.35


@dataclass(frozen=True)
class Pipeline:
    """A choice on each axis.

    >>> Pipeline(data="stream", workers=2)
    Pipeline(data=stream workers=2)
    """

    data: str = "map"
    leaf: str = "row"
    sampler: str = "in_order"
    collate: str = "default"
    batch: str = "dict"
    workers: int = 0
    persistent: bool = False
    worker_init: bool = False
    pinned: bool = False
    drop_last: bool = False
    loader: str = "plain"
    holder: str = "passed"
    module: str = "plain"
    memory: str = "small"
    count: int = 48
    batch_size: int = 4
    combined: str = ""
    second: str = "double"
    validates: bool = False
    accumulate: int = 1
    limit: float = 1.0
    interval: float = 1.0
    overfit: float = 0
    stop: str = "epochs"
    sanity: int = 0
    reload: int = 0
    every: int = 1
    clip: float = 0.0
    precision: str = "32-true"

    def __repr__(self) -> str:
        return f"Pipeline({self})"

    def __str__(self) -> str:
        return " ".join(f"{axis}={value}" for axis, value in self.choices().items()) or "plain"

    def choices(self) -> dict[str, Any]:
        """Return the choices that are not the plainest."""
        return {axis: value for axis, value in asdict(self).items() if value != AXES[axis][0]}

    @property
    def streams(self) -> bool:
        return self.data.endswith("stream") or self.data == "own_iterator"


def parse(text: str) -> Pipeline:
    """Return the pipeline of a description.

    >>> parse("data=stream workers=2") == Pipeline(data="stream", workers=2), parse("plain") == Pipeline()
    (True, True)
    """
    chosen = {}
    for part in text.split() if text != "plain" else ():
        axis, _, value = part.partition("=")
        choices = {str(choice): choice for choice in AXES.get(axis, ())}
        if value not in choices:
            raise ValueError(f"{part!r} is no choice: {axis} has {', '.join(choices) or 'none'}")
        chosen[axis] = choices[value]
    return Pipeline(**chosen)


def draw(seed: int) -> Pipeline:
    """Return the pipeline of a seed.

    >>> draw(3) == draw(3) == mended(draw(3))
    True
    """
    chance = random.Random(seed)
    chosen = {
        axis: chance.choice(choices[1:]) if chance.random() < CHANCE.get(axis, USUAL) else choices[0]
        for axis, choices in AXES.items()
    }
    return mended(Pipeline(**chosen))


def mended(drawn: Pipeline) -> Pipeline:
    """Return the pipeline with those choices made plain that cannot be had together, until all can."""
    for _ in range(5):
        for mend in _MENDS:
            drawn = replace(drawn, **mend(drawn))
    return drawn


def _data(p: Pipeline) -> dict[str, Any]:
    """Streams have no sampler, and tensors are pairs of rows and labels."""
    changed: dict[str, Any] = {}
    if p.streams:
        changed["sampler"] = "in_order"
    if p.data == "own_iterator":
        changed["workers"] = 0  # each worker would read all of it
    if p.data == "endless_stream":
        changed["limit"] = 3
    if p.data == "batched_stream":
        changed |= {"drop_last": False, "loader": "plain" if p.loader in ("keeps_size", "own_length") else p.loader}
        changed["collate"] = p.collate if p.collate in ("own", "padding") else "own"
    if p.data == "tensors":
        changed |= {"leaf": "pair", "worker_init": False}
    if p.data in ("tensors", "subset", "concat") and p.sampler in ("tuples", "objects", "bulk"):
        changed["sampler"] = "in_order"
    if p.data == "corrupt" and p.sampler == "distributed":
        changed["sampler"] = "shuffle"
    if p.data == "corrupt" and p.sampler == "replacement":
        changed["sampler"] = "weighted"  # which never asks for a sample of weight zero
    if not p.workers or p.streams or p.data in ("subset", "concat"):
        changed["worker_init"] = False
    if not p.workers:
        changed["persistent"] = False
    return changed


def _collate(p: Pipeline) -> dict[str, Any]:
    """torch's default cannot stack every sample; some functions need a number of samples."""
    changed: dict[str, Any] = {}
    if p.leaf == "sequence" and p.collate in ("default", "own"):
        changed["collate"] = "padding"
    elif p.collate == "default" and (p.leaf in ("record", "words") or p.sampler == "bulk"):
        changed["collate"] = "own"
    if p.collate == "default":
        changed["batch"] = "dict"
    if p.data == "some_none":
        changed["collate"] = "drops"
    if p.collate == "even":
        size = p.batch_size if p.batch_size % 2 == 0 else 4
        changed |= {"count": p.count if p.count % 8 == 0 else 48, "batch_size": size, "data": _without(p, "corrupt")}
    if p.collate == "drops":
        changed["batch_size"] = max(4, p.batch_size)
        changed["count"] = p.count if p.count > 7 else 48
    return changed


def _without(p: Pipeline, data: str) -> str:
    return "map" if p.data == data else p.data


def _batches(p: Pipeline) -> dict[str, Any]:
    """Token buckets have no batch size of their own, so neither has a holder one; other sizes must train."""
    changed: dict[str, Any] = {}
    if p.sampler in ("batches", "own_batches", "tokens", "bulk") and p.loader in ("own_length", "keeps_size", "hides"):
        changed["loader"] = "plain"
    if p.loader == "hides" and (p.workers or p.sampler not in ("in_order", "shuffle")):
        changed["loader"] = "plain"
    if p.sampler == "tokens":
        changed |= {"drop_last": False, "collate": "own" if p.collate == "even" else p.collate}
    if p.drop_last and p.batch_size > p.count // max(2, p.workers):  # an epoch without a batch
        changed |= {"batch_size": 3, "count": max(p.count, 24)}
    if p.batch == "object" and p.precision == "bf16-true":  # which Lightning does not convert
        changed["batch"] = "dict"
    if p.memory == "large":
        changed["batch_size"] = min(p.batch_size, 8)
    if p.module == "batch_norm":
        changed["batch_size"] = max(p.batch_size, 3)
        changed["drop_last"] = p.drop_last or p.count % p.batch_size == 1  # a last batch of one sample is refused
    return changed


def _training(p: Pipeline) -> dict[str, Any]:
    """Lightning refuses some flags together."""
    changed: dict[str, Any] = {}
    if p.module == "manual":
        changed |= {"accumulate": 1, "clip": 0.0}
    if p.module == "iterator":
        changed |= {"accumulate": 1, "combined": "", "overfit": 0}
    if p.module in ("fixed", "halves", "carries"):  # steps of one loader, whose batches are all full
        changed |= {"combined": "", "drop_last": p.sampler != "tokens" and p.data != "batched_stream"}
        changed |= {"batch_size": p.batch_size if p.batch_size in (4, 8, 16) else 4, "count": max(p.count, 48)}
        changed["collate"] = "own" if p.collate == "drops" else p.collate
        changed["data"] = _without(p, "some_none")
    if not p.combined:
        changed["second"] = "double"
    if p.combined:
        changed |= {"overfit": 0, "loader": "plain" if p.loader == "wrapper" else p.loader}
    if p.streams and p.data != "sized_stream":  # which have no part
        changed |= {name: AXES[name][0] for name in ("limit", "interval", "overfit") if getattr(p, name) == 0.5}
    if 0.5 in (p.limit, p.overfit):
        changed |= {
            "batch_size": min(p.batch_size, 4),
            "count": max(p.count, 24),
        }
    if p.overfit:
        changed |= {"limit": 1.0, "validates": False}
    if not p.validates or p.overfit:
        changed |= {"interval": 1.0, "every": 1, "sanity": 0}
    if p.reload and p.holder in ("passed", "attribute_passed"):
        changed["reload"] = 0
    if p.holder == "ratio" and p.batch_size == 1:
        changed["batch_size"] = 4
    return changed


_MENDS: tuple[Callable[[Pipeline], dict[str, Any]], ...] = (_data, _collate, _batches, _training)
assert [field.name for field in fields(Pipeline)] == list(AXES)
