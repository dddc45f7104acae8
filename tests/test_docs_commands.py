"""The commands of README.md and docs/USAGE.md run as they stand, in order, in one fresh folder.

Each is made short by an epoch of its own and by few images; what needs OpenAI's weights takes the tiny CLIP.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dlr_clip_cli.predict
import dlr_clip_cli.train
from dassl.utils import close_logger
from scripts import compare, report

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train.py": dlr_clip_cli.train.main,
    "predict.py": dlr_clip_cli.predict.main,
    "scripts/compare.py": compare.main,
    "scripts/report.py": report.main,
}
# What is added to a command of these, to make it short: views let DLR-CLIP's frozen blocks run once. Comparisons and
# protocols of many hours are tested elsewhere, on less.
SHORT: dict[str, list[str]] = {
    "predict.py": [],
    "scripts/report.py": [],
    "train.py": ["OPTIM.MAX_EPOCH", "1", "INPUT.VIEWS", "1"],
    "scripts/compare.py": ["--shots", "1", "--seeds", "1", "--output", "compared", "OPTIM.MAX_EPOCH", "1"],
}


def commands(document: str) -> list[list[str]]:
    """Return the command lines of the bash blocks that run Python files, in order, without "python"."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                if words[:1] == ["python"] and "$" not in command:
                    found.append(words[1:])
    return found


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder with the checkout's files and folders as links, and photos of two classes."""
    for name in ("train.py", "predict.py", "scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    for name in ("my_photos/cat", "my_photos/dog", "folder_of_photos", "folder_of_new_photos"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.jpg")
    Image.fromarray(pixels).save(tmp_path / "new_photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "document, programs", [("README.md", set(PROGRAMS)), ("docs/USAGE.md", {"train.py", "predict.py"})]
)
def test_commands_run_in_order_in_one_folder(document, programs, fresh, random_tiny, capsys):
    found = [words for words in commands(document) if words[0] in programs]
    assert {words[0] for words in found} == programs
    for program, *arguments in found:
        arguments = [re.sub(r"vit_b(16|32)\b|ViT-B/(16|32)\b", "tiny", word) for word in arguments]
        short = SHORT[program] if "--eval-only" not in arguments else []
        weights = ["MODEL.BACKBONE.WEIGHTS", str(random_tiny)] if SHORT[program] else []
        code = PROGRAMS[program]([*arguments, *short, *weights])
        assert code == 0, f"{program} {shlex.join(arguments)}: {capsys.readouterr().err}"
        close_logger()
    assert Path("output").is_dir()
