"""List the sources of the fifteen benchmarks, the contents of their archives, and the images of a complete copy.

Addresses are the official ones where they still answer, and move now and then; the page says more than the address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dassl.data.datasets import DatasetBase

COOP = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"  # links to its split files on Google Drive
VGG = "https://www.robots.ox.ac.uk/~vgg/data"


class Download(NamedTuple):
    """A file as it is distributed.

    Attributes:
        file: its name.
        url: direct address; "" where it is behind a login or a confirmation page, or gone.
        moves: (path in the archive, path in the dataset's folder); empty where the file itself is wanted.
        inner: archive inside the archive, unpacked in its turn.
        finish: what remains to be done: "class_archives" (one archive per class, each into its folder),
            "validation_labels" (images sorted into class folders by the labels in ImageNet's development kit).
    """

    file: str
    url: str = ""
    moves: tuple[tuple[str, str], ...] = ()
    inner: str = ""
    finish: str = ""


class Part(NamedTuple):
    """Something that must be there: `gives` (paths in the dataset's folder), from any one of `downloads`."""

    gives: tuple[str, ...]
    downloads: tuple[Download, ...]
    page: str
    spared_by_split: bool = False  # needed only where the split file is absent


class Source(NamedTuple):
    """A dataset: its official page (licence, citation), its parts, and (classes, train, val, test) when complete."""

    page: str
    counts: tuple[int, int, int, int]
    parts: tuple[Part, ...]


def counts_of(dataset: DatasetBase) -> tuple[int, int, int, int]:
    """Return the numbers of classes, and of images to train on, for validation and to test on, of a dataset."""
    train = 0 if getattr(dataset, "test_only", False) else len(dataset.train_x)
    return dataset.num_classes, train, len(dataset.val or ()), len(dataset.test or ())


def _archive(file: str, url: str, *targets: str, prefix: str = "") -> Download:
    return Download(file, url, tuple((f"{prefix}{target}", target) for target in targets))


def _split(name: str) -> Part:
    file = f"split_zhou_{name}.json"
    return Part((file,), (Download(file),), COOP)


def _classnames() -> Part:
    return Part(("classnames.txt",), (Download("classnames.txt"),), COOP)


def _shifted(page: str, images: int, classes: int, download: Download) -> Source:
    part = Part((download.moves[0][1],), (download,), page)
    return Source(page, (classes, 0, 0, images), (part, _classnames()))


_PETS, _FLOWERS, _CARS = f"{VGG}/pets/", f"{VGG}/flowers/102/", "https://ai.stanford.edu/~jkrause/cars/car_dataset.html"
_AIRCRAFT, _DTD = f"{VGG}/fgvc-aircraft/", f"{VGG}/dtd/"
_SUN, _UCF = "https://vision.princeton.edu/projects/2010/SUN/", "https://www.crcv.ucf.edu/data/UCF101.php"
_IMAGENET = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
_CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02"
_BERKELEY = "https://people.eecs.berkeley.edu/~hendrycks"
_VARIANTS = ("images", "variants.txt", *(f"images_variant_{part}.txt" for part in ("train", "val", "test")))
_LISTS = ("ClassName.txt", "Training_01.txt", "Testing_01.txt")

SOURCES: dict[str, Source] = {
    "ImageNet": Source(
        _IMAGENET,
        (1000, 1_281_167, 0, 50_000),
        (
            Part(
                ("images/train",),
                (Download("ILSVRC2012_img_train.tar", "", ((".", "images/train"),), finish="class_archives"),),
                _IMAGENET,
            ),
            Part(
                ("images/val",),
                (Download("ILSVRC2012_img_val.tar", "", ((".", "images/val"),), finish="validation_labels"),),
                _IMAGENET,
            ),
            _classnames(),
        ),
    ),
    "Caltech101": Source(
        _CALTECH,
        (100, 4128, 1649, 2465),
        (
            Part(
                ("101_ObjectCategories",),
                (
                    Download(
                        "caltech-101.zip",
                        f"{_CALTECH}/files/caltech-101.zip",
                        (("101_ObjectCategories", "101_ObjectCategories"),),
                        inner="caltech-101/101_ObjectCategories.tar.gz",
                    ),
                    _archive("101_ObjectCategories.tar.gz", "", "101_ObjectCategories"),
                ),
                _CALTECH,
            ),
            _split("Caltech101"),
        ),
    ),
    "OxfordPets": Source(
        _PETS,
        (37, 2944, 736, 3669),
        (
            Part(("images",), (_archive("images.tar.gz", f"{_PETS}data/images.tar.gz", "images"),), _PETS),
            Part(
                ("annotations/trainval.txt", "annotations/test.txt"),
                (_archive("annotations.tar.gz", f"{_PETS}data/annotations.tar.gz", "annotations"),),
                _PETS,
                spared_by_split=True,
            ),
            _split("OxfordPets"),
        ),
    ),
    "StanfordCars": Source(
        _CARS,
        (196, 6509, 1635, 8041),
        (
            Part(("cars_train",), (_archive("cars_train.tgz", "", "cars_train"),), _CARS),
            Part(("cars_test",), (_archive("cars_test.tgz", "", "cars_test"),), _CARS),
            Part(
                ("devkit/cars_train_annos.mat", "devkit/cars_meta.mat"),
                (_archive("car_devkit.tgz", "", "devkit"),),
                _CARS,
                spared_by_split=True,
            ),
            Part(
                ("cars_test_annos_withlabels.mat",),
                (Download("cars_test_annos_withlabels.mat"),),
                _CARS,
                spared_by_split=True,
            ),
            _split("StanfordCars"),
        ),
    ),
    "OxfordFlowers": Source(
        _FLOWERS,
        (102, 4093, 1633, 2463),
        (
            Part(("jpg",), (_archive("102flowers.tgz", f"{_FLOWERS}102flowers.tgz", "jpg"),), _FLOWERS),
            Part(
                ("imagelabels.mat",),
                (Download("imagelabels.mat", f"{_FLOWERS}imagelabels.mat"),),
                _FLOWERS,
                spared_by_split=True,
            ),
            Part(("cat_to_name.json",), (Download("cat_to_name.json"),), COOP, spared_by_split=True),
            _split("OxfordFlowers"),
        ),
    ),
    "Food101": Source(
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        (101, 50_500, 20_200, 30_300),
        (
            Part(
                ("images",),
                (
                    _archive(
                        "food-101.tar.gz",
                        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                        "images",
                        prefix="food-101/",
                    ),
                ),
                "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            ),
            _split("Food101"),
        ),
    ),
    "FGVCAircraft": Source(
        _AIRCRAFT,
        (100, 3334, 3333, 3333),
        (
            Part(
                _VARIANTS,
                (
                    _archive(
                        "fgvc-aircraft-2013b.tar.gz",
                        f"{_AIRCRAFT}archives/fgvc-aircraft-2013b.tar.gz",
                        *_VARIANTS,
                        prefix="fgvc-aircraft-2013b/data/",
                    ),
                ),
                _AIRCRAFT,
            ),
        ),
    ),
    "SUN397": Source(
        _SUN,
        (397, 15_880, 3970, 19_850),
        (
            Part(("SUN397",), (_archive("SUN397.tar.gz", f"{_SUN}SUN397.tar.gz", "SUN397"),), _SUN),
            Part(
                _LISTS,
                (_archive("Partitions.zip", f"{_SUN}download/Partitions.zip", *_LISTS),),
                _SUN,
                spared_by_split=True,
            ),
            _split("SUN397"),
        ),
    ),
    "DescribableTextures": Source(
        _DTD,
        (47, 2820, 1128, 1692),
        (
            Part(
                ("images",),
                (_archive("dtd-r1.0.1.tar.gz", f"{_DTD}download/dtd-r1.0.1.tar.gz", "images", prefix="dtd/"),),
                _DTD,
            ),
            _split("DescribableTextures"),
        ),
    ),
    "EuroSAT": Source(
        "https://github.com/phelber/EuroSAT",
        (10, 13_500, 5400, 8100),
        (
            Part(
                ("2750",),
                (
                    _archive("EuroSAT.zip", "http://madm.dfki.de/files/sentinel/EuroSAT.zip", "2750"),
                    Download("EuroSAT_RGB.zip", "", (("EuroSAT_RGB", "2750"),)),
                ),
                "https://github.com/phelber/EuroSAT",
            ),
            _split("EuroSAT"),
        ),
    ),
    "UCF101": Source(
        _UCF,
        (101, 7639, 1898, 3783),
        (
            Part(
                ("UCF-101-midframes",),
                (_archive("UCF-101-midframes.zip", "", "UCF-101-midframes"),),
                COOP,
            ),
            Part(
                tuple(f"ucfTrainTestlist/{name}.txt" for name in ("classInd", "trainlist01", "testlist01")),
                (
                    _archive(
                        "UCF101TrainTestSplits-RecognitionTask.zip",
                        "https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",
                        "ucfTrainTestlist",
                    ),
                ),
                _UCF,
                spared_by_split=True,
            ),
            _split("UCF101"),
        ),
    ),
    "ImageNetV2": _shifted(
        "https://github.com/modestyachts/ImageNetV2",
        10_000,
        1000,
        _archive(
            "imagenetv2-matched-frequency.tar.gz",
            "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
            "imagenetv2-matched-frequency-format-val",
        ),
    ),
    "ImageNetSketch": _shifted(
        "https://github.com/HaohanWang/ImageNet-Sketch",
        50_889,
        1000,
        Download("ImageNet-Sketch.zip", "", (("sketch", "images"),)),
    ),
    "ImageNetA": _shifted(
        "https://github.com/hendrycks/natural-adv-examples",
        7500,
        200,
        _archive("imagenet-a.tar", f"{_BERKELEY}/imagenet-a.tar", "imagenet-a"),
    ),
    "ImageNetR": _shifted(
        "https://github.com/hendrycks/imagenet-r",
        30_000,
        200,
        _archive("imagenet-r.tar", f"{_BERKELEY}/imagenet-r.tar", "imagenet-r"),
    ),
}
