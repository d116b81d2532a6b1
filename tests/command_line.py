"""What the tests of the command line share."""

from astraea_jax import cli


def refused(capsys, *arguments: str) -> str:
    """The one line that a mistake ends in."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("astraea: ")]
    return line
