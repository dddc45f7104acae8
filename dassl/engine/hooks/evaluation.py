"""The test at the end of training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dassl.evaluation.passes import of_own_test
from dassl.utils.logger import DETAIL

from .base import HookBase

if TYPE_CHECKING:
    from dassl.engine.trainer import SimpleTrainer

logger = logging.getLogger(__name__)


class FinalTest(HookBase):
    """Test the best or the last model, unless TEST.NO_TEST."""

    def after_train(self, trainer: SimpleTrainer) -> None:
        test = trainer.cfg.TEST
        trainer.evaluation = None
        if test.NO_TEST:
            return
        if not trainer.has_training_step():
            pass  # there is only one model
        elif test.FINAL_MODEL == "best_val":
            logger.info("Deploy the model with the best val performance", extra=DETAIL)
            trainer.load_model(trainer.output_dir)
        else:
            logger.info("Deploy the last-epoch model", extra=DETAIL)
        result = trainer.test()
        if trainer.evaluation is None:  # ``test`` was replaced after its class was made
            trainer.evaluation = of_own_test(test.SPLIT, result, trainer.evaluator)
