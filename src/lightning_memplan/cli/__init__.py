"""The command line: ``memplan plan script.py:make --input 3x224x224 --gpu "RTX 3090"``; see docs/command_line.md."""
