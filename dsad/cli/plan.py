"""``dsad plan``: memory, speed and cost of a config on accelerators, before they are paid for.

The compilers read their environment when they are loaded, so nothing here imports jax before the
topology is known.
"""

from dsad.plan import _topology


def main(argv: list[str]) -> int:
    """The command; 0 if the step fits into memory, 1 if it does not."""
    argv = _joined(argv)
    named = [a.partition("=")[2] for a in argv if a.startswith("--topology=")]
    asked = "--help" in argv or "-h" in argv
    _topology.set_environment(None if asked or not named else _topology.parse(named[-1]))

    from dsad.plan import _command

    return _command.main(argv)


def _joined(argv: list[str]) -> list[str]:
    """``--topology NAME`` as one argument."""
    made: list[str] = []
    for argument in argv:
        if made and made[-1] == "--topology":
            made[-1] = f"--topology={argument}"
        else:
            made.append(argument)
    return made
