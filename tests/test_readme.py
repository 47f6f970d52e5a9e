"""What the README shows works: every verb and flag exists, the configuration is accepted, files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from flows.cli import app
from flows.settings import resolve

README = Path(__file__).resolve().parent.parent / "README.md"
COMMANDS = sorted(
    {
        part.strip()
        for block in re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
        for line in block.splitlines()
        for part in line.split("#")[0].split("&&")
        if part.strip().startswith("medmicn ")
    }
)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_every_verb_and_flag_exists(command: str) -> None:
    words = shlex.split(command)[1:]
    found = typer.main.get_command(app)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]  # type: ignore[attr-defined]
    known = {option for parameter in found.params for option in parameter.opts}
    assert not hasattr(found, "commands"), f"{command}: {words[:1]} is no verb"
    assert {word for word in words if word.startswith("--")} <= known


def test_the_shown_configuration_is_accepted(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "medmicn.toml").write_text(block)
    settings = resolve(tmp_path / "medmicn.toml")
    assert settings.vlm.model == "qwen2.5vl:7b"
    assert settings.train.logic == "dcr"


def test_links_and_pictures_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).is_file(), target
