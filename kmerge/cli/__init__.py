"""The command line: parse, call one function of `kmerge.api`, print.

Nothing but click is imported until a command runs: help and completion answer at once.
"""

from kmerge.cli.combine import combine
from kmerge.cli.look import compare, inspect, methods
from kmerge.cli.program import completion, program

for command in (combine, inspect, compare, methods, completion):
    program.add_command(command)

main = program
"""What the console script `kmerge` calls."""

__all__ = ["main"]
