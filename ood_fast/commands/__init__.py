"""The commands of `ood-fast`, one module each: `add(commands)` makes the parser, `run(options, command)` does the work.

Nothing here imports torch before a command runs: `ood-fast --help` answers at once.
"""

from . import compare, demo, evaluate, export, fit, info, report, score, train

COMMANDS = (compare, train, fit, score, export, demo, evaluate, report, info)
