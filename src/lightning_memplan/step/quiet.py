"""Run a replica's code so that it tells experiment trackers nothing, and leaves class attributes as they were.

A replica shares its classes, its process and its trackers with the user's module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_memplan.step.patch import patched

_WANDB = "log log_artifact log_code log_model save alert watch define_metric link_artifact use_artifact"
_MLFLOW = """
    log_metric log_metrics log_batch log_param log_params log_inputs log_input log_artifact log_artifacts log_image
    log_figure log_text log_dict log_table log_model set_tag set_tags set_experiment_tag
"""
_TENSORBOARD = """
    add_scalar add_scalars add_tensor add_histogram add_histogram_raw add_image add_images add_image_with_boxes
    add_figure add_video add_audio add_text add_onnx_graph add_graph add_embedding add_pr_curve add_pr_curve_raw
    add_custom_scalars add_custom_scalars_multilinechart add_custom_scalars_marginchart add_mesh add_hparams
"""

#: Module, class in it ("" for the module's own functions), and what writes to the tracker (wandb 0.19 to 0.28,
#: mlflow 2.20 to 3.14, tensorboard 2.16 to 2.21)
_TRACKERS = (
    ("wandb", "", _WANDB),
    ("wandb.sdk.wandb_run", "Run", _WANDB),
    ("mlflow", "", _MLFLOW),
    ("mlflow.tracking.client", "MlflowClient", _MLFLOW),
    ("torch.utils.tensorboard.writer", "SummaryWriter", _TENSORBOARD),
    ("tensorboardX.writer", "SummaryWriter", _TENSORBOARD),
)

#: Packages whose classes keep no state of a user's
_LIBRARIES = frozenset(
    "builtins torch pytorch_lightning lightning lightning_fabric lightning_memplan torchmetrics".split()
)

_PLAIN = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None))


@contextmanager
def leaving_no_trace(module: nn.Module) -> Iterator[None]:
    """Mute experiment trackers, and restore attributes of the module's classes afterwards."""
    with ExitStack() as stack:
        for name, kind, calls in _TRACKERS:
            owner: Any = sys.modules.get(name)
            owner = getattr(owner, kind, None) if kind else owner
            for call in calls.split() if owner is not None else ():
                if callable(getattr(owner, call, None)):
                    stack.enter_context(patched(owner, call, _ignore))
        kept = [(owner, _picture(owner)) for owner in _users_classes(module)]
        try:
            yield
        finally:
            for owner, before in kept:
                _restore(owner, before)


def _ignore(*_: Any, **__: Any) -> None:
    """Stand for a call that writes to a tracker."""


def _users_classes(module: nn.Module) -> set[type]:
    """Find the classes of a module and its submodules that are no library's."""
    kinds = {kind for child in module.modules() for kind in type(child).__mro__}
    return {kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES}


def _picture(owner: type) -> dict[str, tuple[Any, Any]]:
    """Return plain attributes of a class, each with a shallow copy of its contents."""
    found = {}
    for name, value in vars(owner).items():
        if not name.startswith("__") and (isinstance(value, _PLAIN) or type(value) in (list, dict, set)):
            found[name] = (value, value.copy() if type(value) in (list, dict, set) else value)
    return found


def _restore(owner: type, before: dict[str, tuple[Any, Any]]) -> None:
    for name, (value, contents) in before.items():
        if vars(owner).get(name, before) is not value:
            setattr(owner, name, value)
        if type(value) is list:
            value[:] = contents
        elif type(value) in (dict, set):
            value.clear()
            value.update(contents)
    for name in _picture(owner).keys() - before.keys():
        delattr(owner, name)
