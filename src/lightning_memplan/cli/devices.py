"""``memplan devices``: the GPUs of this machine."""

from __future__ import annotations

import argparse

from lightning_memplan.cli.output import show
from lightning_memplan.devices.detect import detect_devices
from lightning_memplan.report.plans import devices_table
from lightning_memplan.types import as_dict

HELP = "the GPUs of this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no arguments of its own."""


def run(args: argparse.Namespace) -> None:
    found = detect_devices()
    if args.json:
        show([as_dict(device) for device in found], as_json=True)
    elif found:
        show(devices_table(found), as_json=False)
    else:
        show("no CUDA device here: name one by --gpu (memplan gpus lists them)", as_json=False)
