"""`python -m autojac` is the command `autojac`."""

from autojac.cli import main

main(prog_name="autojac")
