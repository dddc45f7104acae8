"""The trainers must also run on upstream Dassl: they may use only names that its release 0.6.3 has."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "trainers"
APP = ROOT / "app"  # the application, which has the project's own toolbox; so has FewShotClassifier
FILES = sorted(path for path in ROOT.rglob("*.py") if not {APP, ROOT / "api"} & set(path.parents))

SURFACE = {
    "dassl.config": {"get_cfg_default", "clean_cfg"},
    "dassl.data": {"DataManager", "DatasetWrapper"},
    "dassl.data.datasets": {"DATASET_REGISTRY", "Datum", "DatasetBase", "build_dataset"},
    "dassl.data.transforms": {"INTERPOLATION_MODES", "build_transform"},
    "dassl.engine": {
        "TRAINER_REGISTRY", "build_trainer", "TrainerX", "TrainerXU", "TrainerBase", "SimpleTrainer", "SimpleNet",
    },
    "dassl.evaluation": {"build_evaluator", "EVALUATOR_REGISTRY", "EvaluatorBase", "Classification"},
    "dassl.metrics": {"compute_accuracy", "cosine_distance", "compute_distance_matrix", "euclidean_squared_distance"},
    "dassl.modeling": {"build_backbone", "build_head", "build_network"},
    "dassl.optim": {"build_optimizer", "build_lr_scheduler"},
    "dassl.utils": {
        "mkdir_if_missing", "listdir_nohidden", "read_json", "write_json", "check_isfile", "setup_logger",
        "set_random_seed", "collect_env_info", "load_pretrained_weights", "load_checkpoint", "MetricMeter",
        "AverageMeter", "Registry", "check_availability", "save_checkpoint", "resume_from_checkpoint",
        "count_num_param", "open_all_layers", "open_specified_layers", "init_network_weights", "read_image",
        "tolist_if_not", "get_most_similar_str_to_a_from_b", "download_url", "Logger",
    },
}  # fmt: skip

# What a trainer of upstream has as `self.<name>`.
INHERITED = {
    "cfg", "device", "start_epoch", "epoch", "max_epoch", "output_dir", "dm", "train_loader_x", "train_loader_u",
    "val_loader", "test_loader", "num_classes", "num_source_domains", "lab2cname", "evaluator", "best_result",
    "batch_idx", "num_batches", "time_start", "register_model", "get_model_names", "save_model", "load_model",
    "resume_model_if_exist", "set_model_mode", "update_lr", "detect_anomaly", "init_writer", "close_writer",
    "write_scalar", "train", "before_train", "after_train", "before_epoch", "after_epoch", "run_epoch", "test",
    "parse_batch_train", "parse_batch_test", "forward_backward", "model_inference", "model_zero_grad",
    "model_backward", "model_update", "model_backward_and_update", "check_cfg", "build_data_loader", "build_model",
    "get_current_lr", "_writer", "_optims",
}  # fmt: skip

# What is used of our own toolbox where it is there; each use is behind a check for "set_precision".
OPTIONAL = {"set_precision", "precision"}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
            assert not names & {"dassl", "datasets", "trainers", "dlr_clip"}, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            top = node.module.split(".")[0]
            assert top not in {"datasets", "trainers", "dlr_clip"}, f"line {node.lineno}: imports here are relative"
            if top == "dassl":
                unknown = {alias.name for alias in node.names} - SURFACE.get(node.module, set())
                assert not unknown, f"line {node.lineno}: upstream's {node.module} has no {sorted(unknown)}"


def test_the_methods_do_not_import_the_application():
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [(node.module or "").split(".")[0], *(alias.name for alias in node.names if not node.module)]
                assert "app" not in names, f"{path}, line {node.lineno}"


def test_one_file_of_the_application_says_what_the_datasets_are_called():
    importing = {
        path.name
        for path in APP.glob("*.py")
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "datasets")
        or (isinstance(node, ast.Import) and "datasets" in {alias.name.split(".")[0] for alias in node.names})
    }
    assert importing == {"data.py"}


def test_clip_knows_no_toolbox():
    for path in (ROOT / "clip").glob("*.py"):
        assert "dassl" not in {
            (node.module or "").split(".")[0] for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)
        }, path


CLASSES = {node.name: node for path in FILES for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)}


def ours(cls):
    """The class and those of its bases that are ours."""
    known = [CLASSES[base.id] for base in cls.bases if isinstance(base, ast.Name) and base.id in CLASSES]
    return [cls, *(found for base in known for found in ours(base))]


def trainer_classes():
    """The registered classes and what they derive from."""
    for cls in CLASSES.values():
        bases = {base.id for found in ours(cls) for base in found.bases if isinstance(base, ast.Name)}
        if bases & {"TrainerX", "TrainerXU", "TrainerBase", "SimpleTrainer"}:
            yield pytest.param(cls, id=cls.name)


def test_every_registered_class_is_looked_at():
    registered = {
        name for name, cls in CLASSES.items() if any("TRAINER_REGISTRY" in ast.dump(d) for d in cls.decorator_list)
    }
    assert "DLRCLIP" in registered
    assert registered <= {parameter.id for parameter in trainer_classes()}


@pytest.mark.parametrize("cls", trainer_classes())
def test_trainers_use_what_upstream_s_base_class_has(cls):
    own, used = set(), set()
    for part in ours(cls):
        own |= {node.name for node in ast.walk(part) if isinstance(node, ast.FunctionDef)}
        own |= {n.target.id for n in part.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        own |= {name.id for node in part.body if isinstance(node, ast.Assign) for name in node.targets}
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                (own if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    unknown = used - own - INHERITED - OPTIONAL
    assert not unknown, f"upstream's trainers have no {sorted(unknown)}"
