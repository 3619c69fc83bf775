"""The table of `tools/bad_input.py`: what commands are given that they have to refuse."""
