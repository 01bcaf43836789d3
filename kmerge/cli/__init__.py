"""The command line: parse, call one function of `kmerge.api`, print.

Nothing but click is imported until a command runs: help and completion answer at once.
"""

from kmerge.cli import combine, convert, look, program, tune

main = program.program
"""What the console script `kmerge` calls."""

for command in (
    combine.combine,
    tune.finetune,
    convert.convert,
    look.inspect,
    look.compare,
    look.methods,
    program.completion,
):
    main.add_command(command)

__all__ = ["main"]
