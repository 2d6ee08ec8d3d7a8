"""Read a LightningCLI configuration file: module, datamodule and Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_memplan.lightning.compat import FLAVOURS

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule


def read_cli_config(
    path: str, module: type[LightningModule] | None = None, datamodule: type[LightningDataModule] | None = None
) -> tuple[LightningModule, LightningDataModule | None, dict[str, Any]]:
    """Return the module and datamodule that a LightningCLI's YAML describes, and the Trainer's settings.

    No Trainer is made, so the YAML may name accelerators that this machine lacks. Pass ``module`` and ``datamodule``
    where the YAML does not name their classes.

    Source: pytorch_lightning/cli.py (2.6.6), ``LightningCLI``: ``instantiate_trainer`` makes the Trainer,
    ``_run_subcommand`` would fit.

    Raises:
        ValueError: LightningCLI cannot read the file; says what is wrong with it.
        ModuleNotFoundError: jsonargparse is not installed.
    """
    try:
        import jsonargparse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a YAML needs jsonargparse: pip install 'jsonargparse[signatures]>=4.39'") from error
    flavour = next((f for f in FLAVOURS if module is not None and issubclass(module, f.LightningModule)), FLAVOURS[0])
    base = importlib.import_module(f"{flavour.__name__}.cli").LightningCLI

    class Reader(base):  # type: ignore[misc, valid-type]
        def instantiate_trainer(self, **kwargs: Any) -> None:
            return None

        def _run_subcommand(self, subcommand: str) -> None:
            return None

    try:
        read = Reader(
            module,
            datamodule,
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=True,
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
            args=["fit", f"--config={path}"],
        )
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"LightningCLI cannot read {path}: {error}") from error
    strategy = read.config_init["fit"]["trainer"].get("strategy")  # an object, if the YAML has its class
    return read.model, read.datamodule, {**read.config["fit"]["trainer"], "strategy": strategy}
