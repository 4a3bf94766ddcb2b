"""Pictures from a prompt and a seed: cheap previews, and the same pictures in full.

    python sample.py solver --model zoo/mini-sd --solver runs/mini_sd/best --steps 5 \\
        --prompt "a small red ring above a blue cube" --seed 7
    python sample.py refine --preview outputs/solver-1.png
    python sample.py preview --model zoo/mini-flux --candidates 8 --prompt "a red ring" --seed 7
    python sample.py refine --pick 3

`python sample.py COMMAND --help` says more.
"""

import argparse
from importlib import import_module
from pathlib import Path

from data.command_line import errors_as_sentences

# command -> module with add_arguments(parser) and run(given), see evaluation/commands/__init__.py
COMMANDS = {
    "solver": "evaluation.commands.solver",
    "preview": "evaluation.commands.preview",
    "refine": "evaluation.commands.refine",
    "ralu": "evaluation.commands.ralu",
    "hiflow": "evaluation.commands.hiflow",
    "remake": "evaluation.commands.remake",
}


def main(args: list[str] | None = None) -> Path:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **raw)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: import_module(module) for name, module in COMMANDS.items()}
    for name, module in modules.items():
        summary = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__, **raw))
    given = parser.parse_args(args)
    written = modules[given.command].run(given)
    print(written)
    return written


if __name__ == "__main__":
    with errors_as_sentences("sample.py"):
        main()
