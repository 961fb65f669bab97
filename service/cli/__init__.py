"""The command line `imprint`: a module for each command, `main` to put them together.

The commands that talk to a server do so over HTTP, as any other client. `serve` and `doctor` use the server's own
modules, `eval`, `train` and `scenario` those of `research`, and `bench` those of `benchmarks`: these commands import
them when they run, because torch alone takes seconds to load and `imprint --help` or `imprint chat` need none of it.
"""
