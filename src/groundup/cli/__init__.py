"""The command line: one small module per command.

Read in this order: main.py (how a command is found, and how every error ends), arguments.py (flags from a function's
signature), then the command you care about; training_run.py is what ``demo`` and ``pretrain`` share.

Nothing imports this room. A command checks nothing itself that the room below it checks.
"""
