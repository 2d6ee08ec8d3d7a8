"""Small modules in the manner of larger code bases: how they hold, log, loop and load, not what they compute."""
