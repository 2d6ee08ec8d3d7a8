"""The command line: ``memplan plan script.py:make --input 3x224x224 --gpu "RTX 3090"``; see docs/command_line.md.

Each command has a file with its arguments (``add_arguments``) and its work (``run``). torch and Lightning take seconds
to import: only ``run`` imports them, and only in the commands that need a job.
"""
