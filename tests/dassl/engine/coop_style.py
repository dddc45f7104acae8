"""A trainer in the style of CoOp's files: it imports nothing of ours but `dassl`, prints, and registers one module.

A frozen "encoder" (mean colors) with a learnt "prompt" (class weights), in the place of CLIP with its prompt learner.
"""

import os.path as osp

import torch
import torch.nn as nn
from torch.nn import functional as F

from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from dassl.utils import load_checkpoint, load_pretrained_weights


class PromptLearner(nn.Module):
    def __init__(self, cfg, classnames):
        super().__init__()
        self.ctx = nn.Parameter(torch.zeros(len(classnames), 3))
        self.register_buffer("token_prefix", torch.zeros(len(classnames), 1))

    def forward(self):
        return self.ctx


class CustomModel(nn.Module):
    def __init__(self, cfg, classnames):
        super().__init__()
        self.image_encoder = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.image_encoder.weight)
        self.prompt_learner = PromptLearner(cfg, classnames)

    def forward(self, image):
        features = self.image_encoder(image.mean(dim=(2, 3)))
        return 10 * features @ self.prompt_learner().t()


@TRAINER_REGISTRY.register()
class CoOpStyle(TrainerX):
    def check_cfg(self, cfg):
        assert cfg.OPTIM.NAME in ["sgd", "adamw"]

    def build_model(self):
        cfg = self.cfg
        classnames = self.dm.dataset.classnames
        print("Building custom model")
        self.model = CustomModel(cfg, classnames)
        print("Turning off gradients in the image encoder")
        for name, param in self.model.named_parameters():
            if "prompt_learner" not in name:
                param.requires_grad_(False)
        if cfg.MODEL.INIT_WEIGHTS:
            load_pretrained_weights(self.model.prompt_learner, cfg.MODEL.INIT_WEIGHTS)
        self.model.to(self.device)
        self.optim = build_optimizer(self.model.prompt_learner, cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        output = self.model(image)
        loss = F.cross_entropy(output, label)
        self.model_backward_and_update(loss)
        loss_summary = {
            "loss": loss.item(),
            "acc": compute_accuracy(output, label)[0].item(),
        }
        if (self.batch_idx + 1) == self.num_batches:
            self.update_lr()
        return loss_summary

    def parse_batch_train(self, batch):
        input = batch["img"]
        label = batch["label"]
        input = input.to(self.device)
        label = label.to(self.device)
        return input, label

    def load_model(self, directory, epoch=None):
        if not directory:
            print("Note that load_model() is skipped as no pretrained model is given")
            return
        names = self.get_model_names()
        model_file = "model-best.pth.tar"
        if epoch is not None:
            model_file = "model.pth.tar-" + str(epoch)
        for name in names:
            model_path = osp.join(directory, name, model_file)
            if not osp.exists(model_path):
                raise FileNotFoundError(f'Model not found at "{model_path}"')
            checkpoint = load_checkpoint(model_path)
            state_dict = checkpoint["state_dict"]
            epoch = checkpoint["epoch"]
            if "token_prefix" in state_dict:
                del state_dict["token_prefix"]
            print(f'Loading weights to {name} from "{model_path}" (epoch = {epoch})')
            self._models[name].load_state_dict(state_dict, strict=False)
