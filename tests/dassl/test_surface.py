"""The names that CoOp-style code imports are where it looks for them."""

from __future__ import annotations

import importlib
import inspect

import pytest

from dassl.upstream_names import OFFERED

SURFACE = {
    "dassl.config": "get_cfg_default clean_cfg",
    "dassl.data": "DataManager DatasetWrapper",
    "dassl.data.data_manager": "DataManager DatasetWrapper build_data_loader",
    "dassl.data.datasets": "DATASET_REGISTRY Datum DatasetBase build_dataset",
    "dassl.data.datasets.base_dataset": "Datum DatasetBase",
    "dassl.data.samplers": "build_sampler RandomDomainSampler SeqDomainSampler RandomClassSampler",
    "dassl.data.transforms": "build_transform INTERPOLATION_MODES",
    "dassl.engine": "build_trainer TRAINER_REGISTRY TrainerX TrainerXU TrainerBase SimpleTrainer SimpleNet",
    "dassl.evaluation": "build_evaluator EVALUATOR_REGISTRY EvaluatorBase Classification",
    "dassl.metrics": "compute_accuracy cosine_distance compute_distance_matrix euclidean_squared_distance",
    "dassl.modeling": "build_backbone build_head build_network BACKBONE_REGISTRY HEAD_REGISTRY NETWORK_REGISTRY",
    "dassl.optim": "build_optimizer build_lr_scheduler",
    "dassl.utils": "mkdir_if_missing listdir_nohidden read_json write_json check_isfile setup_logger set_random_seed "
    "collect_env_info load_pretrained_weights load_checkpoint MetricMeter AverageMeter Registry check_availability "
    "save_checkpoint resume_from_checkpoint count_num_param open_all_layers open_specified_layers "
    "init_network_weights read_image tolist_if_not get_most_similar_str_to_a_from_b download_url Logger",
}

SIGNATURES = {
    "dassl.data:DataManager": "cfg custom_tfm_train custom_tfm_test dataset_wrapper",
    "dassl.data:DatasetWrapper": "cfg data_source transform is_train",
    "dassl.data.datasets:Datum": "impath label domain classname",
    "dassl.data.datasets:DatasetBase": "train_x train_u val test",
    "dassl.data.datasets:build_dataset": "cfg",
    "dassl.data.transforms:build_transform": "cfg is_train choices",
    "dassl.engine:build_trainer": "cfg",
    "dassl.evaluation:build_evaluator": "cfg kwargs",
    "dassl.metrics:compute_accuracy": "output target topk",
    "dassl.optim:build_optimizer": "model optim_cfg param_groups",
    "dassl.optim:build_lr_scheduler": "optimizer optim_cfg",
    "dassl.utils:check_availability": "requested available",
    "dassl.utils:listdir_nohidden": "path sort",
    "dassl.utils:load_checkpoint": "fpath",
    "dassl.utils:load_pretrained_weights": "model weight_path",
    "dassl.utils:resume_from_checkpoint": "fdir model optimizer scheduler",
    "dassl.utils:save_checkpoint": "state save_dir is_best remove_module_from_keys model_name",
    "dassl.utils:setup_logger": "output",
    "dassl.utils:write_json": "obj fpath",
}


SURFACE |= {
    "dassl.config.defaults": "build_defaults",
    "dassl.data.transforms.autoaugment": "ImageNetPolicy CIFAR10Policy SVHNPolicy",
    "dassl.modeling.backbone": "build_backbone BACKBONE_REGISTRY Backbone",
    "dassl.modeling.backbone.backbone": "Backbone",
    "dassl.modeling.backbone.build": "build_backbone BACKBONE_REGISTRY",
    "dassl.modeling.head.build": "build_head HEAD_REGISTRY",
    "dassl.modeling.head.mlp": "mlp MLP HEAD_REGISTRY",
    "dassl.modeling.network.build": "build_network NETWORK_REGISTRY",
    "dassl.modeling.ops": "mixup cross_entropy ReverseGrad sharpen_prob reverse_index shuffle_index create_onehot "
    "sigmoid_rampup linear_rampup ema_model_update",
    "dassl.modeling.ops.utils": "sharpen_prob reverse_index shuffle_index create_onehot sigmoid_rampup linear_rampup "
    "ema_model_update",
    "dassl.optim.radam": "RAdam PlainRAdam AdamW",
    "dassl.utils.torchtools": "adjust_learning_rate set_bn_to_eval",
    **{module: " ".join(names) for module, names in OFFERED.items() if module != "dassl.utils.torchtools"},
}


@pytest.mark.parametrize("module", SURFACE)
def test_names(module):
    found = importlib.import_module(module)
    assert [name for name in SURFACE[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("target", SIGNATURES)
def test_leading_parameters(target):
    module, name = target.split(":")
    parameters = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    expected = SIGNATURES[target].split()
    assert parameters[: len(expected)] == expected  # more may follow, with defaults


def test_what_others_import_from_the_trainer_module():
    from dassl.engine.trainer import AverageMeter, MetricMeter, SummaryWriter
    from dassl.utils import meters

    assert (AverageMeter, MetricMeter) == (meters.AverageMeter, meters.MetricMeter)
    assert SummaryWriter.__module__.startswith("torch.utils.tensorboard")
    trainer = importlib.import_module("dassl.engine.trainer")
    assert not hasattr(trainer, "DANN")  # out of scope
