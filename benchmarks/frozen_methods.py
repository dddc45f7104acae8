"""Time and memory of the methods on frozen features: each fitted and tested in a process of its own.

    python benchmarks/frozen_methods.py --methods StatA,TransCLIP --classes 1000 --rows 16000 --queries 50000

Features are random: each class has a direction, which is its text as well, and images are noise around it. No image is
encoded, so that what is measured is the method alone. Settings are those of the method's vit_b16.yaml but for VIEWS
(--views at most) and the epochs of those that are trained (--epochs). A row of the result:
    fit     CPU seconds of training or fitting, with what is chosen on validation images (--val of each class)
    test    CPU seconds of the test
    before  the most memory that the process held before: PyTorch, CLIP and the features
    peak    the same at the end
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import machine, peak_memory, write_json
from benchmarks.subject import class_names
from benchmarks.tables import gigabytes, made_by, seconds, table
from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum
from dassl.engine import TRAINER_REGISTRY, build_trainer
from dassl.utils import set_random_seed
from dassl.utils.cli import run_main
from scripts.lib.methods import methods_with
from trainers.app.configuration import default_cfg
from trainers.base import FeatureTrainer
from trainers.clip.tiny import save_tiny
from trainers.features.encoder import FeatureSet

SPLITS = ("train", "val", "test")
NOISE = 7.0  # length of the noise beside the class's direction: half of 1000 classes' images are right zero-shot


def default_methods() -> list[str]:
    """The methods on frozen features that need no corrected features."""
    found = []
    for name in TRAINER_REGISTRY.registered_names():
        trainer = TRAINER_REGISTRY.get(name)
        if issubclass(trainer, FeatureTrainer) and trainer.adapters != "needed" and name in methods_with("vit_b16"):
            found.append(name)
    return found


def make_clip(width: int, classes: int) -> tuple[open_clip.CLIP, set[int]]:
    """A CLIP whose towers compute next to nothing, and the tokens that it knows."""
    vision = {"layers": 1, "width": width, "head_width": 32, "patch_size": 32, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    words = "a photo of . " + " ".join(class_names(classes))
    model = open_clip.CLIP(embed_dim=width, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    with torch.no_grad():
        model.logit_scale.fill_(4.6052)  # exp = 100, as in OpenAI's weights
    return model, {int(token) for word in set(words.split()) for token in open_clip.tokenize(word)[0]}


def file_names(split: str, count: int) -> list[str]:
    """Names in place of the files of a split, of which there are none."""
    return [f"{split}/{i}.png" for i in range(count)]


def make_dataset(args: argparse.Namespace) -> None:
    """Registers the dataset RandomFeatures, whose items are no files."""
    names = class_names(args.classes)

    def items(split: str, count: int) -> list[Datum]:
        files = file_names(split, count)
        return [Datum(file, i % args.classes, 0, names[i % args.classes]) for i, file in enumerate(files)]

    @DATASET_REGISTRY.register(force=True)
    class RandomFeatures(DatasetBase):
        """Class after class in turn."""

        check_files = False

        def __init__(self, cfg: Any) -> None:
            super().__init__(
                items("train", args.rows),
                val=items("val", args.val * args.classes) or None,
                test=items("test", args.queries),
            )


def make_features(texts: Tensor, split: str, count: int, views: int = 1) -> FeatureSet:
    """Features [V, N, E] around the texts."""
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    labels = torch.arange(count) % len(texts)
    noise = torch.randn(views, count, texts.shape[1], generator=generator).mul_(NOISE / texts.shape[1] ** 0.5)
    return FeatureSet(F.normalize(noise.add_(texts[labels]), dim=-1), labels, file_names(split, count))


def make_trainer(args: argparse.Namespace, name: str, folder: Path) -> Any:
    """The trainer on random features."""
    set_random_seed(0)
    save_tiny(*make_clip(args.width, args.classes), {"weights": "random"}, folder)
    cfg = default_cfg()
    cfg.merge_from_file(str(methods_with("vit_b16")[name]))
    node = cfg.TRAINER[TRAINER_REGISTRY.get(name).config_node()]
    node.PREC = "fp32"
    if node.get("VIEWS", 0) > args.views:
        node.VIEWS = args.views
    if args.epochs:
        cfg.OPTIM.MAX_EPOCH = args.epochs
        cfg.OPTIM.WARMUP_EPOCH = 0
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "tiny", "MODEL.BACKBONE.WEIGHTS", str(folder), "INPUT.SIZE", (32, 32)])
    cfg.merge_from_list(["DATASET.NAME", "RandomFeatures", "OUTPUT_DIR", str(folder / "run"), "TEST.NO_TEST", True])
    cfg.merge_from_list(["SEED", 1, "USE_CUDA", False, "FEATURE_CACHE.USE", False, "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["DATASET.CLEANING", "none"])  # it looks at the images, of which there are none
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    texts = F.normalize(torch.randn(args.classes, args.width), dim=1)
    known: type[Any] = TRAINER_REGISTRY.get(name)

    class Subject(known):
        """The trainer, whose texts and features are random."""

        def zeroshot(self, clip: Any, classnames: Any) -> Tensor:
            return texts

        def _encode_views(self, transform: Any, views: int) -> FeatureSet:
            return make_features(texts, "train", args.rows, max(1, views))

    Subject.__name__ = name
    TRAINER_REGISTRY.register(Subject, force=True)
    try:
        trainer: Any = build_trainer(cfg)
    finally:
        TRAINER_REGISTRY.register(known, force=True)
    if trainer.val_loader is not None:
        trainer.val_loader._known = make_features(texts, "val", args.val * args.classes)
    trainer.test_loader._known = make_features(texts, "test", args.queries)
    trainer.train_features.all()
    return trainer


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Fits and tests one method in this process."""
    torch.set_num_threads(args.threads)
    make_dataset(args)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, name, Path(folder))
        before, start = peak_memory(), time.process_time()
        trainer.train()
        fitted = time.process_time()
        accuracy = trainer.test()
        end = time.process_time()
        epochs = trainer.max_epoch if trainer._optim is not None else 0
        times = {"fit": fitted - start, "test": end - fitted}
        views = len(trainer.train_features.all().values)
    return {
        "method": name,
        **times,
        "before": before,
        "peak": peak_memory(),
        "epochs": epochs,
        "views": views,
        "accuracy": accuracy,
        "selected": trainer.selected,
    }


