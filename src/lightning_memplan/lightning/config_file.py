"""Read a LightningCLI configuration file: module, datamodule and Trainer."""

from __future__ import annotations

import importlib
from typing import Any

from lightning_memplan.lightning.compat import FLAVOURS


def read_cli_config(
    path: str, module: type[Any] | None = None, datamodule: type[Any] | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """The module and the datamodule that a LightningCLI's YAML names, made, and the Trainer's settings as they stand.

    No Trainer is made, so the YAML may name accelerators that are not here. Classes are given where it does not name
    them. ``_run_subcommand`` is LightningCLI's own, which would fit.

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
    strategy = read.config_init["fit"]["trainer"].get("strategy")  # made, where the YAML has its class
    return read.model, read.datamodule, {**read.config["fit"]["trainer"], "strategy": strategy}
