"""The bodies of the commands, one module each: `make_parser()` gives its parser, `main(args)` runs it.

`sample` and `quantize` have flags that depend on the model: their `choose(words)` names parser, main and arguments instead.
Importing a module loads nothing heavy, so that `--help` answers at once.
"""
