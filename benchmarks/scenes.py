"""How fast the miniature world is drawn: scenes a second, from the seed to image, depth and segmentation.

    python -m benchmarks.scenes --output scenes.json

Bar: 1,000 a second at 64 px on 2 CPU cores. Batches of 256 scenes, one warm-up, median of the repeats.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from data.scenes import Scene, render_batch


def scenes_per_second(size: int, count: int, repeats: int) -> dict:
    """Median rates of drawing scenes from seeds, of rendering them, and of both."""
    render_batch([Scene.random(i) for i in range(count)], size)
    drawing, rendering = [], []
    for repeat in range(repeats):
        start = time.perf_counter()
        scenes = [Scene.random(repeat * count + i) for i in range(count)]
        middle = time.perf_counter()
        render_batch(scenes, size)
        drawing.append(middle - start)
        rendering.append(time.perf_counter() - middle)
    both = [a + b for a, b in zip(drawing, rendering, strict=True)]
    draw, render, total = (round(count / statistics.median(seconds)) for seconds in (drawing, rendering, both))
    return {"size": size, "draw": draw, "render": render, "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 512])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="also write the table as JSON")
    args = parser.parse_args()
    rows = [scenes_per_second(size, max(256 * 64**2 // size**2, 4), args.repeats) for size in args.sizes]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; scenes a second")
    print(f"{'size':>6} {'draw':>8} {'render':>8} {'total':>8}")
    for row in rows:
        print(f"{row['size']:>6} {row['draw']:>8} {row['render']:>8} {row['total']:>8}")
    if args.output:
        args.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
