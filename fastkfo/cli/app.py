"""The typer app: its subcommands, and ``--version``."""

from __future__ import annotations

import typer

from fastkfo._version import __version__
from fastkfo.cli.bench import bench
from fastkfo.cli.demo import demo
from fastkfo.cli.evaluate import evaluate
from fastkfo.cli.reproduce import reproduce
from fastkfo.cli.train import TrainCommand, train

__all__ = ["app"]

app = typer.Typer(
    name="fastkfo",
    help="Learned Kronecker-factored meta-optimizers on fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# The docstring's first two paragraphs: Raises is for readers of the code.
app.command(help=(demo.__doc__ or "").partition("Raises:")[0])(demo)
app.command(help=(reproduce.__doc__ or "").partition("Raises:")[0])(reproduce)
app.command(cls=TrainCommand, help=(train.__doc__ or "").partition("Args:")[0])(train)
app.command(help=(evaluate.__doc__ or "").partition("Raises:")[0])(evaluate)
# Every option, --help too, is the benchmark's own.
app.command(
    help=(bench.__doc__ or "").partition("Raises:")[0],
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastkfo {__version__}")
        raise typer.Exit


@app.callback()
def _callback(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Learned Kronecker-factored meta-optimizers on fused kernels."""
