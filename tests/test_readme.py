"""What the README tells people to type exists: commands, flags, files, the Python names it imports."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from ingot.serve.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?m)^ingot ([a-z][^`\n]*?)(?:\s{2,}#.*)?$", README)) | set(re.findall(r"`(?:INGOT_\w+=\w+ )?ingot ([^`]+)`", README)))


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str) -> None:
    command = get_command(app)
    words = line.split()
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"ingot {line}: no command {words[0]}"
        command = command.commands[words.pop(0)]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {w for w in words if w.startswith("--")} <= known


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:`|\()((?:benchmarks|models|compiler|artifacts|runtime|serve)/[\w/.-]+\.\w+)", README))))
def test_file(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"python (benchmarks/\w+\.py)", README))))
def test_script(script: str) -> None:
    compile((ROOT / script).read_text(), script, "exec")


def test_python_names() -> None:
    import ingot.runtime

    for names in re.findall(r"from ingot\.runtime import (.*)", README):
        assert all(hasattr(ingot.runtime, n.strip()) for n in names.split(","))


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?m)^make (\w+)", README):
        assert re.search(rf"(?m)^{target}:", makefile)