def run(args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measures each method in a process of its own; returns what goes into the JSON, which is written after each."""
    rows: list[dict[str, Any]] = []
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    result = {
        "benchmark": "frozen_methods",
        "rows": rows,
        "settings": settings,
        "machine": machine(torch.device("cpu")),
    }
    for name in args.methods:
        command = [sys.executable, __file__, *arguments, "--only", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit or None)
        except subprocess.TimeoutExpired:
            rows.append({"method": name, "error": f"more than {args.limit:g} s"})
        else:
            if done.returncode:
                print(done.stderr, file=sys.stderr)
            rows.append(
                {"method": name, "error": "failed"} if done.returncode else json.loads(done.stdout.splitlines()[-1])
            )
        write_json(args.json, result)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = [
        [row["method"], *["" for _ in range(5)], row["error"]]
        if "error" in row
        else [
            row["method"],
            row["views"],
            row["epochs"] or "closed form",
            seconds(row["fit"]),
            seconds(row["test"]),
            gigabytes(row["before"]),
            gigabytes(row["peak"]),
        ]
        for row in result["rows"]
    ]
    head = ["method", "views", "epochs", "fit, CPU", "test, CPU", "memory before", "peak"]
    return f"{table(head, rows)}\n\n{made_by(result)}"


def add_sizes(parser: argparse.ArgumentParser, rows: int, classes: int, queries: int) -> None:
    """Adds the numbers of images, classes and views, with these defaults."""
    parser.add_argument("--rows", type=int, default=rows, help=f"training images (default: {rows})")
    parser.add_argument("--classes", type=int, default=classes, help=f"at most 1000 (default: {classes})")
    parser.add_argument("--queries", type=int, default=queries, help=f"test images (default: {queries})")
    parser.add_argument("--width", type=int, default=512, help="of the features, a multiple of 32 (default: 512)")
    parser.add_argument("--val", type=int, default=4, help="validation images of each class (default: 4)")
    parser.add_argument("--views", type=int, default=10, help="at most this many of each image (default: 10)")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default="", help="names, separated by commas (default: all that need no adapters)")
    add_sizes(parser, rows=16000, classes=1000, queries=50000)
    parser.add_argument("--epochs", type=int, default=1, help="of methods that are trained; 0: their own (default: 1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=0.0, help="seconds of each method; 0: none (default)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config pairs for every method")
    args = parser.parse_args(argv)
    known = default_methods()
    args.methods = [name for name in args.methods.split(",") if name] or known
    for name in args.methods:
        if name not in known:
            parser.error(f"Expected --methods to be among {', '.join(known)} but got {name!r}")
    if args.width % 32 or args.width < 32 or args.rows < args.classes or args.queries < 1 or args.val < 0:
        parser.error("Expected --width to be a multiple of 32, --rows at least --classes and --queries at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parse_args(arguments)
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return 0
    result = run(args, arguments)
    print(markdown(result))
    return int(any(row.get("error") == "failed" for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(run_main(main))
