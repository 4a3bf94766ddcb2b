"""What the command lines share: values of a config, and errors as one sentence instead of a traceback."""

import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields

DTYPES = ("float32", "bfloat16", "float16")
MOST_CHARACTERS = 2000  # of an error, which may quote a file that somebody crafted


def answer_help(args: Sequence[str] | None, text: str, *configs: type, more: str = "") -> None:
    """Shows `help_text` and ends the process where --help is asked for: before seconds of imports.

    `args` are those of the command line; None stands for those of the process.
    """
    if {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        sys.stdout.write(help_text(text, *configs, more=more))
        sys.exit(0)


def help_text(text: str, *configs: type, more: str = "") -> str:
    """What --help shows.

    Args:
        text: what the command does.
        configs: dataclasses whose fields are its options.
        more: what else there is to set.
    """
    lines = [text.strip(), "", "options, in the YAML file of --config or on the command line:"]
    for knob in (knob for config in configs for knob in fields(config)):
        default = knob.default_factory() if knob.default_factory is not MISSING else knob.default
        note = "required" if default is MISSING else f"default {default}"
        lines.append(f"  --{knob.name:<24} {knob.metadata['help']} ({note})")
    return "\n".join([*lines, more]).rstrip() + "\n"


@contextmanager
def errors_as_sentences(command: str) -> Iterator[None]:
    """Ends the process with one line where what it was given is wrong: ValueError, OSError, ImportError, no memory."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{command}: {_printable(str(error))}")
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|can't allocate memory", str(error)) and not isinstance(error, MemoryError):
            raise
        sys.exit(f"{command}: this does not fit into memory; take a smaller size or batch, or another --device.")


def _printable(text: str) -> str:
    """One line, without what a terminal would obey, and no longer than somebody reads."""
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]} ..."


def as_list(value: object) -> object:
    """A single value of a YAML file, `rewards: pixels`, is meant as a list of one; None stays None."""
    return value if value is None or isinstance(value, list) else [value]


def are_numbers(values: object) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(is_number(value) for value in values)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_dtype(name: object) -> None:
    """Raises ValueError for anything but one of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: expected one of {', '.join(DTYPES)}.")


def check_whole(name: str, value: object, lowest: int = 1) -> None:
    """Raises ValueError, with the name of the option, unless the value is a whole number of at least `lowest`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {lowest}.")
