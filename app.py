"""The light table in a browser: many quick previews, one pick, one full render of exactly that picture.

    python app.py --model zoo/mini-sd --solver runs/demo/best
    python app.py --model black-forest-labs/FLUX.1-dev --dtype bfloat16 --reward clip dino

Needs the extra `demo`: pip install -e ".[demo]". The page is at the address that is printed.
"""

import argparse
from pathlib import Path

from data.command_line import DTYPES, errors_as_sentences


def main(args: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="pipeline: hub id or local folder")
    parser.add_argument("--solver", help="learned solver: folder or hub id")
    about = "scores beside PSNR, NAME or NAME=MODEL: depth, dino, clip, segmentation, inception"
    parser.add_argument("--reward", nargs="+", default=[], help=about)
    parser.add_argument("--output", type=Path, default=Path("outputs/lighttable"), help="folder of all pictures")
    parser.add_argument("--device", help="the GPU if there is one, by default")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to let others visit")
    parser.add_argument("--port", type=int, help="7860 or the next free one, by default")
    parser.add_argument("--waiting", type=int, default=16, help="how many runs may wait for the device")
    given = parser.parse_args(args)
    if given.waiting < 1:
        raise ValueError(f"--waiting {given.waiting}: expected at least 1.")
    if given.port is not None and not 0 < given.port < 2**16:
        raise ValueError(f"--port {given.port}: expected 1 to 65535.")
    try:
        from lighttable.page import serve
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is missing; install the extra: pip install -e ".[demo]".') from error
    from lighttable.table import LightTable

    rewards = {name: model or None for name, _, model in (reward.partition("=") for reward in given.reward)}
    table = LightTable.open(given.model, given.dtype, given.device, given.solver, rewards)
    table.warm_up()
    serve(table, given.output, given.waiting, server_name=given.host, server_port=given.port)


if __name__ == "__main__":
    with errors_as_sentences("app.py"):
        main()
