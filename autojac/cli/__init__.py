"""The command line: tune ahead of a run, look at what was found, and watch the main job."""

from __future__ import annotations

import click

from autojac.cli.shell import Commands

__all__ = ["main"]

COMMANDS = {
    "demo": "autojac.cli.demo:demo",
    "tune": "autojac.cli.tune:tune",
    "probe": "autojac.cli.tune:probe",
    "explain": "autojac.cli.tune:explain",
    "audit": "autojac.cli.audit:audit",
    "plans": "autojac.cli.plans:plans",
    "bench": "autojac.bench.command:bench",
}


@click.group(cls=Commands, sources=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="autojac", prog_name="autojac")
def main() -> None:
    """Exact batched Jacobians in PyTorch, at the lowest cost measured on the device at hand.

    \b
    Examples:
      autojac demo
      autojac tune model.py:make_model --shape 1024x3
    """
