"""From labeled photographs to a table of what is on new ones.

    python own_photographs.py LABELED NEW

Converts and checks the folder LABELED (any format that `raydetr data convert` reads), fine-tunes on it, finds objects on the images of the
folder NEW, and writes them to detections.csv. Flags after ``--`` go to ``raydetr train``: ``-- --preset detr_tiny --workers 2``. Take it as
a start for a script of your own.
"""

import argparse
import collections
import csv
import json
import subprocess
import sys
from pathlib import Path

COLUMNS = ("image", "category", "score", "x", "y", "width", "height")  # the box in pixels, from its upper left corner


def raydetr(*words: object) -> None:
    """Run a command of raydetr, and end this script if it fails."""
    command = [sys.executable, "-m", "raydetr.cli", *map(str, words)]
    print("+ raydetr", *words, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)


def detections(folder: Path, threshold: float) -> list[list]:
    """Return a row of ``COLUMNS`` for each object that `raydetr predict` has found with at least this score."""
    known = json.loads((folder / "images.json").read_text())
    files = {image["id"]: Path(image["file_name"]).name for image in known["images"]}
    names = {category["id"]: category["name"] for category in known["categories"]}
    results = json.loads((folder / "predictions.json").read_text())
    return [
        [files[each["image_id"]], names[each["category_id"]], round(each["score"], 3), *(round(side, 1) for side in each["bbox"])]
        for each in results
        if each["score"] >= threshold
    ]


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], epilog="Flags after -- go to raydetr train.")
    parser.add_argument("labeled", type=Path, help="folder of labeled photographs")
    parser.add_argument("new", type=Path, help="folder of photographs to look at")
    parser.add_argument("--from", dest="source", help="format of the labels (default: found out)")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--threshold", type=float, default=0.7, help="lowest score that counts (default 0.7)")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options, train_flags = parser.parse_args(words[:end]), words[end + 1 :]

    raydetr("data", "convert", options.labeled, "data", *(["--from", options.source] if options.source else []))
    raydetr("data", "check", "data")
    raydetr("train", "--data", "data", "--name", "own", "--epochs", options.epochs, *train_flags)
    raydetr("predict", "runs/own/best.pth", options.new, "--out", "seen")

    rows = detections(Path("seen"), options.threshold)
    with open("detections.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    for image, count in collections.Counter(row[0] for row in rows).items():
        print(f"{image}: {count}")
    print(f"{len(rows)} objects: detections.csv; look at seen/index.html")


if __name__ == "__main__":
    main()
