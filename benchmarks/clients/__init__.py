"""Training as other projects set it up: their own modules, loaders and Trainers, with the planner beside them."""
